"""Loads a text encoder (umT5, T5) in a GGUF file as a CLIP of the host."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...quant import QuantError
from ...quant.files.sentencepiece import has_tokenizer
from ...quant.gguf.header import Header, TensorRecord, read_header
from ...quant.sources.completeness import check_complete
from ...quant.sources.names import T5, WAN_KEY
from ...quant.sources.t5 import (
    check_tokenizer,
    encoder_names,
    is_tokenizer,
    tokenizer,
    transformers_name,
)
from .. import host
from ..host_check import check_host
from ..packed.linear import GGUFOps, computing_in
from ..packed.patcher import with_packed_patches
from .by_host import built_by_host
from .diffusion_model import annotated_tensor, dequantized_bytes
from .file_mapping import change_warning, map_files
from .main_memory import check_memory

_EMBEDDING = "shared.weight"
_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_FFN = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"


def load_text_encoder(
    path: str | os.PathLike[str],
    clip_type: comfy.sd.CLIPType,
    embedding_directory: list[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """Load a T5 text encoder for the host; its weights stay packed until they are used.

    Only those rows of the embedding that a prompt needs are dequantized.

    Args:
        path: a GGUF file; of a split one, any part.
        clip_type: the model family that the prompt is for, which decides on tokenizer and padding.
        embedding_directory: folders of textual inversion embeddings.
        dtype: the dtype of matrix products, float32 if None. All other operations use float32.
        disable_dynamic: load for the host's legacy memory mode, which it needs for torch.compile and hooks.

    Raises:
        QuantError: an incompatible host, a malformed GGUF, a file that is not a T5-XXL encoder or is for another model
            family, a missing tensor or tokenizer, or too little main memory.
    """
    check_host()
    header = read_header(path)
    in_file = encoder_names(header.tensors)
    names = {transformers_name(new): header.tensors[old] for new, old in in_file.items()}
    _check(header, names.keys(), clip_type)
    check_complete(header.path, in_file, T5)
    check_memory(header, dequantized_bytes(header, torch.bfloat16))
    data = map_files(header.parts, dynamic=not disable_dynamic)
    state_dict = {name: annotated_tensor(record, data(record), torch.bfloat16) for name, record in names.items()}
    options = {
        "custom_operations": computing_in(dtype) if dtype else GGUFOps,
        "umt5xxl_model_config": _config(header.path, state_dict),
    }
    if clip_type is comfy.sd.CLIPType.WAN:  # The host brings the tokenizers of other models.
        state_dict["spiece_model"] = host.annotate_source(
            _tokenizer(header, data, len(state_dict[_EMBEDDING])), header.path
        )
    if comfy.sd.detect_te_model(state_dict) is not comfy.sd.TEModel.T5_XXL:
        raise QuantError(f"{header.path}: a T5 text encoder of another size, expected XXL; choose umt5-xxl for Wan")
    with built_by_host(header.path):
        clip = comfy.sd.load_text_encoder_state_dicts(
            [state_dict], embedding_directory, clip_type, options, disable_dynamic=disable_dynamic
        )
    clip.patcher = with_packed_patches(clip.patcher)
    clip.patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, change_warning(header))
    host.remember_loader(clip.patcher, partial(_load_patcher, path, clip_type, embedding_directory, dtype=dtype))
    return clip


def _load_patcher(*args: Any, **options: Any) -> ModelPatcher:  # noqa: ANN401
    return load_text_encoder(*args, **options).patcher


def _check(header: Header, names: Collection[str], clip_type: comfy.sd.CLIPType) -> None:
    """Raise QuantError for files that the host would load as another model, or with weights missing."""
    if _EMBEDDING not in names or _QUERY not in names:
        architecture = header.metadata.get("general.architecture", "not given")
        diffusion = any(name.endswith(WAN_KEY) for name in header.tensors)
        remedy = "load it with Load Diffusion Model (Quantized)" if diffusion else "choose umt5-xxl for Wan"
        raise QuantError(f"{header.path}: not a T5 text encoder (general.architecture {architecture}); {remedy}")
    check_family(header.path, names, clip_type)


def check_family(path: Path, names: Collection[str], clip_type: comfy.sd.CLIPType) -> None:
    """Refuse a T5 where umT5 is needed, the reverse, and any other text encoder.

    Args:
        path: the file, for the message.
        names: the names of its tensors, which the host knows.
        clip_type: the model family that the prompt is for.

    Raises:
        QuantError: the encoder is one for another model family.
    """
    if _QUERY not in names:
        raise QuantError(f"{path}: not a T5 text encoder under ComfyUI's names; choose umt5-xxl for Wan")
    biases = sum(name.endswith("relative_attention_bias.weight") for name in names)
    # umT5 has one in every block, T5 has one for all blocks.
    is_umt5, wants_umt5 = biases == _blocks(names), clip_type is comfy.sd.CLIPType.WAN
    if is_umt5 and not wants_umt5:
        raise QuantError(f"{path}: umT5, the text encoder of Wan; choose type wan")
    if wants_umt5 and not is_umt5:
        raise QuantError(f"{path}: T5, but Wan's text encoder is umT5; choose umt5-xxl, or the type that the T5 is for")


def _blocks(names: Collection[str]) -> int:
    return len({match[1] for name in names if (match := re.match(r"encoder\.block\.(\d{1,9})\.", name))})


def _config(path: Path, state_dict: dict[str, Tensor]) -> dict[str, int]:
    """Return the sizes of the encoder; without them the host assumes those of umt5-xxl."""
    biases = next(name for name in state_dict if name.endswith("relative_attention_bias.weight"))
    for name in (_EMBEDDING, _QUERY, _FFN, biases):
        if state_dict[name].ndim != 2:
            raise QuantError(
                f"{path}: tensor {name}: shape {tuple(state_dict[name].shape)}, expected 2 dimensions;"
                " download or convert the text encoder again"
            )
    vocabulary, width = state_dict[_EMBEDDING].shape
    heads = state_dict[biases].shape[1]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_heads": heads,
        "d_kv": state_dict[_QUERY].shape[0] // heads,
        "d_ff": state_dict[_FFN].shape[0],
        "num_layers": _blocks(state_dict),
    }


def _tokenizer(header: Header, data: Callable[[TensorRecord], Tensor], n_rows: int) -> Tensor:
    """Return the sentencepiece model as the host takes it: uint8, (bytes,)."""
    record = next((record for name, record in header.tensors.items() if is_tokenizer(name)), None)
    stored = (record.qtype.name, data(record).flatten()) if record else None
    model = tokenizer(header.path, header.metadata, stored)
    if not has_tokenizer(header.metadata):  # Then it can be that of another encoder.
        check_tokenizer(header.path, model, n_rows)
    return torch.frombuffer(bytearray(model), dtype=torch.uint8)
