"""The Load Wan 2.2 Experts (GGUF) node."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..ops.budget.expert_pair import load_expert_pair
from ..quant.errors import PrintableLog
from .encoding import show_on_node
from .folders import GGUF, check_names, model_path, stat_token
from .load_diffusion_model import DTYPES, dtype_input

logger = PrintableLog(__name__)


class WanQuantExpertPairLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folder_paths.get_filename_list(GGUF)
        return io.Schema(
            node_id="WanQuantExpertPairLoader",
            display_name="Load Wan 2.2 Experts (GGUF)",
            category="WanQuant/loaders",
            description="Loads the two experts of a Wan 2.2 14B model. Only the one that is sampled is in memory.",
            search_aliases=["gguf", "wan 2.2", "high noise", "low noise", "A14B"],
            inputs=[
                io.Combo.Input("high_noise_name", options=names, tooltip="The expert for the first steps."),
                io.Combo.Input("low_noise_name", options=names, tooltip="The expert for the last steps."),
                dtype_input(),
            ],
            outputs=[io.Model.Output(display_name="high_noise"), io.Model.Output(display_name="low_noise")],
        )

    @classmethod
    def validate_inputs(cls, high_noise_name: str | None = None, low_noise_name: str | None = None) -> bool | str:
        return check_names((GGUF, high_noise_name), (GGUF, low_noise_name))

    @classmethod
    def fingerprint_inputs(cls, high_noise_name: str | None, low_noise_name: str | None, **_: object) -> str:
        return f"{stat_token(GGUF, high_noise_name)} {stat_token(GGUF, low_noise_name)}"

    @classmethod
    def execute(cls, high_noise_name: str, low_noise_name: str, compute_dtype: str) -> io.NodeOutput:
        paths = model_path(GGUF, high_noise_name), model_path(GGUF, low_noise_name)
        high, low, warning = load_expert_pair(*paths, DTYPES[compute_dtype])
        if warning:
            logger.warning("Load Wan 2.2 Experts: %s", warning)
            show_on_node(warning)
        return io.NodeOutput(high, low)
