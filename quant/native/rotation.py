"""The rotation of ConvRot, which mixes each run of input channels so that no channel stands out.

Source: comfy_kitchen 0.2.40 tensor/int8_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..device import cached_on_device

GROUP = 256
"""The number of input channels per rotation that ComfyUI's fused kernels expect."""


def hadamard(size: int) -> Tensor:
    """Return the matrix of ConvRot: float32, (size, size), symmetric and orthogonal, so that it is its own inverse.

    Args:
        size: a power of 4.
    """
    seed = 1 - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix.div_(size**0.5)


Rotation = Callable[[Tensor], Tensor]
"""Takes and returns float32, (n, columns)."""


def rotate(rows: Tensor, distances: tuple[int, ...] = (64, 16, 4, 1)) -> Tensor:
    """Rotate each run of 256 columns, or undo it: float32 or float64, (n, columns).

    The order of the additions is fixed, so that the bits do not depend on threads, slices or the device.

    Args:
        distances: between the columns that each of the four steps mixes, in their order.
    """
    # A step replaces a, b, c, d by their sum minus twice d, c, b, a. It reverses them, and so do all steps together.
    turned = rows.reshape(-1, GROUP).contiguous().flip(1)
    for distance in distances:
        quarters = turned.view(-1, 4, distance)
        a, b, c, d = quarters.unbind(1)
        total = (a + b).add_(c + d)
        torch.sub(total.unsqueeze(1), quarters, alpha=2, out=quarters)
    return turned.mul_(GROUP**-0.5).view_as(rows)


def rotate_as_kitchen(rows: Tensor) -> Tensor:
    """Rotate each run of 256 columns, or undo it, by a product of matrices: any float dtype, (n, columns)."""
    # The matrix's numbers, 1/16 and -1/16, are exact in all dtypes.
    return (rows.view(len(rows), -1, GROUP) @ _matrix(rows.device).to(rows.dtype)).view_as(rows)


def not_rotatable(columns: int) -> str | None:
    """Return why rows of this length cannot be rotated, or None."""
    return None if columns % GROUP == 0 else f"rows of {columns}, not a multiple of {GROUP}"


@cached_on_device
def _matrix(device: torch.device) -> Tensor:
    # Kitchen multiplies with the transpose. The matrix is symmetric, but the layout decides how a BLAS adds.
    return hadamard(GROUP).to(device).T
