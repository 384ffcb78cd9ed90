"""Loads InfiniteTalk or MultiTalk in a GGUF file as the host's MODEL_PATCH, which WanInfiniteTalkToVideo takes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import comfy.model_management
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ...quant import QuantError
from ...quant.gguf.header import TensorRecord, read_header
from ...quant.sources.names import find_naming
from ...quant.units import counted
from ..host_check import check_host
from ..packed.linear import GGUFOps
from ..packed.patcher import with_packed_patches
from .by_host import built_by_host
from .diffusion_model import annotated_tensor, dequantized_bytes
from .file_mapping import change_warning, map_files
from .main_memory import check_memory

_DTYPE = torch.bfloat16
# The sizes that the host gives its own model patch; the file tells the others.
_AUDIO_FRAMES, _VAE_FRAMES = 5, 4
_CONTEXT_TOKENS = 32
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.(norm_x|audio_cross_attn)\..+")
_PROJECTION, _NORM, _ATTENTION = "audio_proj.proj1.weight", "audio_proj.norm.weight", "audio_cross_attn.proj.weight"


class TalkingPatch(torch.nn.Module):
    """The layers of InfiniteTalk, under the names and with the attributes of the host's own MultiTalkModelPatch.

    Source: comfy_extras/nodes_model_patch.py ModelPatchLoader, ComfyUI 0.30.0.
    """

    def __init__(self, dim: int, intermediate_dim: int, context_dim: int, layers: int) -> None:
        # Imported late: a host without these layers still loads everything else.
        from comfy.ldm.wan.model_multitalk import MultiTalkAudioProjModel, WanMultiTalkAttentionBlock

        super().__init__()
        self.audio_proj = MultiTalkAudioProjModel(
            seq_len=_AUDIO_FRAMES,
            seq_len_vf=_AUDIO_FRAMES + _VAE_FRAMES - 1,
            intermediate_dim=intermediate_dim,
            out_dim=context_dim,
            context_tokens=_CONTEXT_TOKENS,
            operations=GGUFOps,
        )
        blocks = (WanMultiTalkAttentionBlock(dim, context_dim, operations=GGUFOps) for _ in range(layers))
        self.blocks = torch.nn.ModuleList(blocks)


def load_model_patch(path: str | os.PathLike[str]) -> ModelPatcher:
    """Load InfiniteTalk or MultiTalk for the host; its weights stay packed until they are used.

    Args:
        path: a GGUF file; of a split one, any part.

    Raises:
        QuantError: an incompatible host, a malformed GGUF, another kind of file, missing or superfluous tensors, a
            size that does not match, or too little main memory.
    """
    check_host()
    header = read_header(path)
    prefix = find_naming(header.path, header.tensors).prefix
    records = {name.removeprefix(prefix): record for name, record in header.tensors.items()}
    layers = {int(match[1]) for name in records if (match := _BLOCK.fullmatch(name))}
    if not {_PROJECTION, _NORM, f"blocks.0.{_ATTENTION}"} <= records.keys():
        raise QuantError(
            f"{header.path}: not InfiniteTalk or MultiTalk (tensors {', '.join(list(records)[:3])}, ...); use"
            " ComfyUI's own loader for other model patches, as safetensors"
        )
    check_memory(header, dequantized_bytes(header, _DTYPE))
    with built_by_host(header.path):
        model = _built(records, len(layers))
    patcher: ModelPatcher = CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    data = map_files(header.parts, dynamic=patcher.is_dynamic())
    state_dict = {name: annotated_tensor(record, data(record), _DTYPE) for name, record in records.items()}
    with built_by_host(header.path):
        missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=patcher.is_dynamic())
    if missing or unexpected:
        found = counted(len(missing or unexpected), "tensor is", "tensors are")
        what = f"{found} missing" if missing else f"{found} unknown"
        raise QuantError(f"{header.path}: {what} ({(missing or unexpected)[0]}, ...); choose a complete file")
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, change_warning(header))
    return with_packed_patches(patcher)


def _built(records: Mapping[str, TensorRecord], layers: int) -> TalkingPatch:
    dim, intermediate_dim = records[f"blocks.0.{_ATTENTION}"].shape[0], records[_PROJECTION].shape[0]
    model = TalkingPatch(dim, intermediate_dim, records[_NORM].shape[0], layers)
    model.requires_grad_(False)
    return model.eval()
