"""Wan's self-attention over one group of heads at a time.

Beside the block's input it needs one buffer of the input's size for the queries, and one for the keys. The values, the
keys of recomputed groups and the intermediate tensors exist for one group or one chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from comfy.ldm.flux.math import apply_rope1
from torch import Tensor

from .. import host
from .memory_plan import MemoryPlan
from .modulation import chunks
from .weights import Projection, RowProjection, is_known_linear, is_untouched, norm_weight, projection

InputChunk = Callable[[slice], Tensor]
"""Returns the attention's input for a chunk of tokens, (batch, tokens in the chunk, dim)."""


def is_lean_attention(attn: wan.WanSelfAttention) -> bool:
    """Return whether `attn` can run lean: it is ComfyUI's own, and none of what is cut is replaced or hooked."""
    own: bool = type(attn) is wan.WanSelfAttention and attn.qk_norm and is_untouched(attn)
    return own and is_untouched(attn.norm_k) and is_known_linear(attn.k) and is_known_linear(attn.v)


@dataclass
class LeanAttention:
    """`WanSelfAttention.forward` up to, but without, the output projection.

    Softmax needs the keys of all tokens, but only those of one head. So the heads run in groups, and the output of a
    group is written over its queries. The RMS norm of a key is over all heads. So a first pass computes all keys and
    their norms, and keeps the keys of the groups that are not recomputed.
    """

    attn: wan.WanSelfAttention
    input_chunk: InputChunk
    freqs: Tensor
    """Rotary embedding, (1, tokens, 1, head size / 2, 2, 2)."""
    like: Tensor
    """The block's input, (batch, tokens, dim). The output has its shape, dtype and device."""
    plan: MemoryPlan
    options: dict[str, Any]
    """ComfyUI's transformer_options."""

    def __post_init__(self) -> None:
        self.batch, self.tokens, self.dim = self.like.shape
        self.width = self.dim // self.plan.head_groups
        self.chunks = list(chunks(self.tokens, self.plan.token_chunk))

    def output(self) -> Tensor:
        """Return the output of the attention, (batch, tokens, dim), contiguous, in the dtype of the input."""
        output = self.rotated(self.attn.q, self.attn.norm_q, self._empty(self.dim))
        kept_keys, inverse_rms = self._first_pass()
        values = RowProjection(self.attn.v, self.like, self.inputs)
        for start in range(0, self.dim, self.width):
            features = slice(start, start + self.width)
            if kept_keys:
                k, v = kept_keys.pop(0), self.values(values.features(features), self._empty(self.width))
            else:
                k, v = self._keys_and_values(features, values.features(features), inverse_rms)
            self.attend(output[..., features], k, v)
            del k, v  # before the next group's are computed
        return output

    def rotated(self, layer: torch.nn.Module, norm: torch.nn.Module, out: Tensor) -> Tensor:
        """Write queries or keys of all heads to `out`, (batch, tokens, dim), of the input's dtype, and return it."""
        project = projection(layer, self.like, self.inputs)
        for chunk in self.chunks:
            out[:, chunk] = self._rotated(norm(project(self.input_chunk(chunk))), chunk)
        return out

    def _first_pass(self) -> tuple[list[Tensor], Tensor]:
        """Compute all keys, and return those to keep and the inverse RMS of all.

        Returns:
            The keys of the first groups, each (batch, tokens, width), and 1 / RMS of each token's keys over all heads,
            float32, (batch, tokens, 1).
        """
        project, norm = projection(self.attn.k, self.like, self.inputs), self.attn.norm_k
        kept = [self._empty(self.width) for _ in range(self.plan.head_groups - self.plan.recomputed_groups)]
        inverse_rms = self.like.new_empty(self.batch, self.tokens, 1, dtype=torch.float32)
        for chunk in self.chunks:
            raw = project(self.input_chunk(chunk))
            length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True, dtype=torch.float32)
            inverse_rms[:, chunk] = torch.rsqrt(length.square() / self.dim + norm.eps)
            keys = self._rotated(norm(raw)[..., : len(kept) * self.width], chunk)
            for group, part in zip(kept, keys.chunk(len(kept), dim=-1), strict=True):
                group[:, chunk] = part
        return kept, inverse_rms

    def values(self, value: Projection, out: Tensor) -> Tensor:
        """Write values of some heads to `out`, (batch, tokens, their channels), of the input's dtype, and return it."""
        for chunk in self.chunks:
            out[:, chunk] = value(self.input_chunk(chunk))
        return out

    def _keys_and_values(self, features: slice, value: Projection, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._empty(self.width), self._empty(self.width)
        key = self._key_rows.features(features)
        weight = norm_weight(self.attn.norm_k, self.like)[features]
        for chunk in self.chunks:
            x = self.input_chunk(chunk)
            v[:, chunk] = value(x)
            k[:, chunk] = self._rotated((key(x) * inverse_rms[:, chunk] * weight).to(x.dtype), chunk)
        return k, v

    @cached_property
    def _key_rows(self) -> RowProjection:
        return RowProjection(self.attn.k, self.like, self.inputs)

    def inputs(self) -> Iterator[Tensor]:
        """Yield the inputs of all chunks, each (batch, tokens in the chunk, dim), in the dtype of `like`."""
        return (self.input_chunk(chunk) for chunk in self.chunks)

    def _needs_all_queries(self) -> bool:
        """Return whether the attention function may treat a chunk of the queries differently from all of them."""
        override = self.options.get("optimized_attention_override")
        # Another node's override may depend on the position of a token, unless it declares that it does not.
        by_position = override is not None and not getattr(override, "accepts_query_chunks", False)
        return by_position or host.prefers_attention(self.attn)

    def _rotated(self, x: Tensor, chunk: slice) -> Tensor:
        """Apply the rotary embedding to (batch, tokens in the chunk, some heads * head size)."""
        heads = x.view(*x.shape[:2], -1, self.attn.head_dim)
        rotated: Tensor = apply_rope1(heads, self.freqs[:, chunk]).flatten(2)
        return rotated

    def _empty(self, width: int) -> Tensor:
        return self.like.new_empty(self.batch, self.tokens, width)

    def attend(self, queries: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the attention's output for some heads over their queries.

        Args:
            queries: in the dtype of the input, (batch, tokens, channels of these heads); `k` and `v` likewise.
        """
        heads, at_once = queries.shape[2] // self.attn.head_dim, self._needs_all_queries()
        options = host.attention_options(self.attn) | {"transformer_options": self.options}
        # As many queries as have an output of the size of one chunk of all heads. A GPU needs many to be busy.
        at_a_time = self.plan.token_chunk * self.plan.head_groups
        for chunk in [slice(None)] if at_once else chunks(self.tokens, at_a_time):
            queries[:, chunk] = wan.optimized_attention(queries[:, chunk], k, v, heads=heads, **options)
