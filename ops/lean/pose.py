"""Animate 2's blocks in pieces: those of the video attend to the keys and values of the video of poses, frame by frame.

ComfyUI calls methods of their own, each for all tokens: `forward_pose` for the poses, which returns keys and values,
`kv_from_input` where its cache has the inputs of the former, and `forward_gen` for the video. What it hands from one to
the other stays whole: the keys and values of the poses, and buffers for keys, values and output of the video.

Source: comfy/ldm/wan/model_animate2.py, ComfyUI 0.33.0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import Tensor

from .. import host
from .attention import InputChunk, LeanAttention
from .block import LeanBlock, owned
from .memory_plan import MemoryPlan
from .modulation import Modulation
from .weights import Projection, is_untouched, projection

Options = dict[str, Any]
Pair = tuple[Tensor, Tensor]
"""Keys and values, each (batch, tokens, dim) or (batch, tokens, heads, head size)."""
Buffers = tuple[Tensor, Tensor, Tensor]
"""Room for keys and values, each (batch, tokens and those of a frame, heads, head size), and (batch, tokens, dim)."""

_MODULE = "comfy.ldm.wan.model_animate2"
_BLOCK, _ATTENTION = "WanAnimate2Block", "WanAnimate2SelfAttention"
# The arguments of the methods that are replaced. A newer ComfyUI with others runs its own.
_ARGUMENTS = {
    "forward_pose": ("x", "e", "freqs", "context", "context_img_len", "transformer_options"),
    "kv_from_input": ("x_pose", "e", "freqs", "transformer_options"),
    "forward_gen": (
        *("x", "e", "freqs", "context", "k_pose", "v_pose", "f_gen", "hw", "buffers", "ref_strength"),
        *("context_img_len", "transformer_options"),
    ),
}


def is_pose_block(block: torch.nn.Module) -> bool:
    """Return whether `block` is ComfyUI's block for Animate 2, as it is known here, and not replaced or hooked."""
    attn: Any = getattr(block, "self_attn", block)
    own: bool = _is_own(block, _BLOCK) and _is_own(attn, _ATTENTION) and attn.qk_norm
    return own and all(_arguments(block, name) == arguments for name, arguments in _ARGUMENTS.items())


def _is_own(module: torch.nn.Module, name: str) -> bool:
    """Return whether a module is of this class of ComfyUI, found by its name, and runs the methods of its class."""
    named = (type(module).__module__, type(module).__qualname__) == (_MODULE, name)
    return named and is_untouched(module) and not _ARGUMENTS.keys() & vars(module).keys()


def _arguments(block: torch.nn.Module, method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(block, method)).parameters)


def pose_methods(model: wan.WanModel, plan: MemoryPlan) -> host.Methods:
    """Return methods in pieces for the blocks of Animate 2; other models have none."""
    methods: dict[str, Callable[..., Any]] = {
        "forward_pose": _forward_pose,
        "kv_from_input": _keys_and_values,
        "forward_gen": _forward_video,
    }
    return {
        block: {name: partial(method, block, plan) for name, method in methods.items()}
        for block in model.blocks
        if is_pose_block(block)
    }


@dataclass
class _PoseBlock(LeanBlock):
    """A lean block with an attention of its own."""

    attend: Callable[[LeanAttention], Tensor]
    """Returns the attention's output before its projection, (batch, tokens, dim)."""

    def _attended(self, input_chunk: InputChunk, freqs: Tensor, x: Tensor) -> tuple[Tensor, Projection]:
        attn = self.block.self_attn
        y = self.attend(LeanAttention(attn, input_chunk, freqs, x, self.plan, self.options))
        return y, projection(attn.o, x, lambda: (y[:, chunk] for chunk in self._chunks(x)))


