"""Type plans by recipe: the recipes as data, and the rules for tensors that stay unquantized.

A recipe is a named mix of ggml types such as Q4_K_M. `plan_types` applies one to the tensors of a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from ..errors import QuantError
from ..native.layer_type import LayerType
from ..native.native_format import NativeFormat
from ..native.registry import NATIVE
from ..qtype import QTYPES, QuantType


@dataclass(frozen=True)
class Recipe:
    """A named mix of types."""

    name: str
    file_type: int
    """`general.file_type`. Source: llama.cpp include/llama.h enum llama_ftype."""
    base: str
    overrides: tuple[tuple[str, str], ...] = ()
    """Pairs of a pattern for the whole tensor name and a type; the first match replaces `base`."""
    protected: str = ""
    """The type of the small layers that every block depends on; empty for 16 bits, or for `base` if that has them."""
    experimental: bool = False
    """Whether no real model of this recipe has been judged, and its errors are large."""

    @property
    def is_native(self) -> bool:
        """True if the file is a safetensors in one of ComfyUI's own formats."""
        return self.base in NATIVE

    @property
    def suffix(self) -> str:
        """The suffix of the file."""
        return ".safetensors" if self.is_native else ".gguf"

    @property
    def types(self) -> frozenset[str]:
        """The types of the quantized matrices."""
        return frozenset((self.base, *(qtype for _, qtype in self.overrides)))


# Quantization harms the value projections and the second FFN matrix most, so the mixes give these more bits.
# The names are those of Wan and of llama.cpp's T5.
_VALUE = r".*\.((self|cross)_attn\.v|attn_v)\.weight"
_DOWN = r".*\.(ffn\.2|ffn_down)\.weight"
_FIRST_VALUE = r"(blocks\.0\.\w+\.v|enc\.blk\.0\.attn_v)\.weight"
_FIRST_VALUES = r"(blocks\.[01]\.\w+\.v|enc\.blk\.[01]\.attn_v)\.weight"

# Source: llama.cpp src/llama.cpp llama_tensor_get_type at tag b3962, which made the published Wan files.
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
        Recipe("IQ3_M", 27, "IQ3_S", ((_VALUE, "Q4_K"), (_DOWN, "Q4_K"))),
        Recipe("IQ3_S", 26, "IQ3_S"),
        Recipe("IQ3_XXS", 23, "IQ3_XXS", ((_VALUE, "IQ3_S"),)),
        Recipe("IQ2_M", 29, "IQ2_S", ((_VALUE, "IQ3_S"),)),
        Recipe("IQ2_XS", 20, "IQ2_XS", ((_VALUE, "IQ3_XXS"),)),
        Recipe("IQ2_XXS", 19, "IQ2_XXS", ((_VALUE, "IQ2_S"),)),
        Recipe("IQ1_M", 31, "IQ1_M", ((_VALUE, "IQ2_XS"),), protected="Q8_0", experimental=True),
        *(Recipe(name, 0, name) for name in NATIVE),
    )
}

GGUF_RECIPES = {name: recipe for name, recipe in RECIPES.items() if not recipe.is_native}

# These matrices do not belong to Linear modules: ComfyUI reads them as plain parameters, or looks up a few rows.
_RAW_PARAMETERS = re.compile(r"(^|\.)(motion_encoder|trainable_cond_mask|attn_rel_b)\.")
# Each row embeds one token and is used as it is, so its errors do not average out in a sum over input channels.
EMBEDDING, EMBEDDING_TYPE = "token_embd.weight", "Q6_K"
# These layers are small, and every block depends on their outputs.
_PROTECTED = re.compile(r"(^|\.)(text_embedding|time_embedding|time_projection|img_emb|head)\.")
_SMALL_ELEMENTS = 1024

