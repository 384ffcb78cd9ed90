"""What a LoRA file adds to the weights of a model: products of factors, and differences.

The tensors are found as ComfyUI's loader finds them, under its own names and those of `lora_names`. The sums are those
of its patches in float32, bit for bit on a CPU.

Source: comfy/lora.py load_lora and calculate_weight, comfy/weight_adapter/lora.py LoRAAdapter, ComfyUI 0.30.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import QuantError
from .lora_file import LoRATensor
from .lora_names import PREFIX, lora_names
from .tensors import SourceTensor

# In the order in which ComfyUI looks them up.
_FACTORS = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)
_OTHER_KINDS = re.compile(
    r"\.(hada|lokr|oft|boft)_\w+|\.[ab][12]\.weight$|\.(dora_scale|set_weight|reshape_weight|rescale)$"
    r"|[._]lora_(mid|magnitude_vector)\b"
)


class Product(NamedTuple):
    """The factors of a plain LoRA of one weight."""

    path: Path
    up: LoRATensor
    down: LoRATensor
    alpha: LoRATensor | None

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Return why the product does not have the shape of a weight, or None."""
        up, down = self.up.shape, self.down.shape
        fits = len(up) > 1 and len(down) > 1 and up[0] == shape[0] and math.prod(up[1:]) == down[0] > 0
        if fits and math.prod(down[1:]) == math.prod(shape[1:]):
            return None
        return f"has factors {up} and {down} for a weight of {shape}"

    def add(self, weight: Tensor, strength: float) -> None:
        """Add strength * alpha / rank * up @ down to a weight, float32 of any shape, in place."""
        up, down = (_finite(self.path, tensor).float().flatten(1) for tensor in (self.up, self.down))
        scale = 1.0 if self.alpha is None else _number(self.path, self.alpha) / len(down)
        weight.add_(torch.mm(up, down).view(weight.shape).mul_(strength * scale))


class Difference(NamedTuple):
    """A difference of one weight or bias."""

    path: Path
    tensor: LoRATensor
    alpha: LoRATensor | None = None
    rank: int = 0
    """PEFT adds the bias of its factor with the scale of the LoRA; 0 for a plain difference."""

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Return why the difference does not have the shape of a weight, or None."""
        return None if self.tensor.shape == shape else f"has shape {self.tensor.shape} for a weight of {shape}"

    def add(self, weight: Tensor, strength: float) -> None:
        """Add strength * difference to a weight, float32 of any shape, in place."""
        values = _finite(self.path, self.tensor)
        if self.rank and self.alpha is not None:
            values = values * (self.alpha.read() / self.rank)
        weight.add_(strength * values.to(torch.float32))


Patch = Product | Difference


def found_patches(
    path: Path, lora: Mapping[str, LoRATensor], model: Mapping[str, SourceTensor]
) -> tuple[dict[str, Patch], set[str]]:
    """Return the patches of a LoRA by the model's names, and the names of the tensors that they are made of.

    Args:
        path: the file of the LoRA, for messages.
        lora: the tensors of the LoRA by their names in the file.
        model: the tensors of the model by ComfyUI's names without prefix.

    Raises:
        QuantError: another kind than factors and differences, a missing factor, or two tensors for the same place.
    """
    other = next((name for name in lora if _OTHER_KINDS.search(name)), None)
    if other is not None:
        raise QuantError(
            f"{path}: tensor {other}: not part of a plain LoRA, expected factors (up, down, alpha) and differences"
            " (diff, diff_b); load the LoRA in ComfyUI, and use Save Model to bake it"
        )
    names = _by_host_names(path, lora)
    used: set[str] = set()
    patches: dict[str, Patch] = {}

    def take(name: str) -> LoRATensor | None:
        if name not in names:
            return None
        used.update(names[name])
        return lora[names[name][0]]

    for name in model:
        for key in _keys(name):
            alpha, rank = take(f"{key}.alpha"), 0
            for up_end, down_end in _FACTORS:
                up, down = take(key + up_end), take(key + down_end)
                if up is not None and down is not None:
                    patches[name], rank = Product(path, up, down, alpha), down.shape[0] if down.shape else 0
                    break
                if (alone := up or down) is not None:
                    other = key + (down_end if down is None else up_end)
                    raise QuantError(f"{path}: tensor {alone.name}: has no {other}; download the LoRA again")
            bias = name.removesuffix("weight") + "bias"
            for end, target in ((".w_norm", name), (".b_norm", bias), (".diff", name), (".diff_b", bias)):
                if target in model and (tensor := take(key + end)) is not None:
                    of_factor = tensor.name.endswith(".bias")
                    patches[target] = Difference(path, tensor, alpha, rank if of_factor else 0)
    return patches, used


def _keys(name: str) -> Iterator[str]:
    """Yield what ComfyUI looks up for a tensor of the model, in its order."""
    if name.endswith(".weight"):
        layer = name.removesuffix(".weight")
        yield "lora_unet_" + layer.replace(".", "_")
        yield PREFIX + layer
    else:
        yield PREFIX + name


def _by_host_names(path: Path, lora: Mapping[str, LoRATensor]) -> dict[str, list[str]]:
    """Return the names in the file by the names that ComfyUI looks up; several if their tensors are equal."""
    names = {re.sub(r"^lora_unet__", "lora_unet_", name): [name] for name in lora}
    renamed: dict[str, list[str]] = {}
    for new, old in lora_names(lora).pairs:
        same = renamed.setdefault(new, [old])
        if same[0] != old:
            if not torch.equal(lora[same[0]].read(), lora[old].read()):
                raise QuantError(
                    f"{path}: tensors {same[0]} and {old} are for the same layer, expected the LoRA of one model;"
                    " save the LoRA of each model as its own file, and choose the one for this model"
                )
            same.append(old)
    return names | renamed


def _finite(path: Path, tensor: LoRATensor) -> Tensor:
    """Return the values of a tensor in its dtype, of its shape."""
    values = tensor.read()
    if not bool(values.float().isfinite().all()):
        raise QuantError(f"{path}: tensor {tensor.name}: holds NaN or infinity; download the LoRA again")
    return values


def _number(path: Path, tensor: LoRATensor) -> float:
    if math.prod(tensor.shape) != 1:
        raise QuantError(
            f"{path}: tensor {tensor.name}: shape {tensor.shape}, expected one number; download the LoRA again"
        )
    return float(_finite(path, tensor).item())
