"""The Load Model Patch (GGUF) node."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..ops.loading.model_patch import load_model_patch
from .folders import GGUF_PATCHES, check_names, model_path, stat_token


class WanQuantModelPatchLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantModelPatchLoader",
            display_name="Load Model Patch (GGUF)",
            category="WanQuant/loaders",
            description="Loads InfiniteTalk or MultiTalk in GGUF. Its weights stay quantized in memory.",
            search_aliases=["gguf", "infinitetalk", "multitalk", "lip sync", "model patch loader"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list(GGUF_PATCHES),
                    tooltip="A .gguf file in models/model_patches or models/diffusion_models.",
                )
            ],
            outputs=[io.ModelPatch.Output(tooltip="Connect to model_patch of WanInfiniteTalkToVideo.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return check_names((GGUF_PATCHES, name))

    @classmethod
    def fingerprint_inputs(cls, name: str | None) -> str:
        return stat_token(GGUF_PATCHES, name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(load_model_patch(model_path(GGUF_PATCHES, name)))
