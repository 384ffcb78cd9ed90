"""One Wan block, computed in pieces and written over its input.

ComfyUI's `WanAttentionBlock.forward` holds many tensors as large as its input x, (batch, tokens, dim), or larger:
queries, keys, values, their rotated copies, the attention's output, and the hidden layer of the FFN. But only softmax
mixes tokens, and it works on each head alone. Everything else works on each token alone. A lean block therefore adds to
x in place, one chunk of tokens at a time:

1. Self-attention, see `attention`: the heads run in groups, and the output of a group is written over its queries. The
   output projection, the gate and the addition to x run chunk by chunk.
2. Cross-attention: keys and values of the short context are computed once. The rest runs chunk by chunk.
3. FFN: chunk by chunk, so its hidden layer exists for one chunk.

Each weight is prepared once per block and used for all chunks, as its layer multiplies with it, see `weights`: products
in 8-bit integers and in ComfyUI's own formats stay what they are.

Every output is the same sum of the same products as in ComfyUI and differs only by rounding. Kernels may add in another
order for other shapes, and recomputed keys are normalized in other steps. tests/ops/lean bounds the difference: in
float32 the transformer's output differs by less than 1e-5 of its norm. In 16 bits its error against float32 is less
than 1.2 times that of ComfyUI's own forward. A forward without a plan is ComfyUI's own, and bit-equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import Tensor

from .. import host
from .attention import InputChunk, LeanAttention, depends_on_position, is_lean_attention
from .memory_plan import MemoryPlan
from .modulation import Modulation, chunks
from .weights import Projection, in_turn, is_untouched, projection

# Image keys need full-precision attention: SageAttention returns NaN for them.
# Source: WanI2VCrossAttention, ComfyUI 0.33.0.
_FULL_PRECISION = {"low_precision_attention": False}
_CROSS_ATTENTIONS = (wan.WanT2VCrossAttention, wan.WanI2VCrossAttention)
_BLOCKS = (wan.WanAttentionBlock, wan.WanAttentionBlockAudio)


def is_lean_block(block: torch.nn.Module) -> bool:
    """Return whether `block` can run lean: it is ComfyUI's plain block or HuMo's, and not replaced or hooked.

    Its parts may be: a replaced part is called as it is.
    """
    return type(block) in _BLOCKS and is_untouched(block)


def owned(x: Tensor, options: dict[str, Any]) -> Tensor:
    """Return x to overwrite, or a copy where other nodes may keep what they are given.

    Args:
        x: floating point, (batch, tokens, dim).
        options: ComfyUI's transformer_options.

    Returns:
        Like x, contiguous.
    """
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {}).get("dit")
    may_be_kept = replaced or patches.get("double_block") or patches.get("attn2_patch")
    return x.clone(memory_format=torch.contiguous_format) if may_be_kept else x.contiguous()


@dataclass
class LeanBlock:
    """A lean `WanAttentionBlock.forward`. What other nodes' patches receive whole in ComfyUI, they receive whole here.

    Source: comfy/ldm/wan/model.py, ComfyUI 0.30.0.
    """

    block: wan.WanAttentionBlock
    plan: MemoryPlan
    image_tokens: int | None
    """The number of CLIP vision tokens at the start of the context."""
    options: dict[str, Any]
    """ComfyUI's transformer_options."""

    def __call__(self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor) -> Tensor:
        """Return the block's output, in the memory of `x` unless a patch returns another tensor.

        Args:
            x: floating point, (batch, tokens, dim), contiguous. It is overwritten.
            e: modulation vectors of the time step, (batch, 6, dim) or (batch, frames, 6, dim).
            freqs: rotary embedding, (1, tokens, 1, head size / 2, 2, 2).
            context: encoded image and text, in the dtype of `x`, (batch, context tokens, dim).
        """
        modulation = Modulation.from_module(self.block, e if e.ndim == 4 else e.unsqueeze(1), x)
        self._self_attention(x, modulation, freqs)
        self._cross_attention(x, context)
        x = self._after_cross_attention(x)
        self._ffn(x, modulation)
        return x

    def _after_cross_attention(self, x: Tensor) -> Tensor:
        """Run other nodes' patches, and return their result, (batch, tokens, dim), to overwrite."""
        patches, given = self.options.get("patches", {}).get("attn2_patch", ()), x
        for patch in patches:
            x = patch({"x": x, "transformer_options": self.options})
        # A patch that returns what it was given may keep it.
        return x.clone() if patches and x is given else x

    def _self_attention(self, x: Tensor, modulation: Modulation, freqs: Tensor) -> None:
        norm = self.block.norm1

        def input_chunk(chunk: slice) -> Tensor:
            return modulation.shift_and_scale(norm(x[:, chunk]), 0, chunk)

        y, project = self._attended(input_chunk, freqs, x)
        for chunk in self._chunks(x):
            x[:, chunk].addcmul_(project(y[:, chunk]), modulation.vector(2, chunk))

    def _attended(self, input_chunk: InputChunk, freqs: Tensor, x: Tensor) -> tuple[Tensor, Projection]:
        """Return the self-attention's output, (batch, tokens, dim), and the projection that it lacks."""
        attn = self.block.self_attn
        if not is_lean_attention(attn) or self.options.get("patches", {}).get("attn1_patch"):
            y = attn(input_chunk(slice(0, x.shape[1])), freqs, transformer_options=self.options)
            return y, torch.nn.Identity()
        y = LeanAttention(attn, input_chunk, freqs, x, self.plan, self.options).output()
        return y, projection(attn.o, x, lambda: (y[:, chunk] for chunk in self._chunks(x)))

    def _cross_attention(self, x: Tensor, context: Tensor) -> None:
        attn, norm = self.block.cross_attn, self.block.norm3
        if type(attn) not in _CROSS_ATTENTIONS or not is_untouched(attn) or host.prefers_attention(attn):
            x += attn(norm(x), context, context_img_len=self.image_tokens, transformer_options=self.options)
            return
        keys_and_values = self._context_keys_and_values(attn, context)
        query = projection(attn.q, x, lambda: (norm(x[:, chunk]) for chunk in self._chunks(x)))
        # What the output projection is called with depends on the attention, which would have to run twice.
        project = projection(attn.o, x)
        attend = partial(self._attend, attn, keys_and_values)
        if not depends_on_position(self.options):
            for chunk in self._chunks(x):
                x[:, chunk] += project(attend(attn.norm_q(query(norm(x[:, chunk]))), slice(None)))
            return
        queries, width = torch.empty_like(x), x.shape[2] // self.plan.head_groups
        for chunk in self._chunks(x):
            queries[:, chunk] = attn.norm_q(query(norm(x[:, chunk])))
        for start in range(0, x.shape[2], width):
            features = slice(start, start + width)
            queries[..., features] = attend(queries[..., features], features)
        for chunk in self._chunks(x):
            x[:, chunk] += project(queries[:, chunk])

    def _attend(
        self,
        attn: wan.WanSelfAttention,
        keys_and_values: list[tuple[Tensor, Tensor, dict[str, bool]]],
        queries: Tensor,
        features: slice,
    ) -> Tensor:
        """Return the output of attention to the context for some channels, in the shape of their queries."""
        options = {"heads": queries.shape[2] // attn.head_dim, "transformer_options": self.options}
        options |= host.attention_options(attn)
        y: list[Tensor] = [
            wan.optimized_attention(queries, k[..., features], v[..., features], **options, **precision)
            for k, v, precision in keys_and_values
        ]
        return sum(y[1:], y[0])

    def _context_keys_and_values(
        self, attn: wan.WanSelfAttention, context: Tensor
    ) -> list[tuple[Tensor, Tensor, dict[str, bool]]]:
        """Return keys, values and attention options of the text, and of the image if the model has image keys."""
        if type(attn) is wan.WanT2VCrossAttention:
            return [(attn.norm_k(attn.k(context)), attn.v(context), {})]
        image, text = context[:, : self.image_tokens], context[:, self.image_tokens :]
        return [
            (attn.norm_k(attn.k(text)), attn.v(text), {}),
            (attn.norm_k_img(attn.k_img(image)), attn.v_img(image), _FULL_PRECISION),
        ]

    def _ffn(self, x: Tensor, modulation: Modulation) -> None:
        ffn, norm = self.block.ffn, self.block.norm2

        def input_chunk(chunk: slice) -> Tensor:
            return modulation.shift_and_scale(norm(x[:, chunk]), 3, chunk)

        layers: list[Projection] = [ffn]
        if is_untouched(ffn):
            first, *others = ffn
            inputs = partial(map, input_chunk, self._chunks(x))
            layers = in_turn(ffn, [projection(first, x, inputs), *(projection(layer, x) for layer in others)])
        for chunk in self._chunks(x):
            y = input_chunk(chunk)
            for layer in layers:
                y = layer(y)
            x[:, chunk].addcmul_(y, modulation.vector(5, chunk))

    def _chunks(self, x: Tensor) -> list[slice]:
        return list(chunks(x.shape[1], self.plan.chunk_without_keys))
