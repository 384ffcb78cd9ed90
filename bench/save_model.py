"""Memory that Save Model as GGUF takes at true layer shapes, with two LoRAs of rank 64 on every layer of the blocks."""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch

from ..quant.conversion.convert import convert
from ..quant.plan.wan_shapes import SIZES
from .convert import machine, resident, write_source
from .lora import with_loras
from .step import dense_model, import_host, packed_model


def anonymous() -> int:
    """Bytes of memory of this process that are no pages of files (Linux)."""
    return resident("self")["RssAnon"]


def measure(source: Path, loaded: str, recipe: str, effort: str) -> dict[str, object]:
    """Saves the source as a recipe, loaded dense or as another one, its LoRAs merged."""
    from ..ops.merged_source import merged_checkpoint

    if loaded == "BF16":
        model = with_loras(dense_model(source))
    else:
        file = source.with_name(f"{source.stem}-{loaded}.gguf")
        model = with_loras(packed_model(convert(source, file, loaded, effort="fast").path))
    checkpoint = merged_checkpoint(model, torch.device("cpu"))
    before = peak = anonymous()
    started, done = time.monotonic(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    report = convert(checkpoint, source.with_name("saved.gguf"), recipe, effort=effort, overwrite=True)
    done.set()
    watching.join()
    report.path.unlink()
    row: dict[str, object] = {"loaded": loaded, "recipe": recipe, "effort": effort}
    row |= {"seconds": round(time.monotonic() - started, 1), "held_gib": round(checkpoint.held_bytes / 2**30, 3)}
    return row | {"before_gib": round(before / 2**30, 3), "added_gib": round((peak - before) / 2**30, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--size", default="14B", choices=SIZES)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--loaded", nargs="+", default=["Q8_0"], help="recipes to load, or BF16 for the checkpoint")
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--effort", default="fast", choices=["fast", "best"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_host()
    source = write_source(options.size, options.blocks)
    rows = [measure(source, loaded, options.recipe, options.effort) for loaded in options.loaded]
    if options.json:
        print(
            json.dumps({"machine": machine(), "model": options.size, "blocks": options.blocks, "rows": rows}, indent=1)
        )
        return
    print(f"{machine()}; {options.blocks} blocks of {options.size}")
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
