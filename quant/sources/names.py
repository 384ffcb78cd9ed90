"""Detection of the model in a file by its tensor names, and the renaming of its tensors.

Source: comfy/ldm/wan/model.py, ComfyUI 0.30.0, which uses the names of github.com/Wan-Video.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError
from . import diffusers, t5
from .add_ons import is_add_on
from .layers import MARKER

CONTAINER = r"(?:base_model|model|diffusion_model|transformer(?:_\d)?|dit\d?|pipe|net|unet|module|denoiser|generator)\."
"""The pattern of a name, with its dot, of a module that contains the model in a program that saved it."""
_PREFIX = re.compile(rf"(?:{CONTAINER})*")
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
"""What torch.compile, FSDP, activation checkpointing and PEFT insert at any place in a name."""
_UNMERGED = re.compile(r"\.(?:lora_[AB]|lora_(?:down|up)|lora_embedding_[AB]|lora_magnitude_vector)\.")

WAN_KEY = "head.modulation"
"""The name, without prefix, of a tensor that every Wan transformer has and that add-ons do not have."""
_WAN_QUERY = "blocks.0.self_attn.q.weight"
WAN, T5 = "wan", "t5encoder"
"""Values of the GGUF key `general.architecture`."""

_AVERAGE = re.compile(r"(?:^|[._])ema(?:[._]|$)")
"""The pattern of a prefix of moving averages, which trainers save beside the weights."""
_PART_OF_WAN = re.compile(r"(?:^|\.)blocks\.\d+\.(?:self_attn\.norm_q|cross_attn\.norm_q|attn2\.to_q)\.")

_LOOKS_LIKE = (
    (("lora_A.", "lora_B.", "lora_down.", "lora_up."), "a LoRA"),
    (("encoder.block.", "encoder.layers.", "text_model."), "a text encoder"),
    (("vision_model.", "visual."), "a vision encoder"),
    (("decoder.head.", "decoder.conv_in.", "decoder.up."), "a VAE"),
    (("double_blocks.",), "a Flux or Hunyuan model"),
    (("input_blocks.", "joint_blocks."), "a Stable Diffusion model"),
    (("transformer_blocks.",), "another diffusion transformer"),
)


class Naming(NamedTuple):
    """The naming of the tensors in a file."""

    prefix: str
    rename: Callable[[str], str | None]
    """The function from a name without prefix to the name in the GGUF, or to None if the tensor is left out."""
    architecture: str = WAN
    is_add_on: bool = False
    """True for the parts of a transformer that an add-on consists of."""
    warning: str = ""
    """What to tell the user, about tensors of the same file that are left out."""

    def new_name(self, name: str) -> str | None:
        """Return the name in the GGUF for a name in the file, or None if the tensor is not the model's."""
        bare = unwrapped(name)
        return self.rename(bare.removeprefix(self.prefix)) if bare.startswith(self.prefix) else None


def find_naming(path: Path, names: Collection[str]) -> Naming:
    """Return the naming of a Wan transformer, of an add-on for one, or of a T5 text encoder.

    Args:
        path: the path of the file, for messages.
        names: the names of its tensors.

    Raises:
        QuantError: another model, and the message says what it looks like; or as for `known_naming`.
    """
    naming = known_naming(path, names)
    if naming is not None:
        return naming
    names = {unwrapped(name) for name in names}
    parts = next((name for name in sorted(names) if _PART_OF_WAN.search(name)), None)
    if parts is not None:
        raise QuantError(
            f"{path}: incomplete: tensor {WAN_KEY} is missing, expected a complete Wan transformer (it has {parts});"
            " download the file again, or give all of its shards, under the names that they were published with"
        )
    looks = next((what for keys, what in _LOOKS_LIKE if any(key in n for n in names for key in keys)), "something else")
    raise QuantError(
        f"{path}: not a Wan model (no tensor {WAN_KEY}), it looks like {looks};"
        " choose a Wan transformer, an add-on for one, or the T5 text encoder"
    )


def known_naming(path: Path, names: Collection[str]) -> Naming | None:
    """Return what `find_naming` does, or None for another model.

    Any prefix is accepted under which there are the modulation of the head and a query of the first block.

    Raises:
        QuantError: several models in one file, or a LoRA beside the model's weights.
    """
    names = {unwrapped(name) for name in names}
    renamings = ((WAN_KEY, _WAN_QUERY, str), (diffusers.KEY, diffusers.QUERY, diffusers.renaming(path)))
    models = {prefix: rename for key, query, rename in renamings for prefix in _prefixes(key, query, names)}
    if models:
        _refuse_unmerged(path, names)
        prefix, warning = _chosen(path, sorted(models))
        return Naming(prefix, models[prefix], warning=warning)
    if (encoder := t5.find_encoder(names)) is not None:
        return Naming(encoder.prefix, encoder.rename, T5)
    add_ons = (Naming(prefix, str, is_add_on=True) for prefix in _common_prefixes(names) if is_add_on(names, prefix))
    return next(add_ons, None)


def unwrapped(name: str) -> str:
    """Return a tensor's name without the wrappers that training inserts into it, such as `_orig_mod`."""
    return _WRAPPERS.sub("", name)


def _prefixes(key: str, query: str, names: Collection[str]) -> Iterator[str]:
    """Yield what is before `key` in names: names of containers, or anything that is before `query` too."""
    prefixes = (name[: -len(key)] for name in names if name.endswith(key))
    return (p for p in prefixes if _PREFIX.fullmatch(p) or (p.endswith(".") and p + query in names))


def _chosen(path: Path, prefixes: Sequence[str]) -> tuple[str, str]:
    """Return the prefix of the only model that is not an average of weights, and a warning that names the others."""
    chosen, *others = sorted(prefixes, key=lambda prefix: _AVERAGE.search(prefix) is not None)
    if not others:
        return chosen, ""
    named = f"the tensors of {len(prefixes)} models, under {' and '.join(map(_quoted, prefixes))}"
    if len(prefixes) - sum(_AVERAGE.search(prefix) is not None for prefix in prefixes) != 1:
        raise QuantError(f"{path}: {named}, expected those of one; save each model as its own file, and choose one")
    return chosen, f"{path}: {named}; left out: {' and '.join(map(_quoted, others))}"


def _quoted(prefix: str) -> str:
    return f"{prefix!r:.80}" if prefix else "no prefix"


def _common_prefixes(names: Collection[str]) -> Iterator[str]:
    """Yield what may be the prefix of all names, the shortest first."""
    prefix = ""
    yield prefix
    words = _PREFIX.match(next((name for name in names if name != MARKER), ""))
    for word in words[0].split(".")[:-1] if words else ():
        prefix += f"{word}."
        yield prefix


def _refuse_unmerged(path: Path, names: Collection[str]) -> None:
    lora = next((name for name in sorted(names) if _UNMERGED.search(name)), None)
    if lora is not None:
        raise QuantError(
            f"{path}: tensor {lora}: belongs to a LoRA beside the model's weights, expected weights only;"
            " merge it in the program that saved the file (merge_and_unload in PEFT), and save again"
        )
