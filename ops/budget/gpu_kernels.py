"""Stand-ins for GPU kernels: on meta tensors they allocate what the kernels allocate on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import host, host_products
from .causal import is_causal

_HAS_FUSED_NORMS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


@dataclass(frozen=True)
class FlashAttention:
    """An `optimized_attention_override` for ComfyUI: allocates the output and one float32 statistic per query."""

    accepts_query_chunks: bool = True
    """Lean blocks may call it with some of the queries."""
    eight_bit: bool = False
    """It also allocates copies of queries, keys and values in 8 bits, as SageAttention does."""

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
        copies = [torch.empty_like(x, dtype=torch.int8) for x in (q, k, v) if self.eight_bit]
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        del copies
        return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def use_flash_attention(model: wan.WanModel) -> None:
    """Make the parts of a meta model call `FlashAttention` where ComfyUI lets no override, and `_fold` in FFNs.

    In 0.30.0 the former are Animate's face adapter, the audio layers of S2V and WanDancer, and the blocks of a causal
    model. From 0.31 on, FFNs apply their activation within the second product.
    """
    overridden = [model.blocks, getattr(model, "vace_blocks", model.blocks)] if not is_causal(model) else []
    blocks = {part for each in overridden for part in each.modules()}
    attention = {"optimized_attention": partial(FlashAttention(), None)}
    products = {"comfy": SimpleNamespace(ops=SimpleNamespace(linear_input_act=_fold))}
    for part in model.modules():
        forward: Any = type(part).forward
        own = attention if part not in blocks and "optimized_attention" in forward.__code__.co_names else {}
        if names := products if host.folds_activations(part) else own:
            changed = FunctionType(
                forward.__code__, forward.__globals__ | names, None, forward.__defaults__, forward.__closure__
            )
            part.forward = MethodType(changed, part)


def _fold(linear: torch.nn.Module, x: Tensor, activation: str, *_args: object, **_kwargs: object) -> Tensor:
    """Multiply as on a GPU: the kernel for ComfyUI's INT8 weights applies the activation as it quantizes its input.

    Args:
        x: floating point, (..., in_features).
        activation: the host's name of it.
    """
    within = host_products.format_of(linear) == "int8_tensorwise" and host_products.multiplies_quantized(linear)
    out: Tensor = linear(x if within else host.apply_activation(x, activation))
    return out


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
