"""The Load LoRA (GGUF) node."""

from __future__ import annotations

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..ops.loading.lora import load_lora
from .folders import GGUF_LORAS, check_names, model_path, stat_token


class WanQuantLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantLoraLoader",
            display_name="Load LoRA (GGUF)",
            category="WanQuant/loaders",
            description="Adds a LoRA in a GGUF file to a model. ComfyUI's own LoRA nodes load safetensors only.",
            search_aliases=["gguf", "lora gguf", "lora loader", "load lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA is for, from any loader."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list(GGUF_LORAS),
                    tooltip="A .gguf file in models/loras.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the model. It may be negative.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return check_names((GGUF_LORAS, lora_name))

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "", **_: object) -> str:
        return stat_token(GGUF_LORAS, lora_name)

    @classmethod
    def execute(cls, model: ModelPatcher, lora_name: str, strength_model: float) -> io.NodeOutput:
        return io.NodeOutput(load_lora(model, model_path(GGUF_LORAS, lora_name), strength_model))
