"""Rotated 8-bit rows of packed weights that are kept over a sampling, so that they are not made anew at each use."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import partial

import torch
from torch import Tensor

from ...quant.device import lasting_allocations
from .int8 import Int8Ops, patched_int8_rows, write_int8_rows
from .matmul import PatchedRows
from .patches import OnTheFly

_ALIGNMENT = 16
"""Kernels read rows in vectors of at most this many bytes."""


def row_bytes(rows: int, columns: int) -> int:
    """Return the bytes that 8-bit rows and their scales take."""
    return _aligned(rows * columns) + _aligned(4 * rows)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class KeptRows:
    """One allocation for the 8-bit rows of layers, which are kept as they are first made while there is room.

    Each step uses all rows of a block equally often, and the saved work grows with the bytes. So a byte saves the same
    in all layers, and those of the first blocks are kept. Other LoRAs on a layer mean other rows, as hooks on prompts
    cause them. Rows with functions of other nodes, which may differ from step to step, are not kept.

    Args:
        nbytes: the room.
        device: of the products.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with lasting_allocations():
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.used_bytes = 0
        self._rows: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._layers: list[Int8Ops.Linear] = []

    def attach(self, layers: Iterable[Int8Ops.Linear]) -> None:
        """Make layers multiply with rows that are kept here, until `release`."""
        for layer in layers:
            make = partial(self._make, layer)
            own = type(layer)
            layer.__dict__.update(multiply=partial(own.multiply, make=make), hold=partial(own.hold, make=make))
            self._layers.append(layer)

    def release(self) -> None:
        """Free the rows, and make the layers multiply as their class does."""
        for layer in self._layers:
            for name in ("multiply", "hold"):
                layer.__dict__.pop(name, None)
        self._layers.clear()
        self._rows.clear()
        self._memory, self.used_bytes = self._memory.new_empty(0), 0

    def _make(self, layer: Int8Ops.Linear, patched: PatchedRows, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of a layer as `patched_int8_rows` does: kept ones, or else new ones, which are kept if possible.

        Args:
            rows: as for `dequantized_tiles`.
            like: a tensor of the compute dtype and on the device of the weight.
        """
        key = (layer, rows.start, rows.stop, patched.functions)
        if like.device != self._memory.device or not all(isinstance(each, OnTheFly) for each in patched.functions):
            return patched_int8_rows(patched, rows, like)
        if key not in self._rows:
            room = self._allocate(rows.stop - rows.start, patched.shape[1])
            if room is None:
                return patched_int8_rows(patched, rows, like)
            write_int8_rows(patched, rows, like, *room)
            self._rows[key] = room
        return self._rows[key]

    def _allocate(self, rows: int, columns: int) -> tuple[Tensor, Tensor] | None:
        """Return room for codes, int8, (rows, columns), and scales, float32, (rows, 1), or None if there is none."""
        start, nbytes = self.used_bytes, row_bytes(rows, columns)
        if start + nbytes > len(self._memory):
            return None
        self.used_bytes = start + nbytes
        codes = self._memory[start:][: rows * columns]
        scales = self._memory[start + _aligned(rows * columns) :][: 4 * rows]
        return codes.view(torch.int8).view(rows, columns), scales.view(torch.float32).view(rows, 1)
