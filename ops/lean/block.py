"""One Wan block, computed chunk by chunk and written over its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import Tensor

from .. import host
from .attention import LeanAttention, is_lean_attention
from .memory_plan import MemoryPlan
from .modulation import Modulation, chunks
from .weights import is_untouched, projection

# For keys of an image, where SageAttention gives NaN. Source: WanI2VCrossAttention, ComfyUI 0.33.0.
_EXACT = {"low_precision_attention": False}
_CROSS_ATTENTIONS = (wan.WanT2VCrossAttention, wan.WanI2VCrossAttention)


def is_lean_block(block: torch.nn.Module) -> bool:
    """Whether this is the host's plain block. What other nodes did to its parts is honoured, to all of it is not."""
    return type(block) is wan.WanAttentionBlock and is_untouched(block)


@dataclass
class LeanBlock:
    """`WanAttentionBlock.forward`; whatever a patch is to see whole exists whole.

    Source: comfy/ldm/wan/model.py, ComfyUI 0.30.0.
    """

    block: wan.WanAttentionBlock
    plan: MemoryPlan
    image_tokens: int | None
    """How many tokens at the beginning of the context are CLIP's."""
    options: dict[str, Any]
    """The host's transformer_options."""

    def __call__(self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor) -> Tensor:
        """The block's output, in the memory of `x` unless a patch returns another tensor.

        Args:
            x: (batch, tokens, dim), contiguous, written to.
            e: (batch, 6, dim), or (batch, frames, 6, dim).
            freqs: rotary embedding, (1, tokens, 1, head size / 2, 2, 2).
            context: (batch, context tokens, dim).
        """
        modulation = Modulation.from_module(self.block, e if e.ndim == 4 else e.unsqueeze(1), x)
        self._self_attention(x, modulation, freqs)
        self._cross_attention(x, context)
        for patch in self.options.get("patches", {}).get("attn2_patch", ()):
            x = patch({"x": x, "transformer_options": self.options})
        self._ffn(x, modulation)
        return x

    def _self_attention(self, x: Tensor, modulation: Modulation, freqs: Tensor) -> None:
        attn, norm = self.block.self_attn, self.block.norm1

        def source(chunk: slice) -> Tensor:
            return modulation.shift_and_scale(norm(x[:, chunk]), 0, chunk)

        if is_lean_attention(attn) and not self.options.get("patches", {}).get("attn1_patch"):
            y = LeanAttention(attn, source, freqs, x, self.plan, self.options).output()
            project = projection(attn.o, x)
        else:
            y = attn(source(slice(0, x.shape[1])), freqs, transformer_options=self.options)
            project = torch.nn.Identity()
        for chunk in self._chunks(x):
            x[:, chunk].addcmul_(project(y[:, chunk]), modulation.vector(2, chunk))

    def _cross_attention(self, x: Tensor, context: Tensor) -> None:
        attn, norm = self.block.cross_attn, self.block.norm3
        if type(attn) not in _CROSS_ATTENTIONS or not is_untouched(attn) or host.prefers_attention(attn):
            x += attn(norm(x), context, context_img_len=self.image_tokens, transformer_options=self.options)
            return
        sources = self._context_keys(attn, context)
        query, project = projection(attn.q, x), projection(attn.o, x)
        options = {"heads": attn.num_heads, "transformer_options": self.options} | host.attention_options(attn)
        for chunk in self._chunks(x):
            q = attn.norm_q(query(norm(x[:, chunk])))
            y = [wan.optimized_attention(q, k, v, **options, **kind) for k, v, kind in sources]
            x[:, chunk] += project(sum(y[1:], y[0]))

    def _context_keys(
        self, attn: wan.WanSelfAttention, context: Tensor
    ) -> list[tuple[Tensor, Tensor, dict[str, bool]]]:
        """Keys, values and further options of the text, and those of the image if the model has any."""
        if type(attn) is wan.WanT2VCrossAttention:
            return [(attn.norm_k(attn.k(context)), attn.v(context), {})]
        image, text = context[:, : self.image_tokens], context[:, self.image_tokens :]
        return [
            (attn.norm_k(attn.k(text)), attn.v(text), {}),
            (attn.norm_k_img(attn.k_img(image)), attn.v_img(image), _EXACT),
        ]

    def _ffn(self, x: Tensor, modulation: Modulation) -> None:
        ffn, norm = self.block.ffn, self.block.norm2
        layers = [projection(layer, x) for layer in ffn] if is_untouched(ffn) else [ffn]
        for chunk in self._chunks(x):
            y = modulation.shift_and_scale(norm(x[:, chunk]), 3, chunk)
            for layer in layers:
                y = layer(y)
            x[:, chunk].addcmul_(y, modulation.vector(5, chunk))

    def _chunks(self, x: Tensor) -> list[slice]:
        return list(chunks(x.shape[1], self.plan.token_chunk))
