"""Prompt graphs in ComfyUI's API format: convert, load, sample, decode, save."""

from __future__ import annotations

from typing import Any

from wanquant.testing.server import Graph

SOURCE = "wan.safetensors"
"""The checkpoint's name in models/diffusion_models."""
PROMPT = "prompt.safetensors"
"""The saved conditioning's name in models/conditioning."""
STEPS = 8


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """Return a node; an input that is a list [id, slot] is a link."""
    return {"class_type": class_type, "inputs": inputs}


def dense_model() -> Graph:
    """Return ComfyUI's own loader of the unquantized checkpoint; node `model` outputs MODEL."""
    return {"model": node("UNETLoader", unet_name=SOURCE, weight_dtype="default")}


def conversion(recipe: str, **inputs: Any) -> Graph:
    """Return the node `convert` alone."""
    defaults = {
        "source": SOURCE,
        "folder": "diffusion_models",
        "output_name": "",
        "overwrite": False,
        "effort": "best",
        "device": "cpu",
    }
    return {"convert": node("WanQuantConvert", **{**defaults, "recipe": recipe, **inputs})}


def quantized_model(recipe: str) -> Graph:
    """Return a conversion and a loader of its result; node `model` outputs MODEL, node `report` saves the report."""
    loader = node("WanQuantLoader", model_name="", compute_dtype="default", path=["convert", 0])
    report = node("SaveImage", images=["convert", 1], filename_prefix=f"{recipe}-report")
    return {**conversion(recipe), "model": loader, "report": report}


def video(model: Graph, name: str, size: int = 256) -> Graph:
    """Sample 17 square frames of `size` pixels with a fixed seed and cfg 1, and save all results as `name`."""
    sampler = node(
        "KSampler",
        model=["model", 0],
        positive=["prompt", 0],
        negative=["prompt", 0],
        latent_image=["empty", 0],
        seed=7,
        steps=STEPS,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return {
        **model,
        "prompt": node("WanQuantLoadConditioning", name=PROMPT),
        "empty": node("EmptyHunyuanLatentVideo", width=size, height=size, length=17, batch_size=1),
        "sampler": sampler,
        "latent": node("SaveLatent", samples=["sampler", 0], filename_prefix=name),
        "decode": node("WanQuantPreviewDecode", samples=["sampler", 0]),
        "frames": node("SaveImage", images=["decode", 0], filename_prefix=name),
        "clip": node("CreateVideo", images=["decode", 0], fps=4.0),
        "video": node("SaveVideo", video=["clip", 0], filename_prefix=name, format="mp4", codec="h264"),
    }
