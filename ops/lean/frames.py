"""Attention of a frame's tokens to the sound or the face of that frame, for a few frames at a time.

ComfyUI computes these parts for all tokens at once, which needs several times the memory of the tokens. Tokens attend
to nothing of another frame, so a few frames give what all of them give. The weights are prepared once for all frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from comfy.ldm.wan.model_animate import FaceBlock
from torch import Tensor

from .. import host
from .block import LeanBlock, owned
from .memory_plan import MemoryPlan
from .weights import Projection, is_known_linear, is_untouched, projection

_INJECTORS = ("audio_injector", "music_injector")

_AUDIO_TOKENS = 16
"""Tokens of sound for each frame. Source: comfy/ldm/wan/model.py WanT2VCrossAttentionGather, ComfyUI 0.30.0."""


def frame_forwards(model: wan.WanModel, plan: MemoryPlan) -> host.Forwards:
    """Return forwards for the parts of `model` that attend to sound or faces, and for blocks that contain such parts.

    S2V and WanDancer inject sound between blocks, Animate faces. HuMo's blocks attend to sound themselves.
    """
    injectors = [getattr(model, name, None) for name in _INJECTORS]
    faces = getattr(getattr(model, "face_adapter", None), "fuser_blocks", ())
    kinds: tuple[tuple[Any, type[torch.nn.Module], Callable[..., Tensor]], ...] = (
        (injectors, wan.AudioInjector_WAN, _inject),
        (faces, FaceBlock, _add_faces),
        (model.blocks, wan.WanAttentionBlockAudio, _audio_block),
    )
    return {
        part: partial(forward, part, part.forward, plan)
        for parts, kind, forward in kinds
        for part in parts
        if type(part) is kind and is_untouched(part)
    }


def _inject(
    injector: wan.AudioInjector_WAN,
    forward: Callable[..., Tensor],
    plan: MemoryPlan,
    x: Tensor,
    block_id: int,
    audio_emb: Tensor,
    audio_emb_global: Tensor | None,
    seq_len: int,
    scale: float = 1.0,
) -> Tensor:
    """Add what the tokens of the video hear to `x`, in place, as `AudioInjector_WAN.forward` does after some blocks.

    Args:
        forward: the injector's own.
        x: floating point, (batch, tokens, dim).
        audio_emb: sound, (batch, frames, dim) or (batch, frames, tokens, dim).
        audio_emb_global: sound that shifts and scales the tokens, (batch, frames, tokens, dim), or None.
        seq_len: the number of tokens of the video, which come first.
    """
    index = injector.injected_block_id.get(block_id)
    if index is None:
        return x
    video, attn = x[:, :seq_len], injector.injector[index]
    inputs = {attn.q: video, attn.k: audio_emb, attn.v: audio_emb, attn.o: video}
    if audio_emb_global is not None and injector.enable_adain:
        inputs[injector.injector_adain_layers[index].linear] = audio_emb_global[:, :, 0]
    with _held(inputs):
        for tokens, frames in _frames(seq_len, audio_emb.shape[1], plan):
            part, sound = video[:, tokens], audio_emb[:, frames]
            shared = None if audio_emb_global is None else audio_emb_global[:, frames]
            forward(part, block_id, sound, shared, part.shape[1], scale)
    return x


def _add_faces(
    face: FaceBlock,
    forward: Callable[..., Tensor],
    plan: MemoryPlan,
    x: Tensor,
    motion_vec: Tensor,
    motion_mask: Tensor | None = None,
) -> Tensor:
    """Return what `FaceBlock.forward` adds to the tokens, in the shape and dtype of `x`.

    Args:
        forward: the block's own.
        x: floating point, (batch, tokens, dim).
        motion_vec: faces, (batch, frames, tokens, dim).
        motion_mask: (batch, frames, rows, columns), or None.
    """
    out = torch.empty_like(x)
    with _held({face.linear1_q: x, face.linear1_kv: motion_vec, face.linear2: x}):
        for tokens, frames in _frames(x.shape[1], motion_vec.shape[1], plan):
            mask = None if motion_mask is None else motion_mask[:, frames]
            out[:, tokens] = forward(x[:, tokens], motion_vec[:, frames], mask)
    return out


def _audio_block(
    block: wan.WanAttentionBlockAudio,
    _: Callable[..., Tensor],
    plan: MemoryPlan,
    x: Tensor,
    e: Tensor,
    freqs: Tensor,
    context: Tensor,
    context_img_len: int | None = 257,
    audio: Tensor | None = None,
    transformer_options: dict[str, Any] | None = None,
) -> Tensor:
    """A lean `WanAttentionBlockAudio.forward`; arguments and result are those of `LeanBlock`.

    Args:
        audio: sound, (batch, frames * 16, channels), or None.
    """
    options = transformer_options or {}
    x = owned(x, options)
    return _AudioBlock(block, plan, context_img_len, options, audio)(x, e, freqs, context)


@dataclass
class _AudioBlock(LeanBlock):
    """A lean block that attends to sound after its cross-attention, where ComfyUI's calls no patch."""

    audio: Tensor | None
    """(batch, frames * 16, channels)."""

    def _after_cross_attention(self, x: Tensor) -> Tensor:
        """Add what the tokens hear to them, (batch, tokens, dim), in place, and return them."""
        audio, wrapper = self.audio, self.block.audio_cross_attn_wrapper
        if audio is None:
            return x
        attn, sounds = wrapper.audio_cross_attn, audio.view(len(audio), -1, _AUDIO_TOKENS, audio.shape[2])
        with _held({attn.q: x, attn.k: audio, attn.v: audio, attn.o: x}):
            for tokens, frames in _frames(x.shape[1], sounds.shape[1], self.plan):
                sound = sounds[:, frames].flatten(1, 2)
                x[:, tokens] = wrapper(x[:, tokens], sound, transformer_options=self.options)
        return x


def _frames(tokens: int, frames: int, plan: MemoryPlan) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the tokens and of their frames, about `plan.chunk_without_keys` tokens at a time."""
    if tokens % frames:
        yield slice(None), slice(None)  # ComfyUI's own forward refuses them
        return
    each = tokens // frames
    step = max(1, plan.chunk_without_keys // each)
    for start in range(0, frames, step):
        stop = min(start + step, frames)
        yield slice(start * each, stop * each), slice(start, stop)


@contextmanager
def _held(inputs: Mapping[torch.nn.Module, Tensor]) -> Iterator[None]:
    """While open, multiply with weights of known Linears that are prepared once, as for all tokens of these inputs."""
    known = {layer: like for layer, like in inputs.items() if is_known_linear(layer)}
    with host.in_place({layer: partial(_multiply, layer, projection(layer, like)) for layer, like in known.items()}):
        yield


def _multiply(layer: torch.nn.Module, project: Projection, x: Tensor, **more: object) -> Tensor:
    """Multiply x, or run the layer's own forward if a newer ComfyUI passes it more than x."""
    out: Tensor = type(layer).forward(layer, x, **more) if more else project(x)
    return out
