"""The shapes that Wan's tensors have in ComfyUI, for files that store the same values in another shape.

ggml drops leading dimensions of 1 and has at most 4 dimensions, so that its tools merge the first two of a convolution
in time and space. Other tools flatten convolutions to matrices.

Source: the modules in comfy/ldm/wan/, ComfyUI 0.30.0; leejet/stable-diffusion.cpp src/convert.cpp @ 97d2990.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

Shape = tuple[int, ...]

_OUT = 0
"""The place of the output channels, whose number is that of the layer's bias."""
_REST = -1
"""The place of the one size that follows from the number of elements."""
_IMAGE_DIM = 1280

_SHAPES = [
    (re.compile(name), shape)
    for name, shape in (
        (r"(vace_)?blocks\.\d{1,9}\.modulation", (1, 6, _REST)),
        (r"head(_global)?\.modulation", (1, 2, _REST)),
        (r"img_emb\.emb_pos", (1, _REST, _IMAGE_DIM)),
        (r"casual_audio_encoder\.weights", (1, _REST, 1, 1)),
        (r"(casual_audio_encoder\.encoder|face_encoder)\.padding_tokens", (1, 1, 1, _REST)),
        (r"motion_encoder\.enc\.net_app\.convs\..+\.bias", (1, _REST, 1, 1)),
        (r"((vace_|pose_)?patch_embedding|cond_encoder|frame_packer\.proj)\.weight", (_OUT, _REST, 1, 2, 2)),
        (r"patch_embedding_(pose|mask|global)\.weight", (_OUT, _REST, 1, 2, 2)),
        (r"frame_packer\.proj_2x\.weight", (_OUT, _REST, 2, 4, 4)),
        (r"frame_packer\.proj_4x\.weight", (_OUT, _REST, 4, 8, 8)),
        (r"(ref_conv|control_adapter\.conv)\.weight", (_OUT, _REST, 2, 2)),
        (r"control_adapter\.residual_blocks\.\d{1,9}\.conv\d\.weight", (_OUT, _REST, 3, 3)),
        (r"(casual_audio_encoder\.encoder|face_encoder)\.conv\w+\.conv\.weight", (_OUT, _REST, 3)),
    )
]


def host_shape(name: str, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape of a tensor in ComfyUI's Wan.

    It is the stored shape if that has the right number of dimensions, or cannot be another grouping of them.

    Args:
        name: the name of the tensor in ComfyUI.
        shapes: the stored shapes of all tensors, by their names in ComfyUI.
    """
    stored = shapes[name]
    expected = next((shape for pattern, shape in _SHAPES if pattern.fullmatch(name)), stored)
    if len(stored) == len(expected):
        return stored
    bias = shapes.get(f"{name.removesuffix('weight')}bias", ())
    sizes = [prod(bias) if size == _OUT else size for size in expected]
    known = prod(size for size in sizes if size != _REST)
    if known == 0:  # an empty bias, which is refused where it is read
        return stored
    shape = tuple(prod(stored) // known if size == _REST else size for size in sizes)
    return shape if _is_regrouping(stored, shape) else stored


def _is_regrouping(stored: Shape, shape: Shape) -> bool:
    """Return whether every stored size is the product of successive sizes of `shape`, apart from sizes of 1."""
    sizes = iter([size for size in shape if size != 1])
    for size in stored:
        product = 1
        while product < size:
            following = next(sizes, 0)
            if following == 0:
                return False
            product *= following
        if product != size:
            return False
    return next(sizes, None) is None
