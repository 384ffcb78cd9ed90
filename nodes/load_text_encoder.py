"""The Load Text Encoder (GGUF) node."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..ops.loading.text_encoder import load_text_encoder
from ..quant.errors import PrintableLog
from .folders import GGUF_ENCODERS, check_names, model_path, stat_token

logger = PrintableLog(__name__)

# float16 is missing because products in T5's gated layers overflow it, which makes the prompt NaN.
# Source: transformers 5.23 modeling_t5.py, which keeps T5DenseGatedActDense.wo in float32 and clamps in T5Block.
DTYPES = {"default": None, "bfloat16": torch.bfloat16}
# Wan comes first, because the pack is for it. The others use the same kind of file.
TYPES = ("wan", "sd3", "mochi", "ltxv", "pixart", "chroma")


def type_input() -> io.Combo.Input:
    return io.Combo.Input("type", options=list(TYPES), tooltip="The model that the prompt is for.")


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype",
        options=list(DTYPES),
        default="default",
        optional=True,  # because graphs saved before it was added lack it
        advanced=True,
        tooltip="Number format of the matrix products. default is float32, as in ComfyUI. bfloat16 is"
        " faster on most GPUs and needs half the working memory.",
    )


def chosen_dtype(choice: str) -> torch.dtype | None:
    """Return the dtype of an option of `dtype_input`, and warn if the host would not use it on this device."""
    device = comfy.model_management.text_encoder_device()
    if choice == "bfloat16" and not comfy.model_management.should_use_bf16(device):
        logger.warning("ComfyUI itself would not use bfloat16 on %s: compute_dtype default may be faster", device)
    return DTYPES[choice]


class WanQuantTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantTextEncoderLoader",
            display_name="Load Text Encoder (GGUF)",
            category="WanQuant/loaders",
            description="Loads a GGUF text encoder: umT5-XXL for Wan, T5-XXL for other models. Its weights stay"
            " quantized.",
            search_aliases=["gguf", "clip loader gguf", "umt5", "t5"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=folder_paths.get_filename_list(GGUF_ENCODERS),
                    tooltip="A .gguf file in models/text_encoders.",
                ),
                type_input(),
                dtype_input(),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, encoder_name: str | None = None) -> bool | str:
        return check_names((GGUF_ENCODERS, encoder_name))

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str | None, **_: object) -> str:
        return stat_token(GGUF_ENCODERS, encoder_name)

    @classmethod
    def execute(cls, encoder_name: str, type: str, compute_dtype: str = "default") -> io.NodeOutput:
        path = model_path(GGUF_ENCODERS, encoder_name)
        clip_type = comfy.sd.CLIPType[type.upper()]
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(load_text_encoder(path, clip_type, embeddings, dtype=chosen_dtype(compute_dtype)))
