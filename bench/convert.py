"""Speed and error of every encoder against ggml's and kitchen's, then whole conversions: seconds and peak memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ..quant.conversion.layer_encoder import LayerEncoder
from ..quant.plan.wan_shapes import SIZES, transformer_shapes
from ..quant.qtype import QTYPES
from ..quant.sources.checkpoint import open_checkpoint
from ..quant.statistics.calibration import CalibrationCollector
from ..quant.statistics.calibration_file import write_calibration
from ..testing.libggml import LibGGML, load
from ..testing.tiny_wan import write_random_checkpoint, write_sparse_checkpoint
from . import harness
from .harness import GIB, ROOT
from .native import inputs
from .native_encoders import native_rows

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
GRID_TYPES = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
# Small enough to measure all types in minutes, large enough that the overhead of a call is negligible.
SHAPE, GRID_ROWS = (1024, 5120), 128
# As many tokens as a calibration needs for full rank in a span, in the calls of four steps.
CALLS, TOKENS_A_CALL = 4, 512


def resident(pid: int | str) -> dict[str, int]:
    """Return the bytes of anonymous memory, and the peak of all resident pages, of a process (Linux)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM") if key in fields}


def encoder_row(name: str, weight: torch.Tensor, libggml: LibGGML) -> dict[str, Any]:
    """Return millions of weights per second on one thread, and the squared error relative to ggml's."""
    array = weight.numpy()
    # Where ggml cannot do without an importance matrix, all weights are given the same importance.
    uniform = torch.ones(weight.shape[1]) if QTYPES[name].fast_in_c == "requires importance" else None
    known = None if uniform is None else uniform.numpy()

    def fast() -> NDArray[np.uint8]:
        return QTYPES[name].quantize(weight, uniform, "fast").numpy()

    def best() -> NDArray[np.uint8]:
        return QTYPES[name].quantize(weight).numpy()

    encoders = {"ggml": lambda: libggml.quantize(name, array, known), "fast": fast, "best": best}
    times = harness.fastest(1, encoders["ggml"], fast, clock=time.process_time)
    times += harness.fastest(1, best, clock=time.process_time)
    errors = [squared_error(libggml.dequantize(name, encode()), array) for encode in encoders.values()]
    row: dict[str, Any] = {"type": name}
    for encoder, ms, error in zip(encoders, times, errors, strict=True):
        row[f"{encoder}_mws"] = round(weight.numel() / ms / 1e3, 2)
        if encoder != "ggml":
            row[f"{encoder}_error"] = round(error / errors[0] - 1, 4)
    in_a_file = LayerEncoder().quantize(QTYPES[name], weight).numpy()
    row["file_error"] = round(squared_error(libggml.dequantize(name, in_a_file), array) / errors[0] - 1, 4)
    return row


def squared_error(dequantized: NDArray[np.float32], weight: NDArray[np.float32]) -> float:
    return float(np.square(dequantized.astype(np.float64) - weight).sum())


def encoder_rows() -> list[dict[str, Any]]:
    """Measure every type on Gaussian weights, which trained layers resemble."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    libggml = load()
    rows = [encoder_row(name, weight, libggml) for name in TYPES]
    rows += [encoder_row(name, weight[:GRID_ROWS], libggml) for name in GRID_TYPES]
    torch.set_num_threads(threads)
    return rows


def convert(
    source: Path, recipes: str, effort: str, loras: Sequence[Path] = (), calibration: Path | None = None
) -> dict[str, object]:
    """Convert the source, with LoRAs added, to all of the comma-separated recipes in one pass."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-m", "quant", "convert", str(source), folder]
        command += ["--recipe", recipes, "--effort", effort, "--json"]
        command += [part for lora in loras for part in ("--lora", str(lora))]
        command += ["--calibrate", str(calibration)] if calibration else []
        usage = run(command)
        nbytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "recipe": recipes,
        "effort": effort,
        "loras": len(loras),
        "calibrated": calibration is not None,
        "source_gib": round(source.stat().st_size / GIB, 3),
        "gib": round(nbytes / GIB, 3),
        **usage,
    }


def run(command: list[str]) -> dict[str, float]:
    """Run a process and return its seconds and peak memory."""
    peak_anonymous = peak_resident = 0
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        usage = resident(process.pid)
        peak_anonymous = max(peak_anonymous, usage.get("RssAnon", 0))
        peak_resident = max(peak_resident, usage.get("VmHWM", 0))
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}: see its message above")
    return {
        "seconds": round(seconds, 1),
        "peak_anonymous_gib": round(peak_anonymous / GIB, 3),
        "peak_resident_gib": round(peak_resident / GIB, 3),
    }


