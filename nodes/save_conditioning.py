"""The Save Conditioning node."""

from __future__ import annotations

import os
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..ops.conditioning import save_conditioning
from .folders import CONDITIONING, output_path


class WanQuantSaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantSaveConditioning",
            display_name="Save Conditioning",
            category="WanQuant/conditioning",
            description="Writes an encoded prompt to a file, so that the text encoder is needed only once per prompt.",
            search_aliases=["cache prompt", "export conditioning"],
            is_output_node=True,
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt to save, with everything that other nodes added to it."
                ),
                io.String.Input(
                    "name",
                    default="prompt.safetensors",
                    tooltip="File name below output/conditioning. An existing file is replaced.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, conditioning: list[Any], name: str) -> io.NodeOutput:
        folder = os.path.join(folder_paths.get_output_directory(), CONDITIONING)
        path = output_path(folder, name, ".safetensors")
        save_conditioning(conditioning, path)
        return io.NodeOutput(path, ui=ui.PreviewText(f"Saved {name}"))
