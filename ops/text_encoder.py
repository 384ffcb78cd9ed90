"""GGUF text encoder (umT5, T5) -> the host's CLIP."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..quant import QuantError
from ..quant.gguf_header import Header, read_header
from ..quant.sentencepiece import sentencepiece_model
from ..quant.sources.t5 import transformers_name
from .linear import GGUFOps
from .loader import host_tensor
from .mapping import map_files, watch
from .patcher import with_packed_patches

_EMBEDDING = "shared.weight"
_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"


def load_text_encoder(
    path: str | os.PathLike[str],
    clip_type: comfy.sd.CLIPType,
    embedding_directory: list[str] | None = None,
    *,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """Load a T5 text encoder for the host; weights stay packed, and of the embedding only a prompt's rows are decoded.

    Args:
        clip_type: the model family that the prompt is for, which decides on tokenizer and padding.
        disable_dynamic: the host asks for its legacy memory mode (torch.compile, hooks).

    Raises:
        QuantError: not a well-formed GGUF, or not a T5 encoder with its tokenizer.
    """
    header = read_header(path)
    data = map_files(header.parts)
    state_dict = {
        transformers_name(record.name): host_tensor(record, data(record), torch.bfloat16)
        for record in header.tensors.values()
    }
    if _QUERY not in state_dict or _EMBEDDING not in state_dict:
        architecture = header.metadata.get("general.architecture", "not given")
        raise QuantError(
            f"{header.path}: not a T5 text encoder (general.architecture {architecture}); choose umt5-xxl for Wan"
        )
    options = {"custom_operations": GGUFOps, "umt5xxl_model_config": _config(state_dict)}
    if clip_type is comfy.sd.CLIPType.WAN:  # the host has the tokenizer of the other models itself
        state_dict["spiece_model"] = _tokenizer(header)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [state_dict], embedding_directory, clip_type, options, disable_dynamic=disable_dynamic
    )
    clip.patcher = with_packed_patches(clip.patcher)
    clip.patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, watch(header))
    clip.patcher.cached_patcher_init = (partial(_load_patcher, path, clip_type, embedding_directory), ())
    return clip


def _load_patcher(*args: Any, disable_dynamic: bool = False) -> ModelPatcher:  # noqa: ANN401
    return load_text_encoder(*args, disable_dynamic=disable_dynamic).patcher


def _config(state_dict: dict[str, Tensor]) -> dict[str, int]:
    """The sizes that the host otherwise takes for granted to be umt5-xxl's."""
    vocabulary, width = state_dict[_EMBEDDING].shape
    heads = next(t.shape[1] for name, t in state_dict.items() if name.endswith("relative_attention_bias.weight"))
    blocks = {match[1] for name in state_dict if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_heads": heads,
        "d_kv": state_dict[_QUERY].shape[0] // heads,
        "num_layers": len(blocks),
    }


def _tokenizer(header: Header) -> Tensor:
    try:
        return torch.frombuffer(bytearray(sentencepiece_model(header.metadata)), dtype=torch.uint8)
    except QuantError as error:
        raise QuantError(f"{header.path}: {error}") from None