def write_source(size: str, blocks: int | None, drawn_blocks: int | None = None) -> Path:
    """Write a checkpoint of true shapes, unless it exists, and return its path.

    Args:
        blocks: the number of transformer blocks; None writes all.
        drawn_blocks: the number of blocks with random values; all other tensors are zeros that need no disk space.
            None draws all tensors, but at 14B only two blocks.
    """
    drawn_blocks = 2 if drawn_blocks is None and "14B" in size else drawn_blocks
    shapes = transformer_shapes(SIZES[size]._replace(layers=blocks) if blocks else SIZES[size])
    marks = [f"{blocks}-blocks"] if blocks else []
    marks += [f"{drawn_blocks}-drawn"] if drawn_blocks is not None else []
    source = ROOT / "out" / "bench" / f"{'-'.join(['wan', size, *marks])}.safetensors"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        if drawn_blocks is None:
            write_random_checkpoint(source, shapes)
        else:
            prefixes = tuple(f"blocks.{number}." for number in range(drawn_blocks))
            write_sparse_checkpoint(source, shapes, drawn={name for name in shapes if name.startswith(prefixes)})
    return source


def write_lora(source: Path, rank: int) -> Path:
    """Write a LoRA of all matrices of the blocks of a source, in bfloat16, and return its path."""
    tensors = {}
    with open_checkpoint(source) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if name.startswith("blocks.") and len(tensor.shape) == 2:
                layer = f"diffusion_model.{name.removesuffix('.weight')}"
                tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, tensor.shape[1], dtype=torch.bfloat16) / 64
                tensors[f"{layer}.lora_up.weight"] = torch.randn(tensor.shape[0], rank, dtype=torch.bfloat16) / 64
    path = source.with_name(f"{source.stem}-rank-{rank}.safetensors")
    save_file(tensors, path)
    return path


def write_random_calibration(source: Path, part: str) -> Path:
    """Write a calibration of true shapes, from correlated inputs, and return its path.

    Args:
        part: what the names of the calibrated layers of the blocks contain.
    """
    collector = CalibrationCollector()
    with open_checkpoint(source) as checkpoint:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    layers = [name for name in shapes if name.startswith("blocks.") and part in name and len(shapes[name]) == 2]
    for _ in range(CALLS):
        for name in layers:
            collector.add(name, inputs(TOKENS_A_CALL, shapes[name][1], collector.samples))
        collector.samples += 1
    return write_calibration(source.with_name(f"{source.stem}-{part}.calibration"), collector.result(), overwrite=True)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", default="1.3B", choices=SIZES)
    parser.add_argument("--blocks", type=int, help="number of transformer blocks (default: all)")
    parser.add_argument(
        "--drawn-blocks",
        type=int,
        metavar="N",
        help="fill all but N blocks with zeros that need no disk space (14B: 2)",
    )
    parser.add_argument(
        "--recipes",
        nargs="*",
        default=["Q8_0", "Q4_K_M"],
        help="A,B converts to both in one pass; without a recipe only the encoders are measured",
    )
    parser.add_argument("--effort", default="fast", choices=["fast", "best", "thorough"])
    parser.add_argument("--encoders", nargs="*", default=["gguf", "native"], choices=["gguf", "native"])
    parser.add_argument("--lora-rank", type=int, default=0, metavar="N", help="also convert with a LoRA of this rank")
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="calibrate the layers whose names contain TEXT on random inputs; ffn.2 are the widest",
    )
    options = parser.parse_args()
    encoders = encoder_rows() if "gguf" in options.encoders else []
    native = native_rows(SHAPE) if "native" in options.encoders else []
    source = write_source(options.size, options.blocks, options.drawn_blocks) if options.recipes else None
    calibration = write_random_calibration(source, options.calibrate) if source and options.calibrate else None
    files = [convert(source, recipes, options.effort, (), calibration) for recipes in options.recipes] if source else []
    if source and options.lora_rank:
        loras = [write_lora(source, options.lora_rank)]
        files += [convert(source, recipes, options.effort, loras, calibration) for recipes in options.recipes]
    result = {"machine": machine(), "encoders": encoders, "native": native, "files": files}
    # Rows of formats that kitchen lacks have fewer columns.
    shown = [(list(max(rows, key=len)), rows) for rows in (encoders, native, files) if rows]
    tables = "\n\n".join(harness.table(head, harness.cells(rows, head)) for head, rows in shown)
    harness.conclude(options, result, f"{result['machine']}\n\n{tables}")


def machine() -> str:
    """Return the machine with the version of comfy-kitchen, if there is one."""
    try:
        return f"{harness.machine()}, comfy-kitchen {version('comfy-kitchen')}"
    except PackageNotFoundError:
        return harness.machine()


if __name__ == "__main__":
    main()
