"""The Encode Prompt (cached) node."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..ops.conditioning_cache import ConditioningCache
from ..ops.encode_prompts import TextEncoder, encode_prompts
from ..ops.loading.native_text_encoder import SUFFIX
from .folders import ENCODERS, GGUF_ENCODERS, check_names, files_of, model_path, stat_token
from .load_text_encoder import chosen_dtype, dtype_input, type_input


def _encoder_names() -> list[str]:
    native = (name for name in folder_paths.get_filename_list(ENCODERS) if name.lower().endswith(SUFFIX))
    return [*folder_paths.get_filename_list(GGUF_ENCODERS), *native]


def _folder(encoder_name: str | None) -> str:
    is_native = isinstance(encoder_name, str) and encoder_name.lower().endswith(SUFFIX)
    return ENCODERS if is_native else GGUF_ENCODERS


def _cache() -> ConditioningCache:
    # ComfyUI serves no files from folders of its user folder whose names begin so.
    return ConditioningCache(Path(folder_paths.get_system_user_directory("wanquant")) / "prompts")


class WanQuantTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantTextEncode",
            display_name="Encode Prompt (cached)",
            category="WanQuant/conditioning",
            description="Encodes a prompt once. The text encoder is loaded only for a text that is new, and unloaded"
            " again, so that an unchanged prompt needs no text encoder, even after a restart.",
            search_aliases=["clip text encode", "cache prompt", "umt5", "text encoder gguf", "prompt"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=_encoder_names(),
                    tooltip="A .gguf or .safetensors file in models/text_encoders: umt5-xxl for Wan.",
                ),
                type_input(),
                io.String.Input(
                    "positive", multiline=True, dynamic_prompts=True, tooltip="What the video should show."
                ),
                io.String.Input(
                    "negative", multiline=True, dynamic_prompts=True, tooltip="What the video should not show."
                ),
                dtype_input(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler's input of the same name."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler's input of the same name."),
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder_name: str | None = None) -> bool | str:
        return check_names((_folder(encoder_name), encoder_name))

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str | None, **_: object) -> str:
        return stat_token(_folder(encoder_name), encoder_name)

    @classmethod
    def execute(
        cls, encoder_name: str, type: str, positive: str, negative: str, compute_dtype: str = "default"
    ) -> io.NodeOutput:
        path = model_path(_folder(encoder_name), encoder_name)
        encoder = TextEncoder(
            os.path.abspath(path),
            files_of(path),
            type.upper(),
            chosen_dtype(compute_dtype),
            tuple(folder_paths.get_folder_paths("embeddings")),
        )
        return io.NodeOutput(*encode_prompts(encoder, (positive, negative), _cache()))
