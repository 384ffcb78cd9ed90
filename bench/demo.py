"""One seed of TinyWan in full precision and quantized, sampled in a real ComfyUI server; writes out/demo."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from wanquant.bench import demo_pictures as pictures
from wanquant.testing.comparison import DENSE, TRAINED, Run, sample
from wanquant.testing.hosts import ROOT
from wanquant.testing.server import GraphError, HostServer

RECIPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q2_K")
NATIVE = ("INT8", "W4A8")
"""Formats of ComfyUI itself, of which older ones lack some."""
OUT = ROOT / "out" / "demo"
SHOWN = ("Q4_K_M", "Q2_K", "INT8")
"""The recipes of the moving picture."""
WORDS = {"convert": "converting", "sampler": "sampling"}


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="wanquant-demo-") as base:
        print("starting ComfyUI (its log: out/demo/comfyui.log)", flush=True)
        with HostServer(Path(base), log=OUT / "comfyui.log") as server:
            version = server.version()
            print(f"ComfyUI {version} answers at {server.url}; TinyWan draws a red ball", flush=True)
            TRAINED.prepare(server)
            runs = [_sample(server, name) for name in (DENSE, *RECIPES)]
            for name in NATIVE:
                try:
                    runs.append(_sample(server, name))
                except GraphError as error:
                    reason = error.details.get("exception_message", str(error)).splitlines()[0]
                    print(f"{name}: left out: {reason}", flush=True)
        _keep(runs, version)
    print(f"done in {time.monotonic() - started:.0f} s; written to {OUT}")


def _sample(server: HostServer, name: str) -> Run:
    run = sample(server, TRAINED, name, _show)
    print(f"{name}: sampled, {run.seconds_per_step:.2f} s per step".ljust(60), flush=True)
    return run


def _show(run: str, node: str, value: int, goal: int) -> None:
    """Show progress: on one line of a terminal, or with one line per node in a log file."""
    if node in WORDS and (sys.stdout.isatty() or value >= goal):
        end = "\r" if sys.stdout.isatty() else "\n"
        print(f"{run}: {WORDS[node]} {100 * value // goal:3} %".ljust(60), end=end, flush=True)


def _keep(runs: list[Run], version: str) -> None:
    """Print the table, and write summary.json, the videos and pictures of the conversions, and all runs in one."""
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
    pictures.still(runs).save(OUT / "comparison.png")
    first, *others = pictures.moving([run for run in runs if run.name in (DENSE, *SHOWN)])
    first.save(OUT / "comparison.webp", save_all=True, append_images=others, duration=400, quality=85)
    summary = {"recipes": rows, "video": str(OUT / "Q4_K_M.mp4"), "host": version}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("\nvideos: dense.mp4, Q4_K_M.mp4, ...; side by side: comparison.webp (moving), comparison.png")
    print("conversion report: Q4_K_M-report.png")


if __name__ == "__main__":
    main()
