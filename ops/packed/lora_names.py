"""LoRAs under names that ComfyUI's loader does not look up, such as those of PEFT, DiffSynth or SimpleTuner.

The host asks every class in its list `comfy.weight_adapter.adapters` for the patch of each weight, and passes the
tensors of the LoRA. One more class in this list adds them to the same dictionary under the names that the host looks up
next, for every node that loads a LoRA. Differences, norms and biases are found too, which no class can return.

Source: comfy/lora.py load_lora, ComfyUI 0.30.0; for PEFT's bias and magnitude, huggingface/peft tuners/lora/layer.py
and dora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from comfy import weight_adapter
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...quant import QuantError
from ...quant.errors import PrintableLog
from ...quant.sources.lora_names import PREFIX, layer_name, lora_names
from ...quant.units import counted

logger = PrintableLog(__name__)

_NAMED = 3
"""How many names a message has; it counts the others."""
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
_names = lru_cache(1)(lora_names)


class WanNames(WeightAdapterBase):
    """A finder of LoRA tensors by Wan's layers; what it returns is an instance of one of the host's own classes."""

    name = "wanquant_names"

    @classmethod
    def load(
        cls,
        x: str,
        lora: dict[str, Tensor],
        alpha: float | None,
        dora_scale: Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:
        """Add a LoRA's tensors under the names that the host knows, and return the patch of the first weight.

        The host has looked for the first weight already. It finds the others itself.

        Args:
            x: the name that the host looks up; only the generic one, `diffusion_model.` and Wan's name, is answered.
            lora: the tensors of the LoRA, of any shape and dtype, by their names; names are added, none is removed.
            alpha: the host's own find under `x`.
            dora_scale: the host's own find under `x`, of any shape and dtype.
            loaded_keys: the names found so far, which the host does not log as unknown.

        Raises:
            QuantError: two tensors of the LoRA are for the same place in the model.
        """
        known = set() if loaded_keys is None else loaded_keys
        if not x.startswith(PREFIX) or layer_name(x) != x.removeprefix(PREFIX):
            return None
        pairs, left_over = _names(tuple(lora))
        handled = {*left_over, *(old for new, old in pairs if old != new)}
        if handled <= known:
            return None
        lora.update(_renamed(lora, pairs))
        known |= handled
        if left_over:
            logger.warning("%s", _without_effect(left_over))
        if f"{x}.alpha" in lora:
            alpha = lora[f"{x}.alpha"].item()
        dora_scale = lora.get(f"{x}.dora_scale", dora_scale)
        known |= {f"{x}.alpha", f"{x}.dora_scale"}
        others = (adapter for adapter in weight_adapter.adapters if adapter is not cls)
        found = (adapter.load(x, lora, alpha, dora_scale, known) for adapter in others)
        return next((adapter for adapter in found if adapter is not None), None)


def _renamed(lora: dict[str, Tensor], pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA by new names, in the form that the host expects under these."""
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    by_name = {new: lora[old] for new, old in pairs}
    _check_alphas(by_name)
    for new, old in pairs:
        tensor = _as_the_host_has_it(new, old, lora[old], by_name)
        if not torch.equal(tensors.setdefault(new, tensor), tensor):
            raise QuantError(
                f"LoRA: tensors {origin[new]} and {old} are for the same layer, expected the LoRA of one model;"
                " save the LoRA of each model as its own file, and load the one for this model"
            )
        origin.setdefault(new, old)
    return tensors


def _check_alphas(tensors: dict[str, Tensor]) -> None:
    name = next((name for name, tensor in tensors.items() if name.endswith(".alpha") and tensor.numel() != 1), None)
    if name is not None:
        raise QuantError(
            f"LoRA whose {name} has shape {tuple(tensors[name].shape)}, expected one number; the file is damaged,"
            " download it again or choose another LoRA"
        )


def _as_the_host_has_it(new: str, old: str, tensor: Tensor, by_name: dict[str, Tensor]) -> Tensor:
    """Return PEFT's magnitude as a column, the bias of its factor times the LoRA's scale, and others as they are."""
    if "lora_magnitude_vector" in old:
        return tensor.reshape(-1, *(1,) * (max(tensor.ndim, 2) - 1))
    layer = new.removesuffix(".diff_b")
    down = next((by_name[layer + name] for name in _DOWN if layer + name in by_name), None)
    alpha = by_name.get(f"{layer}.alpha") if down is not None and down.ndim and len(down) else None
    return tensor * (alpha / len(down)) if old.endswith(".bias") and alpha is not None and down is not None else tensor


def _without_effect(names: Sequence[str]) -> str:
    named = ", ".join(f"{name:.80}" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"LoRA: left out {counted(len(names), 'tensor')} whose names Wan lacks: {named}{more};"
        " if the result is not as expected, use the LoRA in the format of ComfyUI"
    )


def register_lora_names() -> None:
    """Add `WanNames` to the host's list, once."""
    if not any(getattr(adapter, "name", None) == WanNames.name for adapter in weight_adapter.adapters):
        weight_adapter.adapters.append(WanNames)
