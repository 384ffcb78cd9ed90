"""The graphs behind subgraphs/."""

from __future__ import annotations

from . import models
from .blueprint import Input, Output, blueprint
from .canvas import Box, Json, Schemas, node
from .parts import tiled_decode
from .wan22 import expert_samplers


def blueprints(schemas: Schemas) -> dict[str, Json]:
    """Return the content of every file in subgraphs/, by its name."""
    made = {"Wan 2.2 expert pair (GGUF)": _pair, "Wan 14B in 3.5 GB": _low_vram}
    return {name: make(name, schemas) for name, make in made.items()}


def _pair(name: str, schemas: Schemas) -> Json:
    high, low = (file.name for file in models.T2V_A14B)
    loaders = {
        "model": node("WanQuantExpertPairLoader", high_noise_name=high, low_noise_name=low, precision="auto"),
        "shift_high": node("ModelSamplingSD3", model=["model", 0], shift=8.0),
        "shift_low": node("ModelSamplingSD3", model=["model", 1], shift=8.0),
    }
    columns = [[Box("Models", loaders)], [expert_samplers(20, 10, 3.5)]]
    both = ("high", "sampler")
    inputs = [
        *(Input(socket, [(sampler, socket) for sampler in both]) for socket in ("positive", "negative")),
        Input("latent_image", [("high", "latent_image")]),
        Input("high_noise_name", [("model", "high_noise_name")]),
        Input("low_noise_name", [("model", "low_noise_name")]),
        Input("shift", [("shift_high", "shift"), ("shift_low", "shift")]),
        Input("noise_seed", [("high", "noise_seed")]),
        *(Input(widget, [(sampler, widget) for sampler in both]) for widget in ("steps", "cfg")),
        Input("low_noise_from_step", [("high", "end_at_step"), ("sampler", "start_at_step")]),
    ]
    description = "Samples with the high-noise expert of Wan 2.2 A14B, then with the low-noise expert."
    return blueprint(name, description, columns, inputs, [Output("LATENT", "sampler", 0)], schemas)


def _low_vram(name: str, schemas: Schemas) -> Json:
    size = {"width": 1280, "height": 720}
    models_and_memory = {
        "model": node("WanQuantLoader", model_name=models.T2V_14B.name, precision="auto"),
        "shift": node("ModelSamplingSD3", model=["model", 0], shift=5.0),
        "budget": node("WanQuantLowVRAM", model=["shift", 0], budget_gib=3.5, frames=81, **size),
        "empty": node("EmptyHunyuanLatentVideo", length=81, batch_size=1, **size),
    }
    links = {"model": ["budget", 0], "latent_image": ["empty", 0]}
    settings = {"steps": 30, "cfg": 5.0, "seed": 1, "sampler_name": "uni_pc", "scheduler": "simple", "denoise": 1.0}
    sampling = {"sampler": node("KSampler", **links, **settings), "decode": tiled_decode()}
    columns = [[Box("Models and memory", models_and_memory)], [Box("Sampling", sampling)]]
    inputs = [
        *(Input(socket, [("sampler", socket)]) for socket in ("positive", "negative")),
        Input("vae", [("decode", "vae")]),
        Input("model_name", [("model", "model_name")]),
        Input("budget_gib", [("budget", "budget_gib")]),
        *(Input(widget, [("budget", widget), ("empty", widget)]) for widget in ("width", "height")),
        Input("frames", [("budget", "frames"), ("empty", "length")]),
        Input("shift", [("shift", "shift")]),
        *(Input(widget, [("sampler", widget)]) for widget in ("seed", "steps", "cfg")),
    ]
    outputs = [Output("IMAGE", "decode", 0), Output("predicted_peak", "budget", 1)]
    description = "Samples and decodes Wan 14B text to video within a budget of video memory."
    return blueprint(name, description, columns, inputs, outputs, schemas)
