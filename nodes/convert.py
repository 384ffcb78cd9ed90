"""WanQuantConvert."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..quant import read_importance
from ..quant.convert import convert
from ..quant.qtype import Effort
from ..quant.recipe import RECIPES
from .folders import (
    IMPORTANCE,
    MODELS,
    check_names,
    destinations,
    model_path,
    output_path,
    portable,
    source_names,
    stat_token,
)
from .pictures import picture_tensor, text_and_picture

# What the search for the least error takes on an accelerator, where loaded models would leave no room for it.
_ENCODER_BYTES = 1 << 30
_NONE = "none"


class WanQuantConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantConvert",
            display_name="Convert to GGUF",
            category="WanQuant/convert",
            description="Writes a quantized copy of a Wan checkpoint, one tensor at a time. A copy that is already"
            " there and made the same way is reused.",
            search_aliases=["quantize", "gguf", "compress model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("source", options=source_names(), tooltip="A .safetensors Wan checkpoint."),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default="Q4_K_M",
                    tooltip="Size against quality: Q8_0 nearly lossless, Q4_K_M the usual choice, Q2_K the smallest.",
                ),
                io.Combo.Input(
                    "folder",
                    options=list(destinations()),
                    default=MODELS,
                    advanced=True,
                    tooltip="Where the file goes: a model folder, or output for ComfyUI's output folder.",
                ),
                io.String.Input(
                    "output_name",
                    default="",
                    tooltip="Name of the .gguf file; empty: the source's name and the recipe.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a file of that name that was made in another way."
                ),
                io.Combo.Input(
                    "effort",
                    options=["best", "fast"],
                    default="best",
                    advanced=True,
                    tooltip="best searches for the lowest error; fast is several times quicker.",
                ),
                io.Combo.Input("device", options=["default", "cpu"], default="default", advanced=True),
                io.Float.Input(
                    "target_size",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,  # graphs saved before it was added lack it
                    tooltip="GiB of the file: the types are chosen for the lowest error in that size. 0: the recipe's.",
                ),
                io.Combo.Input(
                    "importance",
                    options=[_NONE, *folder_paths.get_filename_list(IMPORTANCE)],
                    default=_NONE,
                    optional=True,
                    tooltip="An importance matrix of this model: errors go where they count least.",
                ),
                io.String.Input(
                    "importance_path",
                    optional=True,
                    force_input=True,
                    tooltip="Connect the path of Save Importance Matrix; importance is then ignored.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="Connect to the path of Load Diffusion Model (GGUF)."),
                io.Image.Output(display_name="report"),
                io.String.Output(display_name="summary"),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, source: str | None = None, importance: str | None = _NONE, importance_path: str | None = ""
    ) -> bool | str:
        found = check_names(MODELS, source)
        ignored = importance == _NONE or importance_path != ""  # a linked path is None at this point
        return found if found is not True or ignored else check_names(IMPORTANCE, importance)

    @classmethod
    def fingerprint_inputs(
        cls,
        source: str,
        recipe: str,
        folder: str,
        output_name: str,
        target_size: float = 0.0,
        importance: str = _NONE,
        **_: object,
    ) -> str:
        target = os.path.join(destinations().get(folder, folder), _name(output_name, source, recipe, target_size))
        written = os.stat(target).st_mtime_ns if os.path.exists(target) else "missing"
        return f"{stat_token(MODELS, source)} {stat_token(IMPORTANCE, importance)} {target} {written}"

    @classmethod
    def execute(
        cls,
        source: str,
        recipe: str,
        folder: str,
        output_name: str,
        overwrite: bool,
        effort: Effort,
        device: str,
        target_size: float = 0.0,
        importance: str = _NONE,
        importance_path: str = "",
    ) -> io.NodeOutput:
        source_path = model_path(MODELS, source)
        target = output_path(destinations()[folder], _name(output_name, source, recipe, target_size), ".gguf")
        if importance != _NONE:
            importance_path = importance_path or model_path(IMPORTANCE, importance)
        chosen = comfy.model_management.get_torch_device() if device == "default" else torch.device(device)
        comfy.model_management.free_memory(_ENCODER_BYTES, chosen)
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int, _name: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        report = convert(
            source_path,
            target,
            recipe,
            target_size=target_size or None,
            effort=effort,
            importance=read_importance(importance_path) if importance_path else None,
            device=chosen,
            overwrite=overwrite,
            progress=progress,
        )
        picture, summary = picture_tensor(report.image()), report.text()
        return io.NodeOutput(str(report.destination), picture, summary, ui=text_and_picture(summary, picture, cls))


def _name(output_name: str, source: str, recipe: str, target_size: float) -> str:
    """Of the file to write: the one that was typed, or the source's with what is made of it."""
    default = f"{os.path.splitext(source)[0]}-{f'{target_size:g}GiB' if target_size else recipe}.gguf"
    return portable(output_name or default)
