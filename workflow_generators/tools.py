"""Graphs about the files themselves: conversion, its quality, and migration from ComfyUI-GGUF."""

from __future__ import annotations

from . import models, parts
from .canvas import Box, Columns, Model, Node, Schemas, node, note

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


def check() -> Columns:
    text = (
        "# Check the installation\n\nPress **Run**. A tiny Wan with random weights is made in a temporary folder,"
        " converted, loaded, sampled and compared, in seconds. Nothing is downloaded.\n\nThe text says which code runs"
        " on this machine, which memory mode ComfyUI uses, and what is missing for more speed. A line that begins with"
        " FAILED says what to do.\n"
    )
    return [[note(text)], [Box("Check", {"check": node("WanQuantCheck")})]]


def convert_any() -> Columns:
    text = (
        "Choose any Wan checkpoint as `source`, in each node that you run. The first node makes a GGUF, a small file "
        "for any GPU, by **recipe**: Q8_0 is nearly lossless, Q4_K_M the usual choice, Q2_K the smallest. The second "
        "makes one of the **size** that you ask for in GiB, with the least error at that size. The third makes a "
        "`.safetensors` in a **format of ComfyUI's own**, which multiplies in 8 or 4 bits:\n\n"
        "- RTX 20 to 50: INT8 and INT4; from RTX 30 on also W4A8 and W6A8\n"
        "- RTX 40 and 50: FP8; on RTX 50 also NVFP4 and MXFP8\n\n"
        "Some need a newer ComfyUI: the tooltip of `recipe` names those that yours cannot use.\n\n"
        "No GPU is needed to convert. An existing file with the same settings is reused, so the nodes can stay in "
        "front of a loader: connect `path` to **Load Diffusion Model (Quantized)**, whatever the recipe. A node that "
        "you do not need can be bypassed with Ctrl+B."
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
    native = node(
        "WanQuantConvert",
        title="Convert to ComfyUI's own format",
        models=[source],
        source=source.name,
        recipe="INT8",
    )
    save = node("SaveImage", images=["size", 1], filename_prefix="wanquant/report")
    return [
        [parts.read_me("Convert any Wan", text, source)],
        [Box("GGUF by recipe", {"recipe": recipe})],
        [Box("GGUF by size", {"size": size})],
        [Box("ComfyUI's own format", {"native": native})],
        [Box("Report of the second", {"report": save})],
    ]


def quality() -> Columns:
    text = (
        "Samples the same seed with the full-precision model, with a GGUF, and with a file in a format of ComfyUI's "
        "own. **Compare Latents** shows the PSNR, which frames differ, and where. Change a recipe or set a "
        "`target_size` and run again: only the nodes that this changes run.\n\nINT8 needs ComfyUI 0.27. On a GPU, "
        "ComfyUI's own formats quantize the inputs of layers too, so their result depends on the GPU."
    )
    source = models.T2V_1_3B
    full = node("UNETLoader", models=[source], unet_name=source.name, weight_dtype="default")
    reference = {"full": full, "shift_full": parts.shift(8.0, "full"), "clip": parts.clip(), "vae": parts.vae()}
    samplers = {
        "reference": parts.sampler(20, 6.0, 1, model=["shift_full", 0], control_after_generate="fixed"),
        "sampler": parts.sampler(20, 6.0, 1, control_after_generate="fixed"),
        "sampler_native": parts.sampler(20, 6.0, 1, model=["shift_native", 0], control_after_generate="fixed"),
    }
    return [
        [parts.read_me("What quantization costs", text, source, models.VAE_21, models.UMT5)],
        [Box("GGUF", _converted(source, "Q4_K_M", ""))],
        [Box("ComfyUI's own format", _converted(source, "INT8", "_native"))],
        [Box("Full precision", reference), parts.size(832, 480, 33)],
        [parts.prompt(parts.FOX)],
        [Box("The same seed", samplers)],
        [Box("GGUF compared", _compared("sampler", ""))],
        [Box("ComfyUI's own format compared", _compared("sampler_native", "_native"))],
        [parts.video("quality_comparison")],
    ]


def _converted(source: Model, recipe: str, suffix: str) -> dict[str, Node]:
    """Return the nodes from a checkpoint to a quantized model, with a suffix to their ids."""
    return {
        f"convert{suffix}": node("WanQuantConvert", models=[source], source=source.name, recipe=recipe),
        f"model{suffix}": node("WanQuantLoader", model_name="", path=[f"convert{suffix}", 0]),
        f"shift{suffix}": parts.shift(8.0, f"model{suffix}"),
    }


def _compared(sampler: str, suffix: str) -> dict[str, Node]:
    """Return the comparison of a sampler with the reference, and the picture of it, with a suffix to their ids."""
    return {
        f"compare{suffix}": node("WanQuantCompareLatents", reference=["reference", 0], compared=[sampler, 0]),
        f"plot{suffix}": node("SaveImage", images=[f"compare{suffix}", 2], filename_prefix="wanquant/comparison"),
    }


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
