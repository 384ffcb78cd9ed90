"""The Tune to GGUF node."""

from __future__ import annotations

import os

import comfy.model_management
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..ops.tuning.tune_model import tune_model
from ..quant import QuantError
from ..quant.qtype import Effort
from ..quant.tuning.tune import TuneSettings
from . import encoding
from .folders import (
    BLOCKS_SUFFIX,
    IMPORTANCE,
    NONE,
    check_names,
    destination,
    model_path,
    output_path,
    path_token,
    portable,
    read_path,
    stat_token,
    written_token,
)


class WanQuantTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        captured = [name for name in folder_paths.get_filename_list(IMPORTANCE) if name.endswith(BLOCKS_SUFFIX)]
        return io.Schema(
            node_id="WanQuantTune",
            display_name="Tune to GGUF",
            category="WanQuant/convert",
            description="Quantizes a Wan MODEL block by block, each layer for the inputs that the quantized layers"
            " before it give. It takes longer than Convert to Quantized Model, and makes a file of the same size."
            " Experimental.",
            search_aliases=["quantization-aware tuning", "fine-tune gguf", "sequential rounding"],
            is_output_node=True,
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The full-precision model that was captured, with or without LoRAs."),
                io.Combo.Input(
                    "blocks",
                    options=[NONE, *captured],
                    default=NONE,
                    tooltip="What Collect Importance Matrix kept of the blocks, as Save Importance Matrix wrote it.",
                ),
                io.String.Input("name", default="tuned.gguf", tooltip="Name of the .gguf file."),
                encoding.recipe_input(native=False),
                encoding.folder_input(),
                encoding.overwrite_input(),
                encoding.effort_input(),
                encoding.device_input("the blocks run and are quantized"),
                io.String.Input(
                    "blocks_path",
                    optional=True,
                    force_input=True,
                    tooltip="Connect blocks_path of Save Importance Matrix. The blocks input is then ignored.",
                ),
            ],
            outputs=encoding.report_outputs(),
        )

    @classmethod
    def validate_inputs(cls, blocks: str | None = NONE, blocks_path: str | None = "") -> bool | str:
        if blocks == NONE or blocks_path != "":  # a linked path is still None here
            return True
        return check_names((IMPORTANCE, blocks))

    @classmethod
    def fingerprint_inputs(
        cls, name: str, folder: str, blocks: str = NONE, blocks_path: str | None = "", **_: object
    ) -> str:
        target = os.path.join(destination(folder), portable(name))
        read = path_token(blocks_path) if blocks_path != "" else stat_token(IMPORTANCE, blocks)
        return f"{read} {written_token(target)}"

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        blocks: str,
        name: str,
        recipe: str,
        folder: str,
        overwrite: bool,
        effort: Effort,
        device: str,
        blocks_path: str = "",
    ) -> io.NodeOutput:
        target = output_path(destination(folder), name, ".gguf")
        if not blocks_path and blocks == NONE:
            raise QuantError(
                "Tune to GGUF: has no blocks, expected a file of Save Importance Matrix; sample with Collect Importance"
                " Matrix and its input blocks, and connect blocks_path"
            )
        capture = read_path(blocks_path, BLOCKS_SUFFIX) if blocks_path else model_path(IMPORTANCE, blocks)
        comfy.model_management.unload_all_models()
        settings = TuneSettings(effort, encoding.encoder_device(device), overwrite, encoding.progress_bar())
        return encoding.report_output(tune_model(model, capture, target, recipe, settings), cls)
