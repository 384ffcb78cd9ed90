"""Correctness and speed of the Triton kernels on a GPU; a stand-alone script.

    python bench/gpu_dequant.py results.jsonl [--minutes 5] [--types Q4_K Q8_0]
    TRITON_INTERPRET=1 python bench/gpu_dequant.py --selftest        (without a GPU: the correctness check, interpreted)

It needs torch, triton and numpy, but not ComfyUI. IQ1 to IQ3 also need gguf, which has their grids. The script writes a
JSON line for each case as soon as it is measured, and stops when the minutes are over. The cases:

    machine      the GPU and the versions, and the types left out for want of gguf
    correct      for each type and dtype, whether the bits equal those of the torch operations; also for rotated int8
                 rows, on this device and on the CPU
    ceilings     bandwidth of a copy, and speed of a bfloat16 product
    dequantize   microseconds, and bandwidth relative to that of the copy
    int8         the same for rotated int8 rows; two_step_us by way of bfloat16, and torch_us with torch operations
    linear       a Linear of 5120 x 13824 at four numbers of tokens: dequantized in tiles as the nodes do, and whole,
                 against a resident bfloat16 weight; peak memory, and the difference between the two results
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parent.parent
# These packages get no __init__, so that only the formats are imported.
for name, folder in (("wanquant", ROOT), ("wanquant.quant", ROOT / "quant")):
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]

from wanquant.bench.harness import Row, gpu_machine, write_row  # noqa: E402
from wanquant.quant.kernels import eager, triton_int8, triton_kernel  # noqa: E402
from wanquant.quant.qtype import QTYPES  # noqa: E402

if TYPE_CHECKING:
    from wanquant.quant.qtype import QuantType

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((5120, 5120), (13824, 5120), (5120, 13824))
TOKENS = (512, 8190, 32760, 75600)
LAYER = (13824, 5120)
TILE_BYTES = 64 << 20
"""The value of ops/packed/matmul.py, which needs ComfyUI."""


def types_here(wanted: Sequence[str] = ()) -> list[QuantType]:
    """Return the types that have a kernel, without those whose grid is in gguf where that is not installed."""
    has_grids = importlib.util.find_spec("gguf") is not None
    names = [name for name, form in triton_kernel.FORMATS.items() if has_grids or not form.grid_steps]
    return [QTYPES[name] for name in names if not wanted or name in wanted]


def random_blocks(qtype: QuantType, shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    """Return random bytes: uint8, (rows, bytes per row). About one block in 30 has a scale that is NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, qtype.packed_shape(shape), dtype=torch.uint8, generator=generator).to(device)


def same_bits(qtype: QuantType, n_blocks: int, dtype: torch.dtype, device: str) -> bool:
    """Return whether kernel and torch operations give equal bits; any two NaNs are equal."""
    packed = random_blocks(qtype, (n_blocks, qtype.block_size), device)
    out = torch.full((n_blocks, qtype.block_size), 7, dtype=dtype, device=device)
    triton_kernel.launch(qtype, packed, out)
    expected = qtype.dequantize_blocks(packed).to(dtype)
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    steps = (out.view(integers).long() - expected.view(integers).long()).abs()
    same = (steps == 0) | (out.isnan() & expected.isnan())
    if device == "cpu" and dtype is torch.bfloat16:
        # Triton's interpreter truncates to bfloat16 where hardware rounds, and makes subnormal numbers zero.
        same |= (steps <= 1) | (expected.abs() < torch.finfo(dtype).smallest_normal)
    return bool(same.all())


def int8_rows(qtype: QuantType, packed: Tensor, columns: int, by: Callable[..., object]) -> tuple[Tensor, Tensor]:
    """Return int8 codes, (rows, columns), and float32 scales, (rows, 1), of packed uint8 rows."""
    codes = torch.full((len(packed), columns), 7, dtype=torch.int8, device=packed.device)
    scales = torch.zeros(len(packed), 1, device=packed.device)
    by(qtype, packed, codes, scales)
    return codes, scales


