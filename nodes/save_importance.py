"""The Save Importance Matrix node."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io, ui

from ..quant import write_calibration, write_importance
from ..quant.statistics.calibration import Calibration
from ..quant.statistics.importance import Collector
from .collect_importance import ImportanceIO
from .folders import IMPORTANCE, output_path, without_suffix


class WanQuantSaveImportance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantSaveImportance",
            display_name="Save Importance Matrix",
            category="WanQuant/convert",
            description="Writes what Collect Importance Matrix has measured to a file for Convert to GGUF. The file has"
            " llama.cpp's layout, or is a calibration (.safetensors) if calibrate is on.",
            search_aliases=["imatrix", "export imatrix"],
            is_output_node=True,
            inputs=[
                ImportanceIO.Input("importance", tooltip="The output of Collect Importance Matrix."),
                io.String.Input(
                    "name",
                    default="importance.gguf",
                    tooltip="File name below output/importance. An existing file is replaced.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The result of the sampler, so that saving waits for it. Disconnect it to save what an"
                    " interrupted run has measured.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Connect to importance_path of Convert to GGUF.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")  # never equal: the collector holds more after each run

    @classmethod
    def execute(cls, importance: Collector, name: str, latent: object = None) -> io.NodeOutput:
        collected, folder = importance.result(), os.path.join(folder_paths.get_output_directory(), IMPORTANCE)
        if isinstance(collected, Calibration):
            name = without_suffix(name) + ".safetensors"
            written = str(write_calibration(output_path(folder, name, ".safetensors"), collected, overwrite=True))
        else:
            written = str(write_importance(output_path(folder, name, ".gguf"), collected, overwrite=True))
        text = f"{len(collected)} layers over {collected.samples} evaluations of the model"
        if importance.unseen:
            text += f"; {len(importance.unseen)} layers received no input, first {importance.unseen[0]}"
        return io.NodeOutput(written, ui=ui.PreviewText(f"Saved {name}: {text}"))
