"""WanQuantLoader."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from ..ops.loader import load_diffusion_model
from .folders import GGUF, check_names, model_path, stat_token

DTYPES = {"default": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype",
        options=list(DTYPES),
        default="default",
        advanced=True,
        tooltip="Number format of the arithmetic. default lets ComfyUI choose for your GPU.",
    )


class WanQuantLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantLoader",
            display_name="Load Diffusion Model (GGUF)",
            category="WanQuant/loaders",
            description="Loads a GGUF diffusion model; its weights stay quantized in memory.",
            search_aliases=["gguf", "unet loader gguf", "load wan", "quantized"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(GGUF),
                    tooltip="A .gguf file in models/diffusion_models.",
                ),
                dtype_input(),
                io.String.Input(
                    "path",
                    optional=True,
                    force_input=True,
                    tooltip="Connect the path of Convert to GGUF to load what it wrote; model_name is then ignored.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None, path: str | None = "") -> bool | str:
        # A linked path, None at this point, makes a stale name irrelevant.
        return path != "" or check_names(GGUF, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str = "", path: str | None = "", **_: object) -> str:
        return path or stat_token(GGUF, model_name)

    @classmethod
    def execute(cls, model_name: str, compute_dtype: str, path: str = "") -> io.NodeOutput:
        path = path or model_path(GGUF, model_name)
        return io.NodeOutput(load_diffusion_model(path, dtype=DTYPES[compute_dtype]))
