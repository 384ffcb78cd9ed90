"""Memory that Save Quantized Model needs at true shapes, with two LoRAs of rank 64 on every layer of the blocks."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ..quant.conversion.convert import convert
from ..quant.plan.wan_shapes import SIZES
from . import harness
from .convert import resident, write_source
from .harness import GIB
from .lora import with_loras
from .step import dense_model, packed_model


def anonymous() -> int:
    """Return the bytes of this process's memory that are not pages of files (Linux)."""
    return resident("self")["RssAnon"]


def measure(source: Path, loaded: str, recipe: str, effort: str) -> dict[str, object]:
    """Load the source dense (`loaded` BF16) or quantized, and save it with merged LoRAs as another recipe."""
    from ..ops.merged_source import merged_checkpoint

    if loaded == "BF16":
        model = with_loras(dense_model(source))
    else:
        file = source.with_name(f"{source.stem}-{loaded}.gguf")
        model = with_loras(packed_model(convert(source, file, loaded, effort="fast").path))
    checkpoint = merged_checkpoint(model, torch.device("cpu"))
    started = time.monotonic()
    with harness.sampled(anonymous, 0.005) as used:
        report = convert(checkpoint, source.with_name("saved.gguf"), recipe, effort=effort, overwrite=True)
    report.path.unlink()
    row: dict[str, object] = {"loaded": loaded, "recipe": recipe, "effort": effort}
    row |= {"seconds": round(time.monotonic() - started, 1), "held_gib": round(checkpoint.held_bytes / GIB, 3)}
    return row | {"before_gib": round(used[0] / GIB, 3), "added_gib": round((max(used) - used[0]) / GIB, 3)}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", default="14B", choices=SIZES)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--loaded", nargs="+", default=["Q8_0"], help="recipes to load, or BF16 for the checkpoint")
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--effort", default="fast", choices=["fast", "best"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    harness.import_comfyui()
    source = write_source(options.size, options.blocks)
    rows = [measure(source, loaded, options.recipe, options.effort) for loaded in options.loaded]
    result = {"machine": harness.machine(), "model": options.size, "blocks": options.blocks, "rows": rows}
    text = harness.table(list(rows[0]), [list(row.values()) for row in rows])
    harness.conclude(options, result, f"{result['machine']}; {options.blocks} blocks of {options.size}\n{text}")


if __name__ == "__main__":
    main()
