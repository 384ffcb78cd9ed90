"""What the rounding asks of a type: its integers, its levels, and how a group of weights is rounded to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..search.fit import BlockScales
from ..search.levels import Integers
from ..search.sub_blocks import SubBlocks

RoundGroup = Callable[[Tensor, Tensor], Tensor]
"""Takes values, float32 (n, together, rows), and P, float32 (n, together, together) and upper triangular.

Returns the levels c, of the shape of the values, of least error ||(values - scale * c) P||**2. A group of one weight
has one nearest level, whatever P is."""


class Scales(Protocol):
    """The scales or mins that a type can store for a sub-block: integers, or the values of a small float."""

    @property
    def is_fixed(self) -> bool:
        """True if there is nothing to choose."""

    def nearest(self, values: Tensor) -> Tensor:
        """Return the scale nearest to each value, float32 of the same shape; may overwrite `values`."""

    def moved(self, values: Tensor, steps: int) -> Tensor:
        """Return the scales so many neighbors away, or the last one: float32, of the shape of `values`."""


class StoredScales(Protocol):
    """What a block stores for its sub-blocks."""

    @property
    def scales(self) -> Scales: ...

    @property
    def mins(self) -> Integers: ...


class Grid(Protocol):
    """The values that blocks of a type can have: unit * level - dmin * min, where the unit is d * scale or 1."""

    @property
    def size(self) -> int:
        """The number of weights in a sub-block."""

    @property
    def together(self) -> int:
        """The number of weights that are rounded at once."""

    @property
    def offsets(self) -> Sequence[float]:
        """Each sub-block adds one of these to all of its levels."""

    @property
    def search(self) -> StoredScales:
        """The scales and mins that the type can store."""

    @property
    def has_factors(self) -> bool:
        """True if blocks have d and dmin, which are fitted. Without, both are 1, and each scale is searched for."""

    def unit(self, scale: Tensor) -> Tensor:
        """Return what a level counts under an effective scale, float32 of any shape.

        That is the scale itself, or 1 for a type whose levels are values already, among which the scale chooses.
        """

    def fit_scales(self, sub_blocks: SubBlocks, n_blocks: int) -> BlockScales:
        """Search for the scales of blocks."""

    def fit_integers(self, sub_blocks: SubBlocks, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Search for the integer scales and mins of n sub-blocks whose d and dmin are given, all float32 (n,)."""

    def rounding(self, scale: Tensor, offset: float | Tensor) -> RoundGroup:
        """Return the function that rounds groups under a scale and an offset of each row, float32 (n, rows)."""

    def offset(self, levels: Tensor) -> float | Tensor:
        """Return the offset that levels of a sub-block have, (n, size, rows) -> (n, rows), or 0."""

    def storable(self, factors: Tensor) -> Tensor:
        """Round values of d and dmin to what a block can store, float32 of any shape."""


class PackedGrid(Grid, Protocol):
    """A grid whose blocks are bytes one after the other, as those of GGUF are."""

    def pack_levels(self, scales: BlockScales, levels: Tensor) -> Tensor:
        """Write blocks whose weights have these levels, float32 (n, block_size), as uint8 (n, type_size)."""
