"""Encoders that minimize the squared error under ggml's block formats, weighted by importance where it is given.

Terms, for a type such as Q4_K:

- A block (ggml: super-block) is cut into sub-blocks. A sub-block has an integer scale and perhaps an integer min.
- A block has float16 factors: `d` for its scales and `dmin` for its mins. Their products with the integers are the
  effective scale s and the effective min m of a sub-block.
- A weight x is stored as a code. The code stands for a reconstruction level q (`levels.py`), and x ~ s * q - m.
- The anchor is the level that the weight of largest magnitude is mapped to: s = amax / anchor.

The search has three stages:

1. `scale.py` finds a real-valued scale and min for each sub-block on its own. It rounds the weights for each of several
   anchors, solves each rounding by least squares, and keeps the best.
2. `fit.py` makes them storable. It tries several starts: integers that the largest scale of a block may get, each of
   which determines `d`. Then it runs rounds. A round keeps `d` and `dmin` and tries the neighbors of all integers.
   Between two rounds, `d` and `dmin` are fitted to the codes by least squares.
3. `refine` in `fit.py` tries more starts for the few blocks whose error depends most on how scales are rounded.

Every encoder takes blocks, float32 (n, block_size), and importance of the same shape or None, on any device. It returns
uint8 (n, type_size). They minimize the error of the weights. `encoders/rounding` takes any of them to minimize the
error of a layer's outputs.
"""

from __future__ import annotations

from .encoders import Encoder
from .grid_encoder import GridEncoder

SearchEncoder = Encoder | GridEncoder
"""The encoders that search, of types with levels for each weight and of types with grids."""

__all__ = ["Encoder", "GridEncoder", "SearchEncoder"]
