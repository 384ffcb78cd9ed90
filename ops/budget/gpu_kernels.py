"""Stand-ins for GPU kernels: on meta tensors they allocate what the kernels allocate on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import host
from .causal import is_causal

_HAS_FUSED_NORMS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


class FlashAttention:
    """An `optimized_attention_override` for ComfyUI: allocates the output and one float32 statistic per query.

    Args:
        accepts_query_chunks: whether lean blocks may call it with some of the queries.
        eight_bit: also allocate copies of queries, keys and values in 8 bits, as SageAttention does.
    """

    def __init__(self, *, accepts_query_chunks: bool = True, eight_bit: bool = False) -> None:
        self.accepts_query_chunks, self._eight_bit = accepts_query_chunks, eight_bit

    def __call__(
        self,
        _: object,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        *_args: object,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **_kwargs: object,
    ) -> Tensor:
        """Return the output of attention, without its values, in the dtype of `q`.

        Args:
            q: (batch, tokens, heads * head size), or (batch, heads, tokens, head size) with `skip_reshape`; `k` and
                `v` likewise.
            skip_output_reshape: return (batch, heads, tokens, head size), not (batch, tokens, heads * head size).
        """
        q, k, v = host.uncontained(q, k, v)
        if not skip_reshape:
            size = q.shape[2] // heads
            q, k, v = (x.reshape(len(x), -1, heads, size).transpose(1, 2) for x in (q, k, v))
        copies = [torch.empty_like(x, dtype=torch.int8) for x in (q, k, v) if self._eight_bit]
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        del copies
        return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def use_flash_attention(model: wan.WanModel) -> None:
    """Make the parts of a meta model that ComfyUI does not let override attention call `FlashAttention`.

    In 0.30.0 these are Animate's face adapter, the audio layers of S2V and WanDancer, and the blocks of a causal model.
    """
    overridden = [model.blocks, getattr(model, "vace_blocks", model.blocks)] if not is_causal(model) else []
    blocks = {part for each in overridden for part in each.modules()}
    attention = partial(FlashAttention(), None)
    for part in model.modules():
        forward: Any = type(part).forward
        if part not in blocks and "optimized_attention" in forward.__code__.co_names:
            names = forward.__globals__ | {"optimized_attention": attention}
            part.forward = MethodType(FunctionType(forward.__code__, names, None, forward.__defaults__), part)


class FusedNorms(TorchFunctionMode):
    """Replaces torch's RMS norm, which is several operations on meta tensors but one kernel on GPUs.

    Source: aten/src/ATen/native/layer_norm.cpp rms_norm_symint, torch 2.9.0, the first version with a CUDA kernel.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is not torch.nn.functional.rms_norm or not _HAS_FUSED_NORMS:
            return func(*args, **(kwargs or {}))
        x: Tensor = args[0]
        output, scales = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        del scales
        return output
