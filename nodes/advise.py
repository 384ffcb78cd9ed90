"""The Fits My Machine node."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io, ui

from ..ops.budget.advise import advise
from ..ops.budget.published import PUBLISHED


class WanQuantAdvise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantAdvise",
            display_name="Fits My Machine",
            category="WanQuant/memory",
            description="Says which file to use for each Wan model on this machine, with which budget, and the"
            " predicted peak of memory. Nothing is run or downloaded.",
            search_aliases=["which quant", "which gguf", "vram calculator", "recommend", "requirements", "fit"],
            is_output_node=True,
            inputs=[
                io.Float.Input(
                    "vram_gib",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Video memory of the GPU in GiB; 0 is this machine's.",
                ),
                io.Float.Input(
                    "ram_gib",
                    default=0.0,
                    min=0.0,
                    max=65536.0,
                    step=1.0,
                    tooltip="Main memory in GiB; 0 is this machine's.",
                ),
            ],
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, vram_gib: float, ram_gib: float) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(len(PUBLISHED))
        report = advise(vram_gib, ram_gib, done=lambda: bar.update(1))
        return io.NodeOutput(report.text(), ui=ui.PreviewText(report.lines()))
