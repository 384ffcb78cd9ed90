"""LoRAs under names that ComfyUI's loader does not look up, such as those of PEFT, DiffSynth or SimpleTuner.

The host asks every class in its list `comfy.weight_adapter.adapters` for the patch of each weight. One more class in
this list finds the tensors of Wan's layers under other names, for every node that loads a LoRA.

Source: comfy/lora.py load_lora, ComfyUI 0.30.0.
"""

from __future__ import annotations

from functools import lru_cache

from comfy import weight_adapter
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...quant.sources.lora_names import PREFIX, other_names

_other_names = lru_cache(1)(other_names)


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
        """Return the patch of a weight, or None if the LoRA has none under another name.

        Args:
            x: the name that the host looks up; only the generic one, `diffusion_model.` and Wan's name, is answered.
            lora: the tensors of the LoRA, of any shape and dtype, by their names.
            alpha: the host's own find under `x`.
            dora_scale: the host's own find under `x`, of any shape and dtype.
            loaded_keys: the names found so far, which the host does not log as unknown.
        """
        names = _other_names(tuple(lora)).get(x) if x.startswith(PREFIX) else None
        if names is None:
            return None
        tensors = {new: lora[old] for new, old in names.items()}
        if f"{x}.alpha" in tensors:
            alpha = tensors[f"{x}.alpha"].item()
        dora_scale = tensors.get(f"{x}.dora_scale", dora_scale)
        for adapter_class in weight_adapter.adapters:
            known: set[str] = {f"{x}.alpha", f"{x}.dora_scale"}
            adapter = adapter_class.load(x, tensors, alpha, dora_scale, known) if adapter_class is not cls else None
            if adapter is not None:
                adapter.loaded_keys = {names[new] for new in known if new in names}
                return adapter
        return None


def register_lora_names() -> None:
    """Add `WanNames` to the host's list, once."""
    if not any(getattr(adapter, "name", None) == WanNames.name for adapter in weight_adapter.adapters):
        weight_adapter.adapters.append(WanNames)
