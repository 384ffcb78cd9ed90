"""The demo: one seed in full precision and in four recipes, through a real ComfyUI server; results in out/demo."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from wanquant.dev import ROOT
from wanquant.tests.host.comparison import DENSE, Run, prepare, sample
from wanquant.tests.host.server import HostServer

RECIPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0")
OUT = ROOT / "out" / "demo"
WORDS = {"convert": "converting", "sampler": "sampling"}


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="wanquant-demo-") as base:
        print("starting ComfyUI (its log: out/demo/comfyui.log)", flush=True)
        with HostServer(Path(base), log=OUT / "comfyui.log") as server:
            version = server.version()
            print(f"ComfyUI {version} answers at {server.url}; making a random Wan 2.1 checkpoint", flush=True)
            prepare(server)
            runs = [_sample(server, name) for name in (DENSE, *RECIPES)]
        _keep(runs, version)
    print(f"done in {time.monotonic() - started:.0f} s; written to {OUT}")


def _sample(server: HostServer, name: str) -> Run:
    run = sample(server, name, _show)
    print(f"{name}: sampled, {run.seconds_per_step:.2f} s a step".ljust(60), flush=True)
    return run


def _show(run: str, node: str, value: int, goal: int) -> None:
    """Progress on one line of a terminal; in a log file, a line a node."""
    if node in WORDS and (sys.stdout.isatty() or value >= goal):
        end = "\r" if sys.stdout.isatty() else "\n"
        print(f"{run}: {WORDS[node]} {100 * value // goal:3} %".ljust(60), end=end, flush=True)


def _keep(runs: list[Run], version: str) -> None:
    """Print the table, and write summary.json, the videos, and pictures of the conversions and of all runs."""
    dense, quantized = runs[0], runs[1:]
    rows = [
        {
            "recipe": run.name,
            "bytes": run.nbytes,
            "source_bytes": dense.nbytes,
            "sqnr_db": round(run.sqnr_db(dense), 2),
            "seconds_per_step": round(run.seconds_per_step, 4),
        }
        for run in quantized
    ]
    print(f"\n{'recipe':8} {'bytes before':>13} {'bytes after':>12} {'SQNR dB':>8} {'s/step':>7}")
    print(f"{'(none)':8} {dense.nbytes:13,} {dense.nbytes:12,} {'':8} {dense.seconds_per_step:7.2f}")
    for row in rows:
        sizes = f"{row['source_bytes']:13,} {row['bytes']:12,}"
        print(f"{row['recipe']:8} {sizes} {row['sqnr_db']:8.1f} {row['seconds_per_step']:7.2f}")
    for run in runs:
        shutil.copy(run.outputs["video"][0], OUT / f"{run.name}.mp4")
    for run in quantized:
        shutil.copy(run.outputs["report"][0], OUT / f"{run.name}-report.png")
    _strip(runs).save(OUT / "comparison.png")
    summary = {"recipes": rows, "video": str(OUT / "Q4_K_M.mp4"), "host": version}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("\nvideo: Q4_K_M.mp4; conversion report: Q4_K_M-report.png; all runs side by side: comparison.png")


def _strip(runs: list[Run]) -> Image.Image:
    """The middle frame of every run in the order of the table, and below it how far it is from the first."""
    frames = [Image.open(run.outputs["frames"][len(run.outputs["frames"]) // 2]).convert("RGB") for run in runs]
    (width, height), label = frames[0].size, 28
    strip = Image.new("RGB", (width * len(frames), 2 * (height + label)), "white")
    draw = ImageDraw.Draw(strip)
    for index, (run, frame) in enumerate(zip(runs, frames, strict=True)):
        x = width * index
        cost = f"{run.name}, {run.sqnr_db(runs[0]):.1f} dB" if index else "unquantized"
        difference = ImageChops.difference(frame, frames[0]).point([min(255, 20 * value) for value in range(256)] * 3)
        for y, text, picture in ((0, cost, frame), (height + label, "difference x 20", difference)):
            draw.text((x + 6, y + 4), text, "black", ImageFont.load_default(16))
            strip.paste(picture, (x, y + label))
    return strip


if __name__ == "__main__":
    main()