def same_int8_rows(qtype: QuantType, shape: tuple[int, int], device: str) -> bool:
    """Return whether the kernel, the torch operations there and those on the CPU give equal int8 rows."""
    packed = random_blocks(qtype, shape, device)
    packed[:-1] &= 191  # finite scales, but the last row, of which only the scale counts
    actual = int8_rows(qtype, packed, shape[1], triton_int8.launch)
    found = [int8_rows(qtype, blocks, shape[1], eager.int8_rows) for blocks in (packed, packed.cpu())]
    finite = actual[1].isfinite().flatten()
    return all(
        torch.equal(actual[1].nan_to_num().cpu(), scales.nan_to_num().cpu())
        and torch.equal(actual[0][finite].cpu(), codes.cpu()[finite.cpu()])
        for codes, scales in found
    )


def correctness(device: str, wanted: Sequence[str]) -> Iterator[Row]:
    tile = triton_kernel.TILE
    plain = [QTYPES[name] for name in triton_int8.PLAIN if not wanted]
    for qtype in (*types_here(wanted), *plain):
        same = all(same_int8_rows(qtype, shape, device) for shape in ((1, 256), (5, 1280)))
        yield {"case": "correct", "type": qtype.name, "dtype": str(torch.int8), "same_bits": same}
    for qtype in types_here(wanted):
        blocks = (1, tile // qtype.block_size, 3 * tile // qtype.block_size + 1)
        for dtype in DTYPES:
            same = all(same_bits(qtype, n, dtype, device) for n in blocks)
            yield {"case": "correct", "type": qtype.name, "dtype": str(dtype), "same_bits": same}


def median_us(call: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(call, warmup=25, rep=200, return_mode="median")) * 1e3


def rotating(call: Callable[[Tensor], object], arguments: list[Tensor]) -> Callable[[], object]:
    """Return a function that passes the next argument at each call; together the arguments exceed the cache."""
    turn = iter(range(1 << 62))
    return lambda: call(arguments[next(turn) % len(arguments)])


def ceilings() -> Row:
    source, target = torch.empty(2, 1 << 29, dtype=torch.uint8, device="cuda").random_().unbind()
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda").unbind()
    copy, product = median_us(lambda: target.copy_(source)), median_us(lambda: a @ b)
    return {
        "case": "ceilings",
        "copy_gb_s": round(2e-3 * source.nbytes / copy),
        "tflops": round(2e-6 * 8192**3 / product),
    }


def speed(qtype: QuantType, shape: tuple[int, int], copy_gb_s: float) -> Row:
    packed = [random_blocks(qtype, shape, "cuda", seed) for seed in range(4)]
    out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    us = median_us(rotating(lambda blocks: triton_kernel.launch(qtype, blocks, out), packed))
    gb_s = 1e-3 * (packed[0].nbytes + out.nbytes) / us
    row: Row = {"case": "dequantize", "type": qtype.name, "shape": shape, "us": round(us, 1), "gb_s": round(gb_s)}
    return row | {"of_copy": round(gb_s / copy_gb_s, 3)}


def int8_speed(qtype: QuantType, shape: tuple[int, int], copy_gb_s: float) -> Row:
    packed = [random_blocks(qtype, shape, "cuda", seed) & 191 for seed in range(4)]
    dense = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    codes, scales = torch.empty(shape, dtype=torch.int8, device="cuda"), torch.empty(shape[0], 1, device="cuda")

    def two_steps(blocks: Tensor) -> None:
        triton_kernel.launch(qtype, blocks, dense)
        triton_int8.launch(QTYPES["BF16"], dense.view(torch.uint8), codes, scales)

    calls: dict[str, Callable[[Tensor], object]] = {
        "us": lambda blocks: triton_int8.launch(qtype, blocks, codes, scales),
        "two_step_us": two_steps,
        "torch_us": lambda blocks: eager.int8_rows(qtype, blocks, codes, scales),
    }
    row: Row = {"case": "int8", "type": qtype.name, "shape": shape}
    row |= {name: round(median_us(rotating(call, packed)), 1) for name, call in calls.items()}
    gb_s = 1e-3 * (packed[0].nbytes + codes.nbytes) / float(row["us"])
    return row | {"gb_s": round(gb_s), "of_copy": round(gb_s / copy_gb_s, 3)}


def layer(qtype: QuantType, tokens: int) -> Row:
    """Measure a Linear with the weight dequantized in tiles, dequantized whole, and resident in bfloat16."""
    rows, columns = LAYER
    packed = random_blocks(qtype, LAYER, "cuda") & 191  # finite scales: a product of NaN needs less power
    x, weight = (torch.randn(n, columns, dtype=torch.bfloat16, device="cuda") for n in (tokens, rows))
    bias = torch.randn(rows, dtype=torch.bfloat16, device="cuda")

    def ours() -> Tensor:
        out, tile = x.new_empty(tokens, rows), weight.new_empty(TILE_BYTES // (2 * columns) // 16 * 16, columns)
        for start in range(0, rows, len(tile)):
            part = slice(start, min(start + len(tile), rows))
            some = tile[: part.stop - start]
            triton_kernel.launch(qtype, packed[part], some)
            torch.addmm(bias[part], x, some.t(), out=out[:, part])
        return out

    def whole() -> Tensor:
        scratch = torch.empty_like(weight)
        triton_kernel.launch(qtype, packed, scratch)
        return linear(x, scratch, bias)

    def resident() -> Tensor:
        return linear(x, weight, bias)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours()
    peak = torch.cuda.max_memory_allocated() - before
    exact = whole()[:512].clone().float()
    error = float((ours()[:512] - exact).norm() / exact.norm())
    calls = {"bf16_us": resident, "us": ours, "whole_us": whole, "bf16_again_us": resident}
    row: Row = {"case": "linear", "type": qtype.name, "tokens": tokens, "error": float(f"{error:.1e}")}
    row |= {name: round(median_us(call), 1) for name, call in calls.items()}
    return row | {"peak_mib": round(peak / 2**20, 1)}


def measurements(wanted: Sequence[str]) -> Iterator[Row]:
    """Yield the most important measurements first."""
    yield (limits := ceilings())
    copy_gb_s = float(str(limits["copy_gb_s"]))
    for shape in SHAPES:
        yield from (int8_speed(qtype, shape, copy_gb_s) for qtype in types_here(wanted))
        yield from (speed(qtype, shape, copy_gb_s) for qtype in types_here(wanted))
    for tokens in TOKENS:
        for name in wanted or ("Q8_0", "Q4_K", "Q6_K", "Q5_0"):
            try:
                yield layer(QTYPES[name], tokens)
            except torch.OutOfMemoryError:
                yield {"case": "linear", "type": name, "tokens": tokens, "out_of_memory": True}


def write(rows: Iterator[Row], file: TextIO, deadline: float) -> bool:
    """Write row by row until the deadline, and return whether all bits were right."""
    right = True
    for row in rows:
        write_row(file, row)
        right &= bool(row.get("same_bits", True))
        if time.monotonic() > deadline:
            break
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="file for the JSON lines (default: standard output)")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--types", nargs="+", default=(), choices=triton_kernel.FORMATS, help="only these types")
    parser.add_argument(
        "--selftest", action="store_true", help="only check the bits; also runs in Triton's interpreter"
    )
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not options.selftest:
        print("no CUDA device: try TRITON_INTERPRET=1 and --selftest")
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    with options.results.open("a") if options.results else open(sys.stdout.fileno(), "w", closefd=False) as file:
        left_out = sorted(triton_kernel.FORMATS.keys() - {qtype.name for qtype in types_here()})
        write_row(file, gpu_machine() | {"triton": triton.__version__, "left_out": left_out})
        right = write(correctness("cuda" if gpu else "cpu", options.types), file, deadline)
        if not options.selftest:
            right &= write(measurements(options.types), file, deadline)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
