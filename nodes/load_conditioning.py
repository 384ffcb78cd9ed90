"""The Load Conditioning node."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..ops.conditioning import load_conditioning
from .folders import CONDITIONING, check_names, model_path, stat_token


class WanQuantLoadConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantLoadConditioning",
            display_name="Load Conditioning",
            category="WanQuant/conditioning",
            description="Loads a prompt that Save Conditioning wrote. No text encoder is needed.",
            search_aliases=["cached prompt", "import conditioning"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list(CONDITIONING),
                    tooltip="A file in models/conditioning or output/conditioning.",
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return check_names((CONDITIONING, name))

    @classmethod
    def fingerprint_inputs(cls, name: str | None) -> str:
        return stat_token(CONDITIONING, name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(load_conditioning(model_path(CONDITIONING, name)))