# Source: llama.cpp src/llama-quant.cpp, for tensors whose rows are not a multiple of the block size.
_COARSE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q2_K", "Q3_K", "IQ4_XS")
_NATIVE_FALLBACK = "FP8"
"""The format that takes rows of any length, and loads wherever another one does."""
_FALLBACK = {**dict.fromkeys(_COARSE, "IQ4_NL"), "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


Precision = Literal["exact", "protected", "quantized"]
"""The precision that a tensor needs: F32, 8 or 16 bits, or any type that the recipe or the file size gives it."""


class TensorInfo(Protocol):
    """The properties of a tensor that a type plan depends on."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Fallback(NamedTuple):
    """A tensor that got another type than the recipe's, and why."""

    name: str
    wanted: str
    got: str
    reason: str


StoredType = QuantType | LayerType
"""A type of GGUF, or one of ComfyUI's formats for a weight of one shape."""


class TypePlan(NamedTuple):
    """A type for every tensor, in the order of the source, and the deviations from the recipe."""

    types: dict[str, StoredType]
    fallbacks: tuple[Fallback, ...]


def find_recipe(name: str) -> Recipe:
    """Return the recipe with this name, in upper or lower case.

    Raises:
        QuantError: an unknown name.
    """
    recipe = RECIPES.get(name.upper())
    if recipe is None:
        raise QuantError(f"recipe {name}: unknown; choose one of {', '.join(RECIPES)}")
    return recipe


def plan_types(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> TypePlan:
    """Return the recipe's type for each tensor, or a fallback where the tensor's shape does not allow it."""
    if recipe.is_native:
        return _plan_native(recipe, tensors)
    types: dict[str, StoredType] = {}
    fallbacks: list[Fallback] = []
    for name, tensor in tensors.items():
        wanted = _wanted_type(recipe, name, tensor)
        types[name] = got = type_or_fallback(wanted, tensor)
        if got.name != wanted:
            reason = f"rows of {tensor.shape[-1]} elements are not a multiple of {QTYPES[wanted].block_size}"
            fallbacks.append(Fallback(name, wanted, got.name, reason))
    return TypePlan(types, tuple(fallbacks))


def _plan_native(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> TypePlan:
    """Return the native format for the weights of blocks, and the dtype of the source for everything else.

    A weight of another shape than the format can hold is in FP8, or keeps its dtype if that cannot hold it either.
    """
    types: dict[str, StoredType] = {}
    fallbacks: list[Fallback] = []
    for name, tensor in tensors.items():
        types[name] = kept_type(tensor)
        if not is_native_layer(name, tensor):
            continue
        stored, next_one = (native_type(NATIVE[each], tensor) for each in (recipe.base, _NATIVE_FALLBACK))
        if isinstance(stored, LayerType):
            types[name] = stored
            continue
        if isinstance(next_one, LayerType):
            types[name] = next_one
        fallbacks.append(Fallback(name, recipe.base, types[name].name, stored))
    return TypePlan(types, tuple(fallbacks))


def native_type(native: NativeFormat, tensor: TensorInfo) -> LayerType | str:
    """Return a native format as the type of a matrix, or why the format cannot hold it."""
    rows, columns = tensor.shape
    reason = native.takes((rows, columns))
    if rows % native.multiple or columns % native.multiple:
        reason = f"{rows}x{columns} weights, not multiples of {native.multiple}"
    if reason is None and any(part.nbytes % 4 for part in native.parts((rows, columns))):
        reason = f"{rows}x{columns} weights, not a multiple of 4"
    return LayerType(native, (rows, columns)) if reason is None else reason


def kept_type(tensor: TensorInfo) -> QuantType:
    """Return the dtype in which a tensor stays: its own, if the next tensor in the file then starts at 4 bytes."""
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")
    return QTYPES["F32" if math.prod(tensor.shape) % 2 else name]


def required_precision(name: str, tensor: TensorInfo) -> Precision:
    """Return which precision a tensor needs.

    Only the 2-D weights of Linear and Embedding modules are quantized. Everything else stays F32, which every loader
    reads as a plain parameter. Protected matrices keep 16 bits; for a target size, they may also get Q8_0.
    """
    if (
        len(tensor.shape) != 2
        or math.prod(tensor.shape) <= _SMALL_ELEMENTS
        or not name.endswith(".weight")
        or _RAW_PARAMETERS.search(name)
    ):
        return "exact"
    return "protected" if _PROTECTED.search(name) else "quantized"


def is_native_layer(name: str, tensor: TensorInfo) -> bool:
    """Return whether a tensor may be in one of ComfyUI's own formats; most of them are for Linear modules only."""
    return name != EMBEDDING and required_precision(name, tensor) == "quantized"


def type_or_fallback(wanted: str, tensor: TensorInfo) -> QuantType:
    """Return the wanted type, or its fallback if the rows are not a multiple of its block size."""
    for name in (wanted, _FALLBACK.get(wanted, wanted)):
        if tensor.shape[-1] % QTYPES[name].block_size == 0:
            return QTYPES[name]
    return QTYPES[sixteen_bit(tensor)]


def sixteen_bit(tensor: TensorInfo) -> str:
    """Return BF16 for a BF16 tensor and F16 for others: F16 has three more bits of precision."""
    return "BF16" if tensor.dtype == torch.bfloat16 else "F16"


def _wanted_type(recipe: Recipe, name: str, tensor: TensorInfo) -> str:
    precision = required_precision(name, tensor)
    if precision == "exact":
        return "F32"
    if precision == "protected":
        return recipe.protected or (recipe.base if recipe.base in ("F16", "BF16") else sixteen_bit(tensor))
    if name == EMBEDDING and QTYPES[recipe.base].bits_per_weight < QTYPES[EMBEDDING_TYPE].bits_per_weight:
        return EMBEDDING_TYPE
    return next((qtype for pattern, qtype in recipe.overrides if re.fullmatch(pattern, name)), recipe.base)
