"""Graphs about the files themselves: conversion, its quality, and migration from ComfyUI-GGUF."""

from __future__ import annotations

from . import models, parts
from .canvas import Box, Columns, Schemas, node

# The nodes that the migration replaces, as declared in city96/ComfyUI-GGUF nodes.py @ 795e451.
COMFYUI_GGUF: Schemas = {
    "UnetLoaderGGUF": {
        "input": {"required": {"unet_name": ["COMBO"]}},
        "output": ["MODEL"],
        "output_name": ["MODEL"],
    },
    "CLIPLoaderGGUF": {
        "input": {"required": {"clip_name": ["COMBO"], "type": ["COMBO"]}},
        "output": ["CLIP"],
        "output_name": ["CLIP"],
    },
}


def convert_any() -> Columns:
    text = (
        "Choose any Wan checkpoint as `source`. The first node makes a file by **recipe**: Q8_0 is nearly lossless, "
        "Q4_K_M the usual choice, Q2_K the smallest. The second node makes a file of the **size** that you ask for in "
        "GiB, with the least error at that size.\n\nNo GPU is needed. An existing file with the same settings is "
        "reused, so the nodes can stay in front of a loader: connect `path` to **Load Diffusion Model (Quantized)**."
    )
    source = models.T2V_1_3B
    recipe = node("WanQuantConvert", title="Convert by recipe", models=[source], source=source.name, recipe="Q4_K_M")
    size = node(
        "WanQuantConvert",
        title="Convert to a size",
        models=[source],
        source=source.name,
        recipe="Q4_K_M",
        target_size=0.8,
    )
    save = node("SaveImage", images=["size", 1], filename_prefix="wanquant/report")
    return [
        [parts.read_me("Convert any Wan to GGUF", text, source)],
        [Box("By recipe", {"recipe": recipe})],
        [Box("By size", {"size": size})],
        [Box("Report", {"report": save})],
    ]


def quality() -> Columns:
    text = (
        "Samples the same seed with the full-precision model and with the quantized one. **Compare Latents** shows the "
        "PSNR, which frames differ, and where. Change the recipe or set a `target_size` and run again: only the nodes "
        "that this changes run."
    )
    source = models.T2V_1_3B
    full = node("UNETLoader", models=[source], unet_name=source.name, weight_dtype="default")
    quantized = {
        "convert": node("WanQuantConvert", models=[source], source=source.name, recipe="Q4_K_M"),
        "model": node("WanQuantLoader", model_name="", path=["convert", 0]),
        "shift": parts.shift(8.0),
    }
    reference = {"full": full, "shift_full": parts.shift(8.0, "full"), "clip": parts.clip(), "vae": parts.vae()}
    samplers = {
        "reference": parts.sampler(20, 6.0, 1, model=["shift_full", 0], control_after_generate="fixed"),
        "sampler": parts.sampler(20, 6.0, 1, control_after_generate="fixed"),
    }
    compare = node("WanQuantCompareLatents", reference=["reference", 0], compared=["sampler", 0])
    plot = node("SaveImage", images=["compare", 2], filename_prefix="wanquant/comparison")
    return [
        [parts.read_me("What quantization costs", text, source, models.VAE_21, models.UMT5)],
        [Box("Quantized", quantized)],
        [Box("Full precision", reference), parts.size(832, 480, 33)],
        [parts.prompt(parts.FOX)],
        [Box("The same seed", samplers)],
        [Box("Compare", {"compare": compare, "plot": plot})],
        [parts.video("quality_comparison")],
    ]


def migrate() -> Columns:
    text = (
        "This graph was made with ComfyUI-GGUF. If that pack is not installed, ComfyUI offers to replace its loaders "
        "with those of this pack: accept and run. Files and links stay as they are. If both packs are installed, both "
        "kinds of loaders work."
    )
    loaders = {
        "model": node("UnetLoaderGGUF", unet_name=models.T2V_14B.name),
        "shift": parts.shift(5.0),
        "clip": node("CLIPLoaderGGUF", clip_name=models.UMT5.name, type="wan"),
        "vae": parts.vae(),
    }
    return [
        [parts.read_me("Coming from ComfyUI-GGUF", text, models.T2V_14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), parts.size(832, 480, 33)],
        [parts.prompt(parts.FOX)],
        [Box("Sampling", {"sampler": parts.sampler(30, 6.0, 1)})],
        [parts.video("migrated")],
    ]
