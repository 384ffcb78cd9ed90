"""The Save Quantized Model node."""

from __future__ import annotations

import os

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..ops.merged_source import merged_checkpoint
from ..quant.conversion.convert import convert
from ..quant.plan.recipe import find_recipe
from ..quant.qtype import Effort
from . import encoding
from .folders import destination, output_path, portable, written_token


class WanQuantSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantSaveModel",
            display_name="Save Quantized Model",
            category="WanQuant/convert",
            description="Merges a MODEL and its LoRAs into one quantized file. Each weight is merged in full precision"
            " and quantized once.",
            search_aliases=["merge lora", "bake lora", "gguf", "int8", "fp8", "export", "model save"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A Wan model from any loader, with or without LoRAs."),
                io.String.Input(
                    "name", default="merged.gguf", tooltip="Name of the file; the recipe chooses .gguf or .safetensors."
                ),
                encoding.recipe_input(),
                encoding.folder_input(),
                encoding.overwrite_input(),
                encoding.effort_input(),
                encoding.device_input(),
                encoding.target_size_input(),
            ],
            outputs=encoding.report_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, folder: str, recipe: str = "Q4_K_M", **_: object) -> str:
        name = encoding.with_suffix(portable(name), find_recipe(recipe).suffix)
        return written_token(os.path.join(destination(folder), name))

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        name: str,
        recipe: str,
        folder: str,
        overwrite: bool,
        effort: Effort,
        device: str,
        target_size: float = 0.0,
    ) -> io.NodeOutput:
        suffix = find_recipe(recipe).suffix
        target = output_path(destination(folder), encoding.with_suffix(portable(name), suffix), suffix)
        encoder_device = encoding.encoder_device(device)
        report = convert(
            merged_checkpoint(model, encoder_device),
            target,
            recipe,
            target_size=target_size or None,
            effort=effort,
            device=encoder_device,
            overwrite=overwrite,
            progress=encoding.progress_bar(),
        )
        return encoding.report_output(report, cls, name)
