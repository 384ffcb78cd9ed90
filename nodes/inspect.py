"""The GGUF Info node."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..quant.inspection.report import inspect
from .folders import GGUF, check_names, model_path, stat_token
from .pictures import picture_tensor, text_and_picture


class WanQuantInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantInspect",
            display_name="GGUF Info",
            category="WanQuant/convert",
            description="Shows what a GGUF file contains: types, sizes, bits per weight, and how it was made.",
            search_aliases=["inspect gguf", "model info", "metadata"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(GGUF),
                    tooltip="A .gguf file in models/diffusion_models.",
                )
            ],
            outputs=[io.String.Output(display_name="text"), io.Image.Output(display_name="plot")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return check_names((GGUF, model_name))

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None) -> str:
        return stat_token(GGUF, model_name)

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        # Only pictures need matplotlib, which takes a while to load.
        from ..quant.inspection.report_chart import draw

        report = inspect(model_path(GGUF, model_name))
        text, picture = report.text(), picture_tensor(draw(report))
        return io.NodeOutput(text, picture, ui=text_and_picture(text, picture, cls))