def _forward_pose(
    block: wan.WanAttentionBlock,
    plan: MemoryPlan,
    x: Tensor,
    e: Tensor,
    freqs: Tensor,
    context: Tensor,
    context_img_len: int | None = 257,
    transformer_options: Options | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A lean `WanAnimate2Block.forward_pose`; the arguments are those of `LeanBlock`.

    Returns:
        The block's output, like `x`, and the keys and values, each (batch, tokens, heads, head size).
    """
    options = transformer_options or {}
    if _sees_whole_attention(options):
        out: tuple[Tensor, Tensor, Tensor] = type(block).forward_pose(
            block, x, e, freqs, context, context_img_len, options
        )
        return out
    keys, values = (x.new_empty(x.shape) for _ in range(2))

    def attend(attention: LeanAttention) -> Tensor:
        _write_keys_and_values(attention, keys, values)
        return _plain(attention, keys, values)

    x = _PoseBlock(block, plan, context_img_len, options, attend)(owned(x, options), e, freqs, context)
    return x, _by_head(block, keys), _by_head(block, values)


def _keys_and_values(
    block: wan.WanAttentionBlock,
    plan: MemoryPlan,
    x_pose: Tensor,
    e: Tensor,
    freqs: Tensor,
    transformer_options: Options | None = None,
) -> Pair:
    """A lean `WanAnimate2Block.kv_from_input`; the arguments are those of `LeanBlock`."""
    modulation = Modulation.from_module(block, e if e.ndim == 4 else e.unsqueeze(1), x_pose)
    keys, values = (x_pose.new_empty(x_pose.shape) for _ in range(2))

    def input_chunk(chunk: slice) -> Tensor:
        return modulation.shift_and_scale(block.norm1(x_pose[:, chunk]), 0, chunk)

    attention = LeanAttention(block.self_attn, input_chunk, freqs, x_pose, plan, transformer_options or {})
    _write_keys_and_values(attention, keys, values)
    return _by_head(block, keys), _by_head(block, values)


def _forward_video(
    block: wan.WanAttentionBlock,
    plan: MemoryPlan,
    x: Tensor,
    e: Tensor,
    freqs: Tensor,
    context: Tensor,
    k_pose: Tensor | None,
    v_pose: Tensor | None,
    f_gen: int,
    hw: int,
    buffers: Buffers | None,
    ref_strength: float = 1.0,
    context_img_len: int | None = 257,
    transformer_options: Options | None = None,
) -> Tensor:
    """A lean `WanAnimate2Block.forward_gen`; arguments and result are those of `LeanBlock`.

    Args:
        k_pose: keys of the poses, (batch, tokens of all frames but the first, heads, head size), or None for none.
        v_pose: values, like `k_pose`.
        f_gen: the number of frames. The first is the picture of the character.
        hw: the number of tokens of a frame.
        buffers: None without poses.
        ref_strength: what the values of the first frame are multiplied with.
    """
    options = transformer_options or {}
    if _sees_whole_attention(options):
        out: Tensor = type(block).forward_gen(
            block, x, e, freqs, context, k_pose, v_pose, f_gen, hw, buffers, ref_strength, context_img_len, options
        )
        return out

    def attend(attention: LeanAttention) -> Tensor:
        keys, values = _room(x, buffers)
        _write_keys_and_values(attention, keys[:, : x.shape[1]], values[:, : x.shape[1]])
        if ref_strength != 1:
            values[:, :hw] *= ref_strength
        if k_pose is None or v_pose is None or buffers is None:
            return _plain(attention, keys, values)
        return _by_frame(attention, (keys, values), (k_pose.flatten(2), v_pose.flatten(2)), buffers[2], hw)

    return _PoseBlock(block, plan, context_img_len, options, attend)(owned(x, options), e, freqs, context)


def _room(x: Tensor, buffers: Buffers | None) -> Pair:
    """Return room for keys and values, each (batch, tokens or more, dim)."""
    keys, values = (part.flatten(2) for part in buffers[:2]) if buffers else (x.new_empty(x.shape) for _ in range(2))
    return keys, values


def _write_keys_and_values(attention: LeanAttention, keys: Tensor, values: Tensor) -> None:
    """Write the keys and values of all tokens and heads, each (batch, tokens, dim)."""
    attn = attention.attn
    attention.rotated(attn.k, attn.norm_k, keys)
    attention.values(projection(attn.v, attention.like, attention.inputs), [values])


def _plain(attention: LeanAttention, keys: Tensor, values: Tensor) -> Tensor:
    """Return the output of attention to these keys and values, each (batch, tokens, dim), in its shape."""
    attn = attention.attn
    output = attention.rotated(attn.q, attn.norm_q, torch.empty_like(keys))
    attention.attend(output, keys, values)
    return output


def _by_frame(attention: LeanAttention, own: Pair, pose: Pair, output: Tensor, tokens: int) -> Tensor:
    """Return the output of attention of each frame to all frames, and to its own frame of the poses.

    Args:
        own: keys and values of the video with room for a frame, each (batch, all tokens and those of a frame, dim).
        pose: keys and values of the poses, each (batch, all tokens but those of a frame, dim).
        output: written to and returned, (batch, all tokens, dim).
        tokens: of a frame.
    """
    attn, count = attention.attn, output.shape[1]
    attention.rotated(attn.q, attn.norm_q, output)
    options = host.attention_options(attn) | {"heads": attn.num_heads, "transformer_options": attention.options}
    for start in range(0, count, tokens):
        frame, stop = output[:, start : start + tokens], count
        if start:  # The first has no poses.
            stop += tokens
            for whole, part in zip(own, pose, strict=True):
                whole[:, count:] = part[:, start - tokens : start]
        frame.copy_(wan.optimized_attention(frame, *(whole[:, :stop] for whole in own), **options))
    return output


def _sees_whole_attention(options: Options) -> bool:
    """Return whether another node's patch gets the queries and keys of all tokens."""
    return bool(options.get("patches", {}).get("attn1_patch"))


def _by_head(block: wan.WanAttentionBlock, x: Tensor) -> Tensor:
    """Return (batch, tokens, dim) as (batch, tokens, heads, head size)."""
    return x.view(*x.shape[:2], block.num_heads, -1)
