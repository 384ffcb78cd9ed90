"""ComfyUI's own formats as grids of the rounding for outputs, so that one algorithm serves these and GGUF's types.

The weights of a row are in units of the row's scale, or of the scale of the whole weight. Blocks therefore have no
factors of their own. In place of them, the scale of each row is fitted once all codes of the row are known.
"""

from __future__ import annotations

from .grids import NativeGrid, grid_of
from .rounding import RoundingForOutputs

__all__ = ["NativeGrid", "RoundingForOutputs", "grid_of"]
