"""WanQuantCollectImportance."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..ops.collect_importance import with_collector
from ..quant.statistics.calibration import CalibrationCollector
from ..quant.statistics.importance import Collector

ImportanceIO = io.Custom("WANQUANT_IMPORTANCE")

_ALIKE, _BY_SIZE = "alike", "by size"


class WanQuantCollectImportance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantCollectImportance",
            display_name="Collect Importance Matrix",
            category="WanQuant/convert",
            description="While the MODEL samples, measures how large the inputs of every layer are. A conversion with"
            " this importance matrix puts its errors where they count least.",
            search_aliases=["imatrix", "calibration", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The model to be converted, in any precision; a GGUF serves too."),
                io.Combo.Input(
                    "steps",
                    options=[_ALIKE, _BY_SIZE],
                    default=_ALIKE,
                    advanced=True,
                    tooltip="How much each sampling step counts: all alike, or by the square of the noise it removes.",
                ),
                io.Boolean.Input(
                    "calibrate",
                    default=False,
                    optional=True,
                    tooltip="Measure also how the inputs go together, for rounding that makes up for its own errors."
                    " The file has 1.5 GiB for a 14B model.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="Sample with this one. The results are the same."),
                ImportanceIO.Output(display_name="importance", tooltip="Connect to Save Importance Matrix."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, steps: str, calibrate: bool = False) -> io.NodeOutput:
        collector = CalibrationCollector() if calibrate else Collector()
        return io.NodeOutput(with_collector(model, collector, by_step_size=steps == _BY_SIZE), collector)
