"""The Save Importance Matrix node."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io, ui

from ..quant import write_calibration, write_importance
from ..quant.statistics.calibration import Calibration
from ..quant.statistics.importance import Collector
from ..quant.tuning.capture import Capture
from ..quant.units import counted
from .collect_importance import BlocksIO, ImportanceIO
from .folders import BLOCKS_SUFFIX, IMPORTANCE, output_path, without_suffix


class WanQuantSaveImportance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantSaveImportance",
            display_name="Save Importance Matrix",
            category="WanQuant/convert",
            description="Writes what Collect Importance Matrix has measured to a file for Convert to Quantized Model."
            " The file has llama.cpp's layout, or is a calibration (.safetensors) if calibrate is on.",
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
                BlocksIO.Input(
                    "blocks",
                    optional=True,
                    tooltip="The blocks of Collect Importance Matrix, which get a file of their own for Tune to GGUF.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="path", tooltip="Connect to importance_path of Convert to Quantized Model."
                ),
                io.String.Output(
                    display_name="blocks_path", tooltip="Connect to blocks_path of Tune to GGUF. Empty without blocks."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")  # never equal: the collector holds more after each run

    @classmethod
    def execute(
        cls, importance: Collector, name: str, latent: object = None, blocks: Capture | None = None
    ) -> io.NodeOutput:
        collected, folder = importance.result(), os.path.join(folder_paths.get_output_directory(), IMPORTANCE)
        if isinstance(collected, Calibration):
            name = without_suffix(name) + ".safetensors"
            written = str(write_calibration(output_path(folder, name, ".safetensors"), collected, overwrite=True))
        else:
            written = str(write_importance(output_path(folder, name, ".gguf"), collected, overwrite=True))
        text = f"{counted(len(collected), 'layer')} over {counted(collected.samples, 'evaluation')} of the model"
        if importance.unseen:
            text += f"; {counted(len(importance.unseen), 'layer')} received no input, first {importance.unseen[0]}"
        text, blocks_path = f"Saved {name}: {text}", ""
        if blocks is not None:
            blocks_name = without_suffix(name) + BLOCKS_SUFFIX
            path = output_path(folder, blocks_name, BLOCKS_SUFFIX)
            blocks_path = str(blocks.write(path, overwrite=True))
            text += f". Saved {blocks_name}: {len(blocks)} of {counted(blocks.seen, 'evaluation')}"
        return io.NodeOutput(written, blocks_path, ui=ui.PreviewText(text))
