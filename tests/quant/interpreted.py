"""A script that runs the Triton kernels in Triton's interpreter on the CPU; kernels/test_triton.py starts it.

It compares the results with those of the torch operations, and prints a line for each type and dtype.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ...quant import QTYPES, QuantType
from ...quant.kernels import eager, triton_int8, triton_kernel
from .samples import assert_same_bits, random_blocks, special_blocks


def cases(quant: QuantType, dtype: torch.dtype) -> list[Tensor]:
    """Return one block, two tiles with a partial third one, and blocks with scales at the limits of float16.

    In 16 bits there is only a tile with a partial second one: the kernel computes in float32 and then rounds.
    """
    per_tile = triton_kernel.TILE // quant.block_size
    if dtype is not torch.float32:
        return [random_blocks(quant, per_tile + 3)]
    blocks = random_blocks(quant, 2 * per_tile + 3)
    return [blocks[:1], blocks, special_blocks(quant)]


def dequantize(quant: QuantType, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize into the middle of a larger tensor, whose margins must not change."""
    n_elements = packed.numel() // quant.type_size * quant.block_size
    padded = torch.full((n_elements + 32,), torch.nan, dtype=dtype)
    padded[[*range(16), *range(-16, 0)]] = 7
    triton_kernel.launch(quant, packed, padded[16:-16])
    assert (padded[:16] == 7).all()
    assert (padded[-16:] == 7).all()
    return padded[16:-16]


def check(quant: QuantType, packed: Tensor, dtype: torch.dtype) -> None:
    actual = dequantize(quant, packed, dtype)
    expected = quant.dequantize_blocks(packed).to(dtype).flatten()
    if dtype is torch.bfloat16:  # the interpreter truncates where hardware rounds
        steps = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        normal = expected.abs() >= torch.finfo(dtype).smallest_normal  # and makes smaller ones zero
        assert steps[normal].max() <= 1
    else:
        assert_same_bits(actual.float().numpy(), expected.float().numpy())


call = InterpretedFunction.__call__


def call_device_function(function: InterpretedFunction, *arguments: object, **options: object) -> object:
    """Call a function of a kernel without patching Triton's language again, which takes most of the time."""
    if function.fn.__module__.startswith("triton."):  # these use other names of the language than the kernel does
        return call(function, *arguments, **options)
    return function.rewrite()(*arguments, **options)


def check_int8_rows(quant: QuantType, shape: tuple[int, int], delta: Tensor | None = None) -> None:
    """Compare rows in the middle of larger tensors, whose margins must not change.

    The last row has scales that are NaN or infinite in most types. Its codes may be anything.
    """
    n_rows, columns = shape
    packed = random_blocks(quant, n_rows * columns // quant.block_size).view(n_rows, -1)
    packed[:-1] &= 191  # scales below 2
    codes, scales = torch.full((n_rows + 2, columns), 7, dtype=torch.int8), torch.full((n_rows + 2, 1), 7.0)
    triton_int8.launch(quant, packed, codes[1:-1], scales[1:-1], delta)
    assert (codes[[0, -1]] == 7).all()
    assert (scales[[0, -1]] == 7).all()
    expected = torch.empty(shape, dtype=torch.int8), torch.empty(n_rows, 1)
    eager.int8_rows(quant, packed, *expected, delta)
    assert_same_bits(scales[1:-1].numpy(), expected[1].numpy())
    assert torch.equal(codes[1:-1][:-1], expected[0][:-1])


if __name__ == "__main__":
    np.seterr(all="ignore")
    InterpretedFunction.__call__ = call_device_function
    for name in triton_kernel.FORMATS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for packed in cases(QTYPES[name], dtype):
                check(QTYPES[name], packed, dtype)
            print(name, dtype)  # noqa: T201
    generator = torch.Generator().manual_seed(0)
    for name in (*triton_kernel.FORMATS, *triton_int8.PLAIN):
        check_int8_rows(QTYPES[name], (2, 256))  # less than a program's part
        shape = (6, 48 * triton_int8.shape_of(QTYPES[name], 6, 4096).EACH)  # a part and a half, in both directions
        check_int8_rows(QTYPES[name], shape, torch.randn(shape, generator=generator).bfloat16())
        print(name, torch.int8)  # noqa: T201
