"""Graphs on TinyWan for the documentation's pictures: every node for the help pages, and the README's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wanquant.ops.conditioning import load_conditioning, save_conditioning
from wanquant.quant import QTYPES, convert, open_gguf
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.reader import GGUFTensor
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.testing.hosts import ROOT
from wanquant.testing.server import HostServer
from wanquant.workflow_generators import models
from wanquant.workflow_generators.canvas import Box, Columns, Json, Node, Schemas, node, workflow

TINYWAN = ROOT / "bench" / "tinywan"
SOURCE, QUANTIZED, PROMPT = "TinyWan.safetensors", "TinyWan-Q4_K_M.gguf", "a red ball.safetensors"
PATCH = "InfiniteTalk-Single-Q8_0.gguf"
LORA = "TinyWan-style.gguf"
# A page shows its own node, if not more.
SHOWN = {
    "WanQuantLowVRAM": ("WanQuantLowVRAM", "PreviewAny"),
    "WanQuantPreviewDecode": ("WanQuantPreviewDecode", "PreviewImage"),
}
_SIZE = {"width": 128, "height": 128}


def prepare(server: HostServer) -> None:
    """Put TinyWan, a GGUF of it, its prompt and an add-on where the graph looks for them."""
    folder = server.models / "diffusion_models"
    shutil.copy(TINYWAN / "tinywan.safetensors", folder / SOURCE)
    convert(folder / SOURCE, folder / QUANTIZED, "Q4_K_M", overwrite=True)
    with tempfile.TemporaryDirectory() as temporary:
        save_file({"audio_proj.proj1.weight": torch.zeros(32, 32)}, f"{temporary}/patch.safetensors")
        convert(f"{temporary}/patch.safetensors", folder / PATCH, "Q8_0", overwrite=True)
    _write_lora(server.models / "loras" / LORA, open_gguf(folder / QUANTIZED).tensors["blocks.0.self_attn.q.weight"])
    words = [
        load_conditioning(str(TINYWAN / "words" / f"{word}.safetensors"))[0][0] for word in ("red", "ball", "right")
    ]
    save_conditioning([[torch.cat(words, dim=1), {}]], str(server.models / "conditioning" / PROMPT))


def _write_lora(path: Path, weight: GGUFTensor) -> None:
    """Write a LoRA of rank 1 for one layer."""
    rows, columns = weight.shape
    stem = "diffusion_model.blocks.0.self_attn.q"
    shapes = {f"{stem}.lora_A.weight": (1, columns), f"{stem}.lora_B.weight": (rows, 1)}
    specs = [TensorSpec(name, QTYPES["F32"], shape) for name, shape in shapes.items()]
    path.parent.mkdir(exist_ok=True)
    with GGUFWriter(path, {"general.architecture": "wan"}, specs, overwrite=True) as writer:
        for spec in specs:
            writer.write(spec.name, torch.full(spec.shape, 0.01).view(torch.uint8))


def columns() -> Columns:
    """Every node in a box of its own or beside what shows its output, with what it needs to run."""
    high, low = (file.name for file in models.T2V_A14B)
    loaders = {
        "dense": node("UNETLoader", unet_name=SOURCE, weight_dtype="default"),
        "model": node("WanQuantLoader", model_name=QUANTIZED),
        "pair": node("WanQuantExpertPairLoader", high_noise_name=high, low_noise_name=low),
        "clip": node("WanQuantTextEncoderLoader", encoder_name=models.UMT5.name, type="wan"),
        "patch": node("WanQuantModelPatchLoader", name=PATCH),
        "prompt": node("WanQuantLoadConditioning", name=PROMPT),
        "lora": node("WanQuantLoraLoader", model=["model", 0], lora_name=LORA),
    }
    files = {
        "encode": node(
            "WanQuantTextEncode",
            encoder_name=models.UMT5.name,
            type="wan",
            positive="A red ball rolls to the right.",
            negative="blurry, still",
        ),
        "convert": node("WanQuantConvert", source=SOURCE, recipe="Q4_K_M"),
        "merged": node(
            "WanQuantSaveModel", model=["model", 0], name="TinyWan-merged.gguf", recipe="Q8_0", effort="fast"
        ),
    }
    shown = {
        "keep": node("WanQuantSaveConditioning", conditioning=["prompt", 0], name="a red ball again.safetensors"),
        "info": node("WanQuantInspect", model_name=QUANTIZED),
        "recover": node("WanQuantSaveRecoveryLora", model_name=QUANTIZED, source=SOURCE, size=0.5),
    }
    machine = {
        "check": node("WanQuantCheck"),
        "advise": node("WanQuantAdvise", vram_gib=8.0, ram_gib=32.0),
    }
    measured = {
        "collect": node("WanQuantCollectImportance", model=["dense", 0], steps="alike", blocks=0.1),
        "importance": node(
            "WanQuantSaveImportance",
            importance=["collect", 1],
            name="TinyWan.gguf",
            latent=["full", 0],
            blocks=["collect", 2],
        ),
    }
    budget = {
        "budget": node("WanQuantLowVRAM", model=["model", 0], budget_gib=0.75, frames=17, **_SIZE),
        "peak": node("PreviewAny", source=["budget", 1]),
    }
    sampled = {
        "empty": node("EmptyHunyuanLatentVideo", length=17, batch_size=1, **_SIZE),
        "full": _sampler("collect"),
        "quantized": _sampler("budget"),
    }
    compared = {"compare": node("WanQuantCompareLatents", reference=["full", 0], compared=["quantized", 0])}
    preview = {
        "decode": node("WanQuantPreviewDecode", samples=["quantized", 0]),
        "frames": node("PreviewImage", images=["decode", 0]),
    }
    tuned = {
        "tuned": node(
            "WanQuantTune", model=["dense", 0], name="TinyWan-tuned.gguf", recipe="Q4_0", blocks_path=["importance", 1]
        )
    }
    parts = (loaders, files, shown, machine, measured, sampled, compared, tuned)
    alone = [Box("", {name: item}) for part in parts for name, item in part.items()]
    return [[*alone, Box("", budget), Box("", preview)]]


def readme_graph(schemas: Schemas) -> Json:
    """Return what a new user sees: the loader swapped, and a budget between it and the sampler."""
    swapped = {
        "model": node("WanQuantLoader", model_name=models.T2V_14B.name),
        "budget": node("WanQuantLowVRAM", model=["model", 0], budget_gib=3.5),
        "sampler": node("KSampler", model=["budget", 0], seed=7, control_after_generate="fixed", steps=30, cfg=6.0),
    }
    graph = workflow("readme", [[Box("", swapped)]], schemas)
    left = 0
    for entry, width in zip(graph["nodes"], (340, 260, 260), strict=True):
        entry["pos"], entry["size"] = [left, 0], [width, 0]  # the canvas makes it as high as its widgets
        left += width + 40
    return graph


def _sampler(model: str) -> Node:
    settings: dict[str, Any] = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": [model, 0], "positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["empty", 0]}
    return node("KSampler", steps=20, cfg=1.0, seed=7, control_after_generate="fixed", **links, **settings)
