"""Counts the faults of the pack with hostile files, killed conversions and a hundred prompts; there should be none.

Mutated files of every kind are read as the pack reads them. Conversions are killed and started again. A ComfyUI server
runs prompts with a LoRA, a pair of experts, a budget, a conversion and a cancellation in turn.
"""

from __future__ import annotations

import itertools
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from wanquant.bench import harness
from wanquant.quant import QTYPES, QuantError, convert
from wanquant.quant.errors import MAX_CHARS
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.testing.comparison import TRAINED
from wanquant.testing.graphs import conversion, node, video
from wanquant.testing.hostile_files import Kind, kinds
from wanquant.testing.hosts import ROOT
from wanquant.testing.server import Graph, GraphError, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan

RESULTS = harness.RESULTS / "reliability.json"
_MIB = 1 << 20
_SETTLED = 60
"""Prompts until the memory of the server is compared with its memory at the end."""


@dataclass(frozen=True)
class Row:
    """What became of the mutated files of one kind."""

    kind: str
    tried: int
    refused: int
    accepted: int
    other_exceptions: int
    long_messages: int
    slowest_ms: float
    most_memory_mib: float
    """The growth of the process's peak memory since before the first file."""


def _loras(folder: Path) -> Kind:
    harness.import_comfyui()
    from wanquant.ops.loading.lora import read_lora

    shapes = {f"blocks.0.self_attn.q.lora_{part}.weight": (8, 32) for part in "AB"}
    specs = [TensorSpec(name, QTYPES["Q8_0"], shape) for name, shape in shapes.items()]
    with GGUFWriter(folder / "lora.gguf", {"adapter.lora.alpha": 4.0}, specs) as writer:
        for name, shape in shapes.items():
            writer.write(name, QTYPES["Q8_0"].quantize(torch.ones(shape)))
        path = writer.close()
    return Kind("LoRA", ".gguf", (path.read_bytes(),), read_lora)


