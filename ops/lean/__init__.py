"""Wan's transformer in little memory: the host's model and weights, its blocks computed piece by piece.

It imports `packed`, `host` and `quant`.
"""

from .apply import apply_lean, calc_conds_separately
from .memory_plan import MemoryPlan

__all__ = ["MemoryPlan", "apply_lean", "calc_conds_separately"]
