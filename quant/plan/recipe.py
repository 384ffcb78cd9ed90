"""Which tensor gets which type: recipes as data, and the rules for what stays unquantized."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from ..errors import QuantError
from ..qtype import QTYPES, QuantType


@dataclass(frozen=True)
class Recipe:
    """A named mix of types."""

    name: str
    file_type: int
    """`general.file_type`. Source: llama.cpp include/llama.h enum llama_ftype."""
    base: str
    overrides: tuple[tuple[str, str], ...] = ()
    """(pattern of the whole tensor name, type); the first that matches wins over `base`."""


# The value projections and the second FFN matrix lose most by quantization, so the mixes spend their bits there.
# Names are those of Wan and of llama.cpp's T5.
_VALUE = r".*\.((self|cross)_attn\.v|attn_v)\.weight"
_DOWN = r".*\.(ffn\.2|ffn_down)\.weight"
_FIRST_VALUE = r"(blocks\.0\.\w+\.v|enc\.blk\.0\.attn_v)\.weight"
_FIRST_VALUES = r"(blocks\.[01]\.\w+\.v|enc\.blk\.[01]\.attn_v)\.weight"

# Source: llama.cpp src/llama.cpp llama_tensor_get_type at tag b3962, as the published Wan files were made.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("F16", 1, "F16"),
        Recipe("BF16", 32, "BF16"),
        Recipe("Q8_0", 7, "Q8_0"),
        Recipe("Q6_K", 18, "Q6_K"),
        Recipe("Q5_K_M", 17, "Q5_K", ((_VALUE, "Q6_K"), (_DOWN, "Q6_K"))),
        Recipe("Q5_K_S", 16, "Q5_K"),
        Recipe("Q5_1", 9, "Q5_1"),
        Recipe("Q5_0", 8, "Q5_0"),
        Recipe("Q4_K_M", 15, "Q4_K", ((_VALUE, "Q6_K"), (_DOWN, "Q6_K"))),
        Recipe("Q4_K_S", 14, "Q4_K", ((_FIRST_VALUES, "Q5_K"), (_DOWN, "Q5_K"))),
        Recipe("Q4_1", 3, "Q4_1"),
        Recipe("Q4_0", 2, "Q4_0"),
        Recipe("IQ4_NL", 25, "IQ4_NL"),
        Recipe("IQ4_XS", 30, "IQ4_XS"),
        Recipe("Q3_K_M", 12, "Q3_K", ((_FIRST_VALUE, "Q5_K"), (_VALUE, "Q4_K"), (_DOWN, "Q4_K"))),
        Recipe("Q3_K_S", 11, "Q3_K"),
        Recipe("Q2_K", 10, "Q2_K", ((_VALUE, "Q3_K"),)),
    )
}

# Not Linear modules: the host reads these matrices as plain parameters, or gathers from a few rows.
_RAW_PARAMETERS = re.compile(r"(^|\.)(motion_encoder|trainable_cond_mask|attn_rel_b)\.")
# Each row stands for a token, and no sum over columns averages its errors away.
EMBEDDING, EMBEDDING_TYPE = "token_embd.weight", "Q6_K"
# Small and read by every block.
_PROTECTED = re.compile(r"(^|\.)(text_embedding|time_embedding|time_projection|img_emb|head)\.")
_SMALL = 1024

# Source: llama.cpp src/llama-quant.cpp, tensors whose rows are no multiple of the block size.
_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


Treatment = Literal["exact", "protected", "quantized"]


class TensorInfo(Protocol):
    """What a plan needs to know of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Fallback(NamedTuple):
    """A tensor that could not get the recipe's type."""

    name: str
    wanted: str
    got: str
    reason: str


class TypePlan(NamedTuple):
    """A type for every tensor, in the order of the source."""

    types: dict[str, QuantType]
    fallbacks: tuple[Fallback, ...]


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, in any case."""
    recipe = RECIPES.get(name.upper())
    if recipe is None:
        raise QuantError(f"recipe {name}: unknown; choose one of {', '.join(RECIPES)}")
    return recipe


def plan(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> TypePlan:
    """Gives each tensor the recipe's type, as far as its `treatment` and its rows allow."""
    types: dict[str, QuantType] = {}
    fallbacks: list[Fallback] = []
    for name, tensor in tensors.items():
        wanted = _wanted_type(recipe, name, tensor)
        types[name] = got = fitting_type(wanted, tensor)
        if got.name != wanted:
            reason = f"rows of {tensor.shape[-1]} weights are not a multiple of {QTYPES[wanted].block_size}"
            fallbacks.append(Fallback(name, wanted, got.name, reason))
    return TypePlan(types, tuple(fallbacks))


def treatment(name: str, tensor: TensorInfo) -> Treatment:
    """What may be done to a tensor.

    Only 2-D weights of Linear and Embedding modules are quantized. Whatever is no matrix stays F32, which every
    loader reads as a plain parameter; protected matrices keep 16 bits, or 8 where size is what counts.
    """
    if (
        len(tensor.shape) != 2
        or math.prod(tensor.shape) <= _SMALL
        or not name.endswith(".weight")
        or _RAW_PARAMETERS.search(name)
    ):
        return "exact"
    return "protected" if _PROTECTED.search(name) else "quantized"


def fitting_type(wanted: str, tensor: TensorInfo) -> QuantType:
    """The wanted type, or the one that replaces it where its blocks do not divide the rows."""
    columns = tensor.shape[-1]
    for name in (wanted, _FALLBACK.get(wanted, wanted)):
        if columns % QTYPES[name].block_size == 0:
            return QTYPES[name]
    return QTYPES[sixteen_bit(tensor)]


def sixteen_bit(tensor: TensorInfo) -> str:
    """BF16 stays BF16; F32 becomes F16, which has three more bits of precision where the range allows it."""
    return "BF16" if tensor.dtype == torch.bfloat16 else "F16"


def _wanted_type(recipe: Recipe, name: str, tensor: TensorInfo) -> str:
    kind = treatment(name, tensor)
    if kind == "exact":
        return "F32"
    if kind == "protected":
        return recipe.base if recipe.base in ("F16", "BF16") else sixteen_bit(tensor)
    if name == EMBEDDING and QTYPES[recipe.base].bits_per_weight < QTYPES[EMBEDDING_TYPE].bits_per_weight:
        return EMBEDDING_TYPE
    return next((qtype for pattern, qtype in recipe.overrides if re.fullmatch(pattern, name)), recipe.base)
