"""The graphs behind subgraphs/."""

from __future__ import annotations

from . import models
from .blueprint import Input, Output, blueprint
from .canvas import Box, Json, Schemas, node
from .wan import expert_samplers


def blueprints(schemas: Schemas) -> dict[str, Json]:
    """File name in subgraphs/ -> its content."""
    name = "Wan 2.2 expert pair (GGUF)"
    return {name: _pair(name, schemas)}


def _pair(name: str, schemas: Schemas) -> Json:
    high, low = (file.name for file in models.T2V_A14B)
    loaders = {
        "model": node("WanQuantExpertPairLoader", high_noise_name=high, low_noise_name=low),
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
    description = "Samples with the high-noise expert of Wan 2.2 A14B, then with the low-noise one."
    return blueprint(name, description, columns, inputs, [Output("LATENT", "sampler", 0)], schemas)
