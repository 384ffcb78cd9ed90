"""Wan's transformer in little memory: the host's model and weights, its blocks computed piece by piece.

It imports `packed`, `host` and `quant`.
"""

from .apply import apply_lean, one_by_one
from .plan import LeanPlan

__all__ = ["LeanPlan", "apply_lean", "one_by_one"]
