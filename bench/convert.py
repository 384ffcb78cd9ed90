"""Convert a checkpoint of true Wan 1.3B shapes: speed and peak memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from ..quant.wan import wan_shapes
from ..tests.tiny_wan import write_random_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """Processor, cores, threads, system and torch in one line."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if info.exists() and names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{processor}, {os.cpu_count()} cores, {threads} threads, {platform.system()}, torch {torch.__version__}"


def resident(pid: int) -> dict[str, int]:
    """Bytes of anonymous memory and of all resident pages of a process (Linux)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM") if key in fields}


def convert(source: Path, recipe: str, effort: str) -> dict[str, object]:
    destination = source.with_name(f"{source.stem}-{recipe}.gguf")
    command = [sys.executable, "-m", "quant", "convert", str(source), str(destination)]
    command += ["--recipe", recipe, "--effort", effort, "--overwrite", "--json"]
    destination.unlink(missing_ok=True)
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
        raise SystemExit(f"conversion failed with exit code {process.returncode}")
    return {
        "recipe": recipe,
        "effort": effort,
        "source_gib": round(source.stat().st_size / 2**30, 3),
        "gib": round(destination.stat().st_size / 2**30, 3),
        "seconds": round(seconds, 1),
        "peak_anonymous_gib": round(peak_anonymous / 2**30, 3),
        "peak_resident_gib": round(peak_resident / 2**30, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--size", default="1.3B", help="1.3B, 5B or 14B")
    parser.add_argument("--recipes", nargs="+", default=["Q8_0", "Q4_K_M"])
    parser.add_argument("--effort", default="fast", choices=["fast", "best"])
    options = parser.parse_args()
    source = ROOT / "out" / "bench" / f"wan-{options.size}.safetensors"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(source, wan_shapes(options.size))
    rows = [convert(source, recipe, options.effort) for recipe in options.recipes]
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=2))
        return
    print(f"{machine()}; peak memory in GiB")
    print(f"{'recipe':8} {'effort':6} {'GiB in':>7} {'GiB out':>8} {'seconds':>8} {'anonymous':>10} {'resident':>9}")
    for row in rows:
        print(
            f"{row['recipe']:8} {row['effort']:6} {row['source_gib']:7} {row['gib']:8} {row['seconds']:8}"
            f" {row['peak_anonymous_gib']:10} {row['peak_resident_gib']:9}"
        )


if __name__ == "__main__":
    main()
