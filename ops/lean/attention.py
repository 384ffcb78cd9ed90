"""Wan's self-attention over one group of heads at a time.

Beside the block's input it needs one buffer of the input's size for the queries, and one for the keys. Values and
recomputed keys exist for a few groups, in the memory of the keys that are no longer needed. Intermediate tensors exist
for one chunk of tokens.
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


def depends_on_position(options: dict[str, Any]) -> bool:
    """Return whether attention may treat a chunk of the queries differently from all of them.

    Another node's override may, unless it declares that it does not.

    Args:
        options: ComfyUI's transformer_options.
    """
    override = options.get("optimized_attention_override")
    return override is not None and not getattr(override, "accepts_query_chunks", False)


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
        done, at_once = 0, (len(kept_keys) + 1) // 2
        while done < self.plan.head_groups:
            # Each pass over the input costs time. What is done with left room for the values of as many groups.
            keys, kept_keys = kept_keys[: max(1, done)], kept_keys[max(1, done) :]
            features = self._features(done, len(keys) or min(at_once, self.plan.head_groups - done))
            if keys:
                vs = self.values(values.features(features), self._groups(len(keys)))
            else:
                keys, vs = self._keys_and_values(features, values.features(features), inverse_rms)
            while keys:
                self.attend(output[..., self._features(done, 1)], keys.pop(0), vs.pop(0))
                done += 1
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
        kept = self._groups(self.plan.head_groups - self.plan.recomputed_groups)
        inverse_rms = self.like.new_empty(self.batch, self.tokens, 1, dtype=torch.float32)
        for chunk in self.chunks:
            raw = project(self.input_chunk(chunk))
            length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True, dtype=torch.float32)
            inverse_rms[:, chunk] = torch.rsqrt(length.square() / self.dim + norm.eps)
            _share(self._rotated(norm(raw)[..., : len(kept) * self.width], chunk), kept, chunk)
        return kept, inverse_rms

    def values(self, value: Projection, groups: list[Tensor]) -> list[Tensor]:
        """Write values to groups of heads, each (batch, tokens, its channels), of the input's dtype; return these."""
        for chunk in self.chunks:
            _share(value(self.input_chunk(chunk)), groups, chunk)
        return groups

    def _keys_and_values(
        self, features: slice, value: Projection, inverse_rms: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return keys and values of these output channels, by group of heads."""
        count = (features.stop - features.start) // self.width
        keys, values = self._groups(count), self._groups(count)
        key = self._key_rows.features(features)
        weight = norm_weight(self.attn.norm_k, self.like)[features]
        for chunk in self.chunks:
            x = self.input_chunk(chunk)
            _share(value(x), values, chunk)
            _share(self._rotated((key(x) * inverse_rms[:, chunk] * weight).to(x.dtype), chunk), keys, chunk)
        return keys, values

    @cached_property
    def _key_rows(self) -> RowProjection:
        return RowProjection(self.attn.k, self.like, self.inputs)

    def inputs(self) -> Iterator[Tensor]:
        """Yield the inputs of all chunks, each (batch, tokens in the chunk, dim), in the dtype of `like`."""
        return (self.input_chunk(chunk) for chunk in self.chunks)

    def _rotated(self, x: Tensor, chunk: slice) -> Tensor:
        """Apply the rotary embedding to (batch, tokens in the chunk, some heads * head size)."""
        heads = x.view(*x.shape[:2], -1, self.attn.head_dim)
        rotated: Tensor = apply_rope1(heads, self.freqs[:, chunk]).flatten(2)
        return rotated

    def _features(self, group: int, count: int) -> slice:
        """Return the channels of `count` groups of heads from `group` on."""
        return slice(group * self.width, (group + count) * self.width)

    def _groups(self, count: int) -> list[Tensor]:
        """Return room for keys or values of some groups, each (batch, tokens, width)."""
        return [self._empty(self.width) for _ in range(count)]

    def _empty(self, width: int) -> Tensor:
        return self.like.new_empty(self.batch, self.tokens, width)

    def attend(self, queries: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the attention's output for some heads over their queries.

        Args:
            queries: in the dtype of the input, (batch, tokens, channels of these heads); `k` and `v` likewise.
        """
        heads = queries.shape[2] // self.attn.head_dim
        at_once = depends_on_position(self.options) or host.prefers_attention(self.attn)
        options = host.attention_options(self.attn) | {"transformer_options": self.options}
        # As many queries as have an output of the size of four chunks of all heads, since projections hold as many. A
        # GPU needs many to be busy.
        at_a_time = 4 * self.plan.token_chunk * self.attn.num_heads // heads
        for chunk in [slice(None)] if at_once else chunks(self.tokens, at_a_time):
            queries[:, chunk] = wan.optimized_attention(queries[:, chunk], k, v, heads=heads, **options)


def _share(product: Tensor, groups: list[Tensor], chunk: slice) -> None:
    """Write a chunk of tokens of all groups, (batch, tokens in the chunk, channels of all), to each of them."""
    for group, part in zip(groups, product.chunk(len(groups), dim=-1), strict=True):
        group[:, chunk] = part
