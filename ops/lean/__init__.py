"""Lean forwards: ComfyUI's Wan transformer, computed in pieces to save memory (see `block`).

It imports `packed`, `host` and `quant`.
"""

from .apply import apply_lean, calc_conds_separately
from .memory_plan import MemoryPlan

__all__ = ["MemoryPlan", "apply_lean", "calc_conds_separately"]