def mutated(kind: Kind, tries: int, folder: Path) -> Row:
    """Read `tries` mutations of the kind's valid files."""
    path, seen, slowest = folder / f"a{kind.suffix}", Counter[str](), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in itertools.islice(kind.mutations(seed=0), tries):
        path.write_bytes(content)
        started = time.perf_counter()
        try:
            kind.read(path)
            seen["accepted"] += 1
        except QuantError as error:
            seen["refused"] += 1
            seen["long"] += len(str(error)) > MAX_CHARS or not str(error).isprintable()
        except Exception as error:  # noqa: BLE001 - counts whatever comes
            seen["other"] += 1
            print(f"{kind.name}: {error!r:.200}", file=sys.stderr)
        slowest = max(slowest, time.perf_counter() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    counts = (seen["refused"], seen["accepted"], seen["other"], seen["long"])
    return Row(kind.name, tries, *counts, round(1000 * slowest, 1), round(grown, 1))


def killed(kills: int, folder: Path) -> dict[str, int]:
    """Kill a conversion at random moments, start it again each time, and let it finish at the end."""
    source = write_tiny_wan(folder / "wan.safetensors", layers=8)
    whole = convert(source, folder / "whole.gguf").path.read_bytes()
    started = time.monotonic()
    _convert(source, folder / "timed.gguf").wait()
    duration, generator = time.monotonic() - started, random.Random(0)
    incomplete = resumed = 0
    destination = folder / "a.gguf"
    for _ in range(kills):
        process = _convert(source, destination)
        try:
            process.wait(generator.uniform(0.4, 1) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        resumed += destination.with_name(f".{destination.name}.tmp").exists()
        if destination.exists():
            incomplete += destination.read_bytes() != whole
            destination.unlink()
    _convert(source, destination).wait()
    return {
        "kills": kills,
        "left_unfinished": resumed,
        "incomplete_under_the_final_name": incomplete,
        "different_bytes_at_the_end": int(destination.read_bytes() != whole),
    }


def _convert(source: Path, destination: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "wanquant.py"), "convert", str(source), str(destination)]
    return subprocess.Popen([*command, "--recipe", "Q4_K_M"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def prompts(count: int, folder: Path) -> dict[str, Any]:
    """Run prompts of six kinds in turn on one server, and count those that end otherwise than they should."""
    cancelled, unexpected, memory = 0, 0, {}
    with HostServer(folder / "base", log=folder / "comfyui.log") as server:
        TRAINED.prepare(server)
        graphs = _graphs(server)
        process = psutil.Process(server.process.pid)
        for index in range(count):
            kind, graph = graphs[index % len(graphs)]
            sampler = next((n for n in graph.values() if n["class_type"] == "KSampler"), None)
            if sampler:
                sampler["inputs"]["seed"] = index  # otherwise the host has all results already
            expected = "cancelled" if kind == "cancelled" else "finished"
            try:
                server.run(graph, on_event=_canceller(server) if expected == "cancelled" else None)
                outcome = "finished"
            except GraphError as error:
                outcome = "cancelled" if str(error).startswith("execution_interrupted") else str(error)
            cancelled += outcome == "cancelled"
            if outcome != expected:
                unexpected += 1
                print(f"{kind}: {outcome:.500}, expected {expected}", file=sys.stderr)
            if index + 1 in (_SETTLED, count):
                memory[index + 1] = round(process.memory_info().rss / _MIB)
    return {"prompts": count, "cancelled": cancelled, "unexpected": unexpected, "rss_mib": memory}


def _graphs(server: HostServer) -> list[tuple[str, Graph]]:
    quantized = conversion("Q4_0", effort="fast", output_name="reliability.gguf", overwrite=True)
    server.run({**quantized, "show": node("PreviewAny", source=["convert", 0])})
    factors = {"lora_down": torch.randn(4, 256) / 100, "lora_up": torch.randn(256, 4) / 100}
    (server.models / "loras").mkdir(exist_ok=True)
    save_file(
        {f"diffusion_model.blocks.0.self_attn.q.{name}.weight": values for name, values in factors.items()},
        server.models / "loras" / "a.safetensors",
    )
    plain = {"model": node("WanQuantLoader", model_name="reliability.gguf", compute_dtype="default")}
    lora = {
        "base": plain["model"],
        "model": node("LoraLoaderModelOnly", model=["base", 0], lora_name="a.safetensors", strength_model=1.0),
    }
    names = {"high_noise_name": "reliability.gguf", "low_noise_name": "reliability.gguf"}
    pair = {"model": node("WanQuantExpertPairLoader", **names, compute_dtype="default")}
    budget = {
        "base": plain["model"],
        "model": node("WanQuantLowVRAM", model=["base", 0], budget_gib=1.0, width=64, height=64, frames=17),
    }
    made = {**quantized, "model": node("WanQuantLoader", model_name="", compute_dtype="default", path=["convert", 0])}
    models = {"plain": plain, "LoRA": lora, "pair": pair, "budget": budget, "conversion": made, "cancelled": plain}
    return [(kind, video(model, "reliability", size=64)) for kind, model in models.items()]


def _canceller(server: HostServer) -> Any:
    def on_event(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and event["data"].get("node") == "sampler":
            server.interrupt()

    return on_event


def main() -> None:
    parser = harness.arguments(__doc__, update=RESULTS)
    parser.add_argument("--tries", type=int, default=50_000, help="mutated files of each kind (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wanquant-reliability-") as name:
        folder = Path(name)
        for part in ("seeds", "files", "kills"):
            (folder / part).mkdir()
        every_kind = [*kinds(folder / "seeds"), _loras(folder / "seeds")]
        rows = [mutated(kind, options.tries, folder / "files") for kind in every_kind]
        result = {
            "machine": harness.machine(),
            "killed": killed(options.kills, folder / "kills") if options.kills else {},
            "server": prompts(options.prompts, folder) if options.prompts else {},
            "rows": [asdict(row) for row in rows],
        }
    cells = [list(asdict(row).values()) for row in rows]
    text = harness.table([name.replace("_", " ") for name in Row.__dataclass_fields__], cells)
    harness.conclude(options, result, f"{text}\n\n{result['killed']}\n{result['server']}")


if __name__ == "__main__":
    main()
