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
        "Choose any Wan checkpoint as `source`, in each node that you run. The first makes a GGUF by **recipe**: Q8_0"
        " is nearly lossless, Q4_K_M usual, Q2_K small. The second makes one of a **size** in GiB. The third makes a"
        " **format of ComfyUI's own**, which multiplies in 8 or 4 bits; its tooltip says what your ComfyUI can use.\n\n"
        "Converting needs no GPU. An existing file is reused: connect `path` to **Load Diffusion Model (Quantized)**."
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


def convert_for_speed() -> Columns:
    text = (
        "INT8 multiplies in 8-bit integers: faster than 16 bits on RTX 20 to 50, in half the bytes. It needs ComfyUI"
        " 0.27. **W4A8** halves the bytes again, on RTX 30 to 50, and needs ComfyUI 0.31.\n\nChoose your checkpoint as"
        " `source`. It is converted on the first run, and later runs reuse the file. Settings: shift 8, 30 steps,"
        " cfg 6. At 832 x 480 and 81 frames, sampling needs 2.4 GiB of VRAM (simulated)."
    )
    source = models.T2V_1_3B
    loaders = {"model": parts.converted_loader(), "shift": parts.shift(8.0), "vae": parts.vae()}
    return [
        [parts.read_me("Convert for speed (INT8)", text, source, models.VAE_21, models.UMT5)],
        [Box("Convert once", {"convert": parts.convert(source, "INT8")})],
        [Box("Models", loaders), parts.size(832, 480, 33)],
        [parts.prompt_encoded_once(parts.FOX)],
        [Box("Sampling", {"sampler": parts.sampler(30, 6.0, 1, **parts.ENCODED_ONCE)})],
        [parts.video("wan2.1_t2v_1.3B_int8")],
    ]


def calibrate() -> Columns:
    text = (
        "For files below 4 bits. Samples once with the full-precision model, measures the inputs of its layers, and"
        " makes two GGUFs of one size: **Convert** rounds for these inputs, **Tune** also for the errors of earlier"
        " blocks (slower, experimental). Use your own prompt, LoRAs and steps; more runs measure more.\n\n"
        "At 832 x 480 and 81 frames, sampling needs 2.4 GiB of VRAM (simulated), and the file of the blocks 2 GiB of"
        " disk."
    )
    source = models.T2V_1_3B
    collect = node("WanQuantCollectImportance", model=["full", 0], calibrate=True, blocks=2.0)
    loaders = {
        "full": node("UNETLoader", models=[source], unet_name=source.name, weight_dtype="default"),
        "collect": collect,
        "shift": parts.shift(8.0, "collect"),
    }
    save = node(
        "WanQuantSaveImportance",
        importance=["collect", 1],
        name="wan2.1_t2v_1.3B",
        latent=["sampler", 0],
        blocks=["collect", 2],
    )
    convert = parts.convert(source, "Q3_K_M", importance_path=["save", 0], name="wan2.1_t2v_1.3B-calibrated.gguf")
    tune = node(
        "WanQuantTune", model=["full", 0], blocks_path=["save", 1], recipe="Q3_K_M", name="wan2.1_t2v_1.3B-tuned.gguf"
    )
    return [
        [parts.read_me("Calibrate and tune", text, source, models.UMT5)],
        [Box("Measure", loaders), parts.size(832, 480, 33)],
        [parts.prompt_encoded_once(parts.FOX)],
        [Box("Sampling", {"sampler": parts.sampler(20, 6.0, 1, **parts.ENCODED_ONCE)}), Box("Save", {"save": save})],
        [Box("Convert with the calibration", {"convert": convert})],
        [Box("Or tune", {"tune": tune})],
        [
            Box(
                "Reports",
                {
                    f"report_{made}": node("SaveImage", images=[made, 1], filename_prefix=f"wanquant/{made}")
                    for made in ("convert", "tune")
                },
            )
        ],
    ]


def quality() -> Columns:
    text = (
        "Samples the same seed with the full-precision model, with a GGUF, and with a file in a format of ComfyUI's "
        "own. **Compare Latents** shows the PSNR, which frames differ, and where. Change a recipe and run again: only "
        "the nodes that this changes run.\n\nINT8 needs ComfyUI 0.27, and its result depends on the GPU. At 832 x 480 "
        "and 81 frames, sampling needs 2.4 GiB of VRAM (simulated)."
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
        "kinds of loaders work.\n\nAt 832 x 480 and 81 frames, sampling needs 4.2 GiB of VRAM (simulated)."
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
