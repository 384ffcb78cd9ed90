"""The Collect Importance Matrix node."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..ops.collect_importance import with_collector
from ..ops.tuning.capture_blocks import with_capture
from ..quant.statistics.calibration import CalibrationCollector
from ..quant.statistics.importance import Collector
from ..quant.tuning.capture import Capture
from ..quant.units import GIB

ImportanceIO = io.Custom("WANQUANT_IMPORTANCE")
BlocksIO = io.Custom("WANQUANT_BLOCKS")

_EQUAL, _BY_STEP_SIZE = "alike", "by size"


class WanQuantCollectImportance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantCollectImportance",
            display_name="Collect Importance Matrix",
            category="WanQuant/convert",
            description="Measures how large the inputs of every layer are while the MODEL samples. A conversion with"
            " this importance matrix makes its errors where they matter least.",
            search_aliases=["imatrix", "calibration", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The model to convert, in any precision. A GGUF also works."),
                io.Combo.Input(
                    "steps",
                    options=[_EQUAL, _BY_STEP_SIZE],
                    default=_EQUAL,
                    advanced=True,
                    tooltip="The weight of each step: alike, or by size (the square of the noise that it removes).",
                ),
                io.Boolean.Input(
                    "calibrate",
                    default=False,
                    optional=True,
                    tooltip="Also measure how the inputs correlate, for rounding that compensates for its own errors."
                    " The file of a 14B model has 2.1 GiB.",
                ),
                io.Float.Input(
                    "blocks",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Also keep the inputs of the first block, for Tune to GGUF, in a file of at most this many"
                    " GiB. 0 keeps none.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="Sample with this MODEL. It gives the same results."),
                ImportanceIO.Output(display_name="importance", tooltip="Connect to Save Importance Matrix."),
                BlocksIO.Output(display_name="blocks", tooltip="Connect to blocks of Save Importance Matrix."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, steps: str, calibrate: bool = False, blocks: float = 0.0) -> io.NodeOutput:
        collector, capture = CalibrationCollector() if calibrate else Collector(), None
        if blocks:
            folder = Path(folder_paths.get_temp_directory())
            folder.mkdir(parents=True, exist_ok=True)
            capture = Capture(folder, int(blocks * GIB))
            model = with_capture(model, capture)
        observed = with_collector(model, collector, by_step_size=steps == _BY_STEP_SIZE)
        return io.NodeOutput(observed, collector, capture)
