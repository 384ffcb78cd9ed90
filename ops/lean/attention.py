"""Self-attention of a Wan block in little more than one buffer of the size of its input, beside the input."""

from __future__ import annotations

from collections.abc import Callable
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
from .weights import Projection, RowProjection, is_known_linear, is_untouched, projection, row_weight


def is_lean_attention(attn: wan.WanSelfAttention) -> bool:
    """Whether this is the host's own attention, and not one that something replaced or hooked to."""
    own: bool = type(attn) is wan.WanSelfAttention and attn.qk_norm and is_untouched(attn)
    return own and is_untouched(attn.norm_k) and is_known_linear(attn.k) and is_known_linear(attn.v)


@dataclass
class LeanAttention:
    """`WanSelfAttention.forward` without its last projection.

    Softmax needs all keys, but only some queries and some heads at a time. So the buffer of the queries takes the
    output, and values exist for one group of heads. Keys are normalized over all heads: a first pass computes them all,
    and those of `recomputed_groups` leave only their norm behind until their turn.
    """

    attn: wan.WanSelfAttention
    source: Callable[[slice], Tensor]
    """The normalized and modulated input of some tokens, (batch, some, dim)."""
    freqs: Tensor
    """Rotary embedding, (1, tokens, 1, head size / 2, 2, 2)."""
    like: Tensor
    """The block's input, (batch, tokens, dim)."""
    plan: MemoryPlan
    options: dict[str, Any]
    """The host's transformer_options."""

    def __post_init__(self) -> None:
        self.batch, self.tokens, self.dim = self.like.shape
        self.width = self.dim // self.plan.head_groups
        self.chunks = list(chunks(self.tokens, self.plan.token_chunk))

    def output(self) -> Tensor:
        """(batch, tokens, dim), contiguous."""
        output = self._queries()
        kept, scale = self._keys()
        values = RowProjection(self.attn.v, self.like)
        for start in range(0, self.dim, self.width):
            features = slice(start, start + self.width)
            if kept:
                k, v = kept.pop(0), self._values(values.features(features))
            else:
                k, v = self._keys_and_values(features, values.features(features), scale)
            self._attend(output[..., features], k, v)
            del k, v  # before the next group's are computed
        return output

    def _queries(self) -> Tensor:
        project, out = projection(self.attn.q, self.like), self._empty(self.dim)
        for chunk in self.chunks:
            out[:, chunk] = self._rotated(self.attn.norm_q(project(self.source(chunk))), chunk)
        return out

    def _keys(self) -> tuple[list[Tensor], Tensor]:
        """The keys of the first groups, each (batch, tokens, width), and 1 / RMS of all, (batch, tokens, 1) float32."""
        project, norm = projection(self.attn.k, self.like), self.attn.norm_k
        kept = [self._empty(self.width) for _ in range(self.plan.head_groups - self.plan.recomputed_groups)]
        scale = self.like.new_empty(self.batch, self.tokens, 1, dtype=torch.float32)
        for chunk in self.chunks:
            raw = project(self.source(chunk))
            length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True, dtype=torch.float32)
            scale[:, chunk] = torch.rsqrt(length.square() / self.dim + norm.eps)
            keys = self._rotated(norm(raw)[..., : len(kept) * self.width], chunk)
            for group, part in zip(kept, keys.chunk(len(kept), dim=-1), strict=True):
                group[:, chunk] = part
        return kept, scale

    def _values(self, value: Projection) -> Tensor:
        v = self._empty(self.width)
        for chunk in self.chunks:
            v[:, chunk] = value(self.source(chunk))
        return v

    def _keys_and_values(self, features: slice, value: Projection, scale: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._empty(self.width), self._empty(self.width)
        key = self._key_rows.features(features)
        weight = row_weight(self.attn.norm_k, self.like)[features]
        for chunk in self.chunks:
            x = self.source(chunk)
            v[:, chunk] = value(x)
            k[:, chunk] = self._rotated((key(x) * scale[:, chunk] * weight).to(x.dtype), chunk)
        return k, v

    @cached_property
    def _key_rows(self) -> RowProjection:
        return RowProjection(self.attn.k, self.like)

    def _wants_all_queries(self) -> bool:
        """Whether the attention that will run may give other results for a part of the queries."""
        override = self.options.get("optimized_attention_override")
        # A node's may tell tokens apart by their position, unless it says that it takes some.
        by_position = override is not None and not getattr(override, "accepts_query_chunks", False)
        return by_position or host.prefers_attention(self.attn)

    def _rotated(self, x: Tensor, chunk: slice) -> Tensor:
        """Rotary embedding of (batch, some, n heads * head size)."""
        heads = x.view(*x.shape[:2], -1, self.attn.head_dim)
        rotated: Tensor = apply_rope1(heads, self.freqs[:, chunk]).flatten(2)
        return rotated

    def _empty(self, width: int) -> Tensor:
        return self.like.new_empty(self.batch, self.tokens, width)

    def _attend(self, queries: Tensor, k: Tensor, v: Tensor) -> None:
        """Write a group's output over its queries."""
        heads, whole = self.width // self.attn.head_dim, self._wants_all_queries()
        options = host.attention_options(self.attn) | {"transformer_options": self.options}
        for chunk in [slice(None)] if whole else self.chunks:
            queries[:, chunk] = wan.optimized_attention(queries[:, chunk], k, v, heads=heads, **options)
