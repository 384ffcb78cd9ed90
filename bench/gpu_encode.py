"""Encoders on a GPU against the same encoders on the CPU; a stand-alone script.

    python bench/gpu_encode.py results.jsonl [--minutes 5]          (on the machine with the GPU)
    python bench/gpu_encode.py --selftest                           (tiny shapes, no GPU)

It needs torch and numpy, but not ComfyUI. The types whose grids are in gguf also need that package. The weights are of
a Gaussian mixture, the inputs have a few strong channels. A JSON line is written for each type and way to encode it:

    ways        plain, importance, calibrated ("best") and thorough
    gpu_us      microseconds a weight, of the second run
    cpu_us      the same on all cores of the CPU, on the first rows
    differing   share of the weights of these rows that the two decode to different values
    error       error of the outputs on the GPU over that on the CPU, less one
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if "wanquant" not in sys.modules:
    # The package gets no __init__, which needs ComfyUI.
    sys.modules["wanquant"] = types.ModuleType("wanquant")
    sys.modules["wanquant"].__path__ = [str(ROOT)]

from wanquant.bench.harness import Row, gpu_machine, machine, write_row  # noqa: E402
from wanquant.quant import QTYPES  # noqa: E402
from wanquant.quant.conversion.layer_encoder import LayerEncoder  # noqa: E402
from wanquant.quant.encoders.rounding import Moments  # noqa: E402
from wanquant.quant.qtype import Effort, QuantType  # noqa: E402

TYPES = ("Q4_K", "Q2_K", "Q3_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "IQ4_XS", "IQ2_XXS", "IQ1_M", "IQ3_S", "IQ3_XXS")
NEEDS_GGUF = ("IQ1", "IQ2", "IQ3")
WAYS = ("plain", "importance", "calibrated", "thorough")
SHAPE, COMPARED_ROWS, SPAN, RANK = (5120, 5120), 64, 256, 64


def example(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Moments]:
    """Return a weight, float32 (rows, columns), and the mean squares and second moments of its inputs."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    weight = torch.randn(shape, generator=generator) * (0.5 + torch.rand(rows, 1, generator=generator)) / columns**0.5
    strength = torch.randn(columns, generator=generator).exp()
    spans = strength.view(-1, SPAN, 1) * torch.randn(columns // SPAN, SPAN, 2 * SPAN, generator=generator)
    blocks = (spans @ spans.mT).double() / (2 * SPAN)
    blocks.diagonal(dim1=-2, dim2=-1).mul_(1.01)
    factors = strength.view(-1, SPAN, 1) * torch.randn(columns // SPAN, SPAN, RANK, generator=generator) / RANK
    squares = blocks.diagonal(dim1=-2, dim2=-1).flatten().float()
    return weight, squares, Moments(blocks, factors.double())


def ways(shape: tuple[int, int]) -> tuple[Tensor, dict[str, tuple[LayerEncoder, Effort]]]:
    """Return a weight, float32 (rows, columns), and the ways to encode it by name."""
    weight, squares, moments = example(shape)
    calibrated = LayerEncoder(squares, moments)
    return weight, {
        "plain": (LayerEncoder(), "best"),
        "importance": (LayerEncoder(squares), "best"),
        "calibrated": (calibrated, "best"),
        "thorough": (calibrated, "thorough"),
    }


def compare(qtype: QuantType, encoder: LayerEncoder, effort: Effort, weight: Tensor, device: str) -> Row:
    """Encode on both, and return the times and differences."""
    some = weight[:COMPARED_ROWS]
    started = time.perf_counter()
    cpu = qtype.dequantize(encoder.quantize(qtype, some, effort))
    row: Row = {"cpu_us": 1e6 * (time.perf_counter() - started) / some.numel()}
    there, moved = encoder.to(torch.device(device)), weight.to(device)
    for _ in range(2):
        started = time.perf_counter()
        packed = there.quantize(qtype, moved, effort).cpu()  # the copy waits for the device
        row["gpu_us"] = 1e6 * (time.perf_counter() - started) / weight.numel()
    gpu = qtype.dequantize(packed[:COMPARED_ROWS])
    row["differing"] = float((gpu != cpu).double().mean())
    errors = [_output_error(encoder, decoded - some) for decoded in (gpu, cpu)]
    row["error"] = errors[0] / errors[1] - 1
    return {name: float(f"{value:.3g}") for name, value in row.items()}


def _output_error(encoder: LayerEncoder, error: Tensor) -> float:
    """Return the mean squared error of the outputs, as far as the encoder knows the inputs."""
    error = error.double()
    if encoder.moments is None:
        return float((error.square() * (1 if encoder.importance is None else encoder.importance)).sum())
    spans = error.view(len(error), -1, SPAN).transpose(0, 1)
    shared = torch.einsum("nrs,nsk->rk", spans, encoder.moments.factors)
    return float((spans @ encoder.moments.blocks * spans).sum() + shared.square().sum())


def measurements(device: str, shape: tuple[int, int], names: Sequence[str], chosen: Sequence[str]) -> Iterator[Row]:
    """Yield the most important measurements first."""
    has_grids = importlib.util.find_spec("gguf") is not None
    weight, encoders = ways(shape)
    for way in chosen:
        encoder, effort = encoders[way]
        for name in names:
            if has_grids or not name.startswith(NEEDS_GGUF):
                result = compare(QTYPES[name], encoder, effort, weight, device)
                yield {"case": "encode", "type": name, "way": way, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="file for the JSON lines (default: standard output)")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--selftest", action="store_true", help="tiny shapes, also on the CPU")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not options.selftest:
        print("no CUDA device: try --selftest")
        return
    shape = (2 * COMPARED_ROWS, 2 * SPAN) if options.selftest else SHAPE
    deadline = time.monotonic() + 60 * options.minutes
    with options.results.open("a") if options.results else open(sys.stdout.fileno(), "w", closefd=False) as file:
        write_row(file, gpu_machine() | {"cpu": machine()})
        for row in measurements("cuda" if gpu else "cpu", shape, options.types, options.ways):
            write_row(file, row)
            if time.monotonic() > deadline:
                break


if __name__ == "__main__":
    main()
