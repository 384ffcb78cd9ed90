"""The tensors that a file must have: those of Wan's variants, of add-ons, and of a T5 text encoder.

Source: the parameters of the classes in comfy/ldm/wan/, ComfyUI 0.30.0. Not required are `img_emb.emb_pos`, which only
first-last-frame models have, and the `kernel`s of Animate's motion encoder, which ComfyUI computes itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path

from ..errors import QuantError
from ..units import counted
from .add_ons import Shaped, belongs_to_add_on
from .names import T5, WAN

_BLOCK = (
    "modulation",
    "norm3.{weight,bias}",
    "{self,cross}_attn.{q,k,v,o}.{weight,bias}",
    "{self,cross}_attn.norm_{q,k}.weight",
    "ffn.{0,2}.{weight,bias}",
)
_ATTENTION = ("{q,k,v,o}.{weight,bias}", "norm_{q,k}.weight")
_WAN = (
    "{patch_embedding,text_embedding.0,text_embedding.2,time_embedding.0,time_embedding.2}.{weight,bias}",
    "{time_projection.1,head.head}.{weight,bias}",
    "head.modulation",
    *(f"blocks.*.{name}" for name in _BLOCK),
)
_CONVOLUTIONS = "motion_encoder.enc.net_app.convs"
# A transformer that has one of the names of a part must have all of them. `*` stands for each number of a series.
_PARTS = {
    "image": (
        "img_emb.proj.{0,1,3,4}.{weight,bias}",
        "blocks.*.cross_attn.{k,v}_img.{weight,bias}",
        "blocks.*.cross_attn.norm_k_img.weight",
    ),
    "reference": ("ref_conv.{weight,bias}",),
    "VACE": (
        "vace_patch_embedding.{weight,bias}",
        "vace_blocks.0.before_proj.{weight,bias}",
        *(f"vace_blocks.*.{name}" for name in (*_BLOCK, "after_proj.{weight,bias}")),
    ),
    "camera": ("control_adapter.{conv,residual_blocks.0.conv1,residual_blocks.0.conv2}.{weight,bias}",),
    "speech": (
        "trainable_cond_mask.weight",
        "cond_encoder.{weight,bias}",
        "casual_audio_encoder.{weights,encoder.padding_tokens}",
        "casual_audio_encoder.encoder.{conv1_local,conv1_global,conv2,conv3}.conv.{weight,bias}",
        "casual_audio_encoder.encoder.final_linear.{weight,bias}",
        *(f"audio_injector.injector.*.{name}" for name in _ATTENTION),
        "audio_injector.injector_adain_layers.*.linear.{weight,bias}",
        "frame_packer.{proj,proj_2x,proj_4x}.{weight,bias}",
    ),
    "HuMo": (
        "audio_proj.audio_proj_glob_{1,2,3,norm}.layer.{weight,bias}",
        *(f"blocks.*.audio_cross_attn_wrapper.audio_cross_attn.{name}" for name in _ATTENTION),
        "blocks.*.audio_cross_attn_wrapper.norm1_audio.{weight,bias}",
    ),
    "Animate": (
        "pose_patch_embedding.{weight,bias}",
        f"{_CONVOLUTIONS}.{{0.0.weight,0.1.bias,8.weight}}",
        f"{_CONVOLUTIONS}.{{1,2,3,4,5,6,7}}.{{conv1.0.weight,conv1.1.bias,conv2.1.weight,conv2.2.bias,skip.1.weight}}",
        "motion_encoder.enc.fc.{0,1,2,3,4}.{weight,bias}",
        "motion_encoder.dec.direction.weight",
        "face_adapter.fuser_blocks.*.{linear1_kv,linear1_q,linear2}.{weight,bias}",
        "face_adapter.fuser_blocks.*.{q,k}_norm.weight",
        "face_encoder.padding_tokens",
        "face_encoder.{conv1_local.conv,conv2.conv,conv3.conv,out_proj}.{weight,bias}",
    ),
    "pose": ("patch_embedding_pose.{weight,bias}",),
    "masked pose": ("patch_embedding_{pose,mask}.{weight,bias}",),
    "dance": (
        "{patch_embedding_global,head_global.head,music_projection}.{weight,bias}",
        "img_emb_refimage.proj.{0,1,3,4}.{weight,bias}",
        "head_global.modulation",
        *(f"music_injector.injector.*.{name}" for name in _ATTENTION),
        "music_encoder.*.self_attn.{q,k,v,out}_proj.{weight,bias}",
        "music_encoder.*.{linear1,linear2,norm1,norm2}.{weight,bias}",
    ),
}
# The names by which a part is recognized, where it shares the others with another part.
_OWN = {"masked pose": "patch_embedding_mask."}
_T5_ENCODER = (
    "{token_embd,enc.output_norm,enc.blk.0.attn_rel_b}.weight",
    "enc.blk.*.{attn_q,attn_k,attn_v,attn_o,attn_norm,ffn_norm,ffn_up,ffn_down}.weight",
)
# The parameter that has a model's width, the series of its blocks, and how many the published models of a width have:
# Wan 1.3B, 5B and 14B; T5-XXL.
_DEPTHS = {
    WAN: ("patch_embedding.bias", "blocks.", {1536: 30, 3072: 30, 5120: 40}),
    T5: ("enc.output_norm.weight", "enc.blk.", {4096: 24}),
}
_NUMBER = re.compile(r"\.(\d{1,9})\.")
_MAX_LISTED_BLOCKS = 1000


def check_complete(path: Path, names: Collection[str], architecture: str, *, add_on: bool = False) -> None:
    """Refuse a model without all tensors that it must have.

    Args:
        path: the path of the file, for the message.
        names: the names of its weights, as in ComfyUI or, for a text encoder, as in llama.cpp.
        architecture: the value of `general.architecture`.
        add_on: True if the file is an add-on, which has parts of a transformer only.

    Raises:
        QuantError: the message has the first name and the number of the missing tensors.
    """
    refuse_missing(path, missing_names(names, architecture, add_on=add_on))


def refuse_missing(path: Path, missing: Sequence[str]) -> None:
    """Raise QuantError if a name is missing in the file."""
    if missing:
        what = f"{len(missing)} tensors are missing, the first is {missing[0]}"
        what = f"tensor {missing[0]} is missing" if len(missing) == 1 else what
        raise QuantError(
            f"{path}: incomplete: {what}, expected a complete model; download the file again,"
            " or give all of its shards, under the names that they were published with"
        )


def few_blocks(path: Path, tensors: Mapping[str, Shaped], architecture: str) -> list[str]:
    """Return a warning if a model has fewer blocks than the published ones of its width, as a pruned one may have.

    Args:
        path: the path of the file, for the message.
        tensors: its tensors, by the names in `check_complete`.
        architecture: as for `check_complete`.
    """
    parameter, series, depths = _DEPTHS[architecture]
    width = prod(tensors[parameter].shape) if parameter in tensors else 0
    blocks, published = len(_Names(tensors.keys()).series.get(series, ())), depths.get(width, 0)
    if blocks >= published:
        return []
    return [
        f"{path}: {counted(blocks, 'block')}, expected {published} as in the published models of width {width:,};"
        " if it was not pruned, download the file again"
    ]


def missing_names(names: Collection[str], architecture: str, *, add_on: bool = False) -> list[str]:
    """Return the names that the model must have, but `names` lacks."""
    present = _Names(names)
    if architecture == T5:
        # umT5 has a table of relative positions in every block, T5 in its first one.
        required = [*_T5_ENCODER, *_usual(present, "enc.blk.", 2)]
    elif add_on:
        required = [pattern for part in _PARTS.values() for pattern in _components(part, present)]
    else:
        parts = (part for key, part in _PARTS.items() if any(n.startswith(_OWN.get(key, "")) for n in present.of(part)))
        most_blocks = len(present.series.get("blocks.", ())) // 2 + 1
        required = [*_WAN, *(pattern for part in parts for pattern in part), *_usual(present, "blocks.", most_blocks)]
    expected = dict.fromkeys(name for pattern in required for name in present.expected(pattern))
    return [name for name in expected if name not in present.names]


class _Names:
    """The names of a file, with those of a series grouped by their names without number."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self.series: dict[str, set[int]] = {}
        """The numbers of each series that a name has, by what is before the number."""
        self.general = Counter(_NUMBER.sub(".*.", name, count=1) for name in self.names)
        for name in self.names:
            if match := _NUMBER.search(name):
                self.series.setdefault(name[: match.start() + 1], set()).add(int(match[1]))

    def of(self, part: Sequence[str]) -> Iterator[str]:
        """Yield the names of a part that the file has, those of a series with `*` for their number."""
        for name in (name for pattern in part for name in _expanded(pattern)):
            if name in self.names or ("*" in name and name in self.general):
                yield name

    def expected(self, pattern: str) -> Iterator[str]:
        """Yield the names that a pattern stands for, for all numbers up to the largest in the file."""
        for name in _expanded(pattern):
            series, star, rest = name.partition("*")
            if not star:
                yield name
                continue
            numbers = self.series.get(series, {0})
            for number in range(min(max(numbers) + 1, max(_MAX_LISTED_BLOCKS, 2 * len(numbers)))):
                yield f"{series}{number}{rest}"


def _components(part: Sequence[str], present: _Names) -> Iterator[str]:
    """Yield the patterns of a part for those of its modules that an add-on has."""
    modules = {name.partition(".")[0] for name in present.of(part)}
    return (pattern for pattern in part if any(n.partition(".")[0] in modules for n in _expanded(pattern)))


def _usual(present: _Names, series: str, n_least: int) -> Iterator[str]:
    """Yield the names that at least `n_least` blocks of a series have, and that are not of an add-on."""
    for name, n_blocks in present.general.items():
        if name.startswith(f"{series}*.") and n_blocks >= n_least and not belongs_to_add_on(name.replace("*", "0")):
            yield name


@cache
def _expanded(pattern: str) -> tuple[str, ...]:
    """Return the names that a pattern with alternatives in braces stands for."""
    start, brace, rest = pattern.partition("{")
    if not brace:
        return (pattern,)
    options, _, end = rest.partition("}")
    return tuple(f"{start}{option}{name}" for option in options.split(",") for name in _expanded(end))
