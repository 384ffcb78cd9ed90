"""Time that fusing dequantization and product could save where the input has few rows, for a 5120 x 5120 weight.

The time embedding has 1 row, the text 512. Columns are milliseconds of processor time on the CPU: dequantized in tiles
of 64 MiB, as the Linear does; in tiles of 1 MiB, which stay in the cache between dequantization and product; the
product alone, with a dense weight; and, for one row, ggml's dot product of blocks, which also rounds the activations
to 8 bits.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..bench import harness
from ..quant import QTYPES, QuantType
from ..quant.kernels import libggml

SIZE = 5120
_VecDot = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)


class _CpuTraits(ctypes.Structure):
    """The CPU functions of one type.

    Source: ggml-cpu.h struct ggml_type_traits_cpu @ ggml 0.20.2.
    """

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("vec_dot", _VecDot),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def vec_dot(qtype: QuantType, packed: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Return a call that multiplies `packed` (uint8, (SIZE, bytes per row)) by `x` (float32, (1, SIZE)) in ggml."""
    library = ctypes.CDLL(str(next(Path(libggml._library._name).parent.glob("*ggml-cpu.*"))))
    library.ggml_cpu_init()
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    traits = library.ggml_get_type_traits_cpu(qtype.ggml_type).contents
    other = library.ggml_get_type_traits_cpu(traits.vec_dot_type).contents
    rounded, out = torch.empty(4 * SIZE, dtype=torch.uint8), torch.empty(SIZE)
    rows = [(out.data_ptr() + 4 * index, packed[index].data_ptr()) for index in range(SIZE)]

    def multiply() -> Tensor:
        other.from_float(x.data_ptr(), rounded.data_ptr(), SIZE)
        for result, row in rows:
            traits.vec_dot(SIZE, result, 0, row, 0, rounded.data_ptr(), 0, 1)
        return out

    return multiply


def measure(name: str, tokens: int, seconds: float) -> dict[str, Any]:
    from ..ops.packed import matmul
    from ..ops.packed.layout import pack

    qtype = QTYPES[name]
    packed = qtype.quantize(torch.randn(SIZE, SIZE), effort="fast")
    weight, dense = pack(packed, name, (SIZE, SIZE), torch.bfloat16), qtype.dequantize(packed, torch.bfloat16)
    x = torch.randn(tokens, SIZE, dtype=torch.bfloat16)

    def tiled(n_bytes: int) -> Callable[[], Tensor]:
        def multiply() -> Tensor:
            matmul.TILE_BYTES = n_bytes
            return matmul.packed_linear(x, weight, None)

        return multiply

    calls: list[Callable[[], object]] = [tiled(64 << 20), tiled(1 << 20), lambda: linear(x, dense)]
    calls += [vec_dot(qtype, packed, x.float())] if tokens == 1 else []
    usual = matmul.TILE_BYTES
    names = ("tile_64_mib", "tile_1_mib", "dense", "vec_dot")
    times = harness.fastest(seconds, *calls, clock=time.process_time)
    matmul.TILE_BYTES = usual
    return {"type": name, "tokens": tokens} | {key: round(ms, 1) for key, ms in zip(names, times, strict=False)}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q6_K", "Q4_K", "Q4_0"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--seconds", type=float, default=5, help="time for each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    harness.import_comfyui()
    with torch.inference_mode():
        rows = [measure(name, tokens, options.seconds) for name in options.types for tokens in options.tokens]
    result = {"machine": harness.machine(), "rows": rows}
    columns = ("type", "tokens", "tile_64_mib", "tile_1_mib", "dense", "vec_dot")
    harness.conclude(options, result, f"{result['machine']}\n{harness.table(columns, harness.cells(rows, columns))}")


if __name__ == "__main__":
    main()
