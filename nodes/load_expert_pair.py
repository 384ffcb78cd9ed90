"""The Load Wan 2.2 Experts (Quantized) node."""

from __future__ import annotations

from comfy_api.latest import io

from ..ops.budget.expert_pair import load_expert_pair
from ..ops.packed.precision import EXACT
from ..quant.errors import PrintableLog
from .folders import check_names, path_token, source_folder, stat_token
from .load_diffusion_model import DTYPES, chosen_path, dtype_input, model_names, path_input, precision_input

logger = PrintableLog(__name__)


class WanQuantExpertPairLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = model_names()
        return io.Schema(
            node_id="WanQuantExpertPairLoader",
            display_name="Load Wan 2.2 Experts (Quantized)",
            category="WanQuant/loaders",
            description="Loads the two experts of a Wan 2.2 14B model. Only the one that is sampled is in memory.",
            search_aliases=["gguf", "int8", "fp8", "wan 2.2", "high noise", "low noise", "A14B"],
            inputs=[
                io.Combo.Input("high_noise_name", options=names, tooltip="The expert for the first steps."),
                io.Combo.Input("low_noise_name", options=names, tooltip="The expert for the last steps."),
                dtype_input(),
                # The inputs below are optional, because graphs saved before they were added lack them.
                path_input("high_noise_path", "high_noise_name"),
                path_input("low_noise_path", "low_noise_name"),
                precision_input(),
            ],
            outputs=[io.Model.Output(display_name="high_noise"), io.Model.Output(display_name="low_noise")],
        )

    @classmethod
    def validate_inputs(
        cls,
        high_noise_name: str | None = None,
        low_noise_name: str | None = None,
        high_noise_path: str | None = "",
        low_noise_path: str | None = "",
    ) -> bool | str:
        pairs = ((high_noise_name, high_noise_path), (low_noise_name, low_noise_path))
        # A linked path is still None here. It replaces the name, which may then be stale.
        return check_names(*((source_folder(name), name) for name, path in pairs if path == ""))

    @classmethod
    def fingerprint_inputs(
        cls,
        high_noise_name: str | None,
        low_noise_name: str | None,
        high_noise_path: str | None = "",
        low_noise_path: str | None = "",
        **_: object,
    ) -> str:
        pairs = ((high_noise_name, high_noise_path), (low_noise_name, low_noise_path))
        return " ".join(
            stat_token(source_folder(name), name) if path == "" else path_token(path) for name, path in pairs
        )

    @classmethod
    def execute(
        cls,
        high_noise_name: str,
        low_noise_name: str,
        compute_dtype: str,
        high_noise_path: str = "",
        low_noise_path: str = "",
        precision: str = EXACT,
    ) -> io.NodeOutput:
        high_file = chosen_path(high_noise_name, high_noise_path)
        low_file = chosen_path(low_noise_name, low_noise_path)
        high, low, warning = load_expert_pair(high_file, low_file, DTYPES[compute_dtype], precision)
        if warning:
            logger.warning("Load Wan 2.2 Experts: %s", warning)
        return io.NodeOutput(high, low, ui={"text": (warning,)} if warning else None)
