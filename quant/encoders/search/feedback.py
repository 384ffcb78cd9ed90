"""Quantization with error feedback (GPTQ): later input channels make up for the rounding errors of earlier ones.

The outputs of a layer then change less than if each weight were rounded to its nearest level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .encoders import Encoder
from .fit import BlockScales
from .sub_blocks import SubBlocks, reciprocal_or_zero


def encode_with_feedback(
    encode: Encoder, block_size: int, weight: Tensor, importance: Tensor, factors: Tensor
) -> Tensor:
    """Quantize a weight for the least squared error of its layer's outputs.

    Blocks are taken in the order of their input channels. When a block's turn comes, its scales are searched for. Its
    channels are then rounded one after the other, and the error of each is spread over all later channels.

    Every operation works on one channel of all rows. The bytes of a row therefore depend neither on other rows nor on
    threads.

    Args:
        weight: float32 (rows, input channels).
        importance: float32 (rows, input channels), the importance of each weight in the search for the scales.
        factors: float32 (n, span, span), the upper Cholesky factors of the inverse second moments of the inputs. The
            input channels are n runs of `span`, which are quantized independently; `block_size` divides `span`.

    Returns:
        uint8 (rows, bytes per row).

    Source: GPTQ (arXiv 2210.17323), algorithm 1, in the order of the input channels.
    """
    n, span, _ = factors.shape
    rows = len(weight)
    remaining = weight.view(rows, n, span).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    importance = importance.reshape(rows, n, span).transpose(0, 1)
    packed = []
    for start in range(0, span, block_size):
        stop = start + block_size
        blocks = remaining[:, start:stop].transpose(1, 2).reshape(-1, block_size)
        block_importance = importance[:, :, start:stop].reshape(-1, block_size)
        scales = encode.fit_scales(SubBlocks.from_blocks(blocks, block_importance, encode.size), len(blocks))
        levels = _round(encode, scales, remaining[:, start:], factors[:, start:, start:], block_size)
        levels = levels.transpose(1, 2).reshape(-1, block_size)
        packed.append(encode.pack_levels(scales, levels).view(n, rows, -1))
    return torch.stack(packed, 2).transpose(0, 1).reshape(rows, -1)


def _round(encode: Encoder, scales: BlockScales, remaining: Tensor, factors: Tensor, block_size: int) -> Tensor:
    """Round the first `block_size` channels of `remaining`, and spread their errors over its other channels in place.

    Args:
        remaining: float32 (n, channels, rows), the weights of these and all later channels.
        factors: float32 (n, channels, channels).

    Returns:
        The levels, float32 (n, block_size, rows).
    """
    n, _, rows = remaining.shape
    sub_scales, sub_mins = (v.view(n, rows, -1).permute(2, 0, 1).contiguous() for v in scales.effective())
    units = reciprocal_or_zero(sub_scales)
    levels = torch.empty_like(remaining[:, :block_size])
    for channel in range(block_size):
        scale, minimum, unit = (values[channel // encode.size] for values in (sub_scales, sub_mins, units))
        shifted = remaining[:, channel] + minimum
        levels[:, channel] = encode.levels.nearest(shifted * unit)
        error = shifted.addcmul_(levels[:, channel], scale, value=-1).div_(factors[:, channel, channel, None])
        remaining[:, channel + 1 :].addcmul_(factors[:, channel, channel + 1 :, None], error[:, None], value=-1)
    return levels
