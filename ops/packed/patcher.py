"""LoRAs on packed weights: added to the dequantized rows at every use, so that nothing is quantized again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NoReturn

import comfy.model_management
import comfy.utils
import torch
from comfy.hooks import HookGroup, WeightHook
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...quant import QuantError
from .. import host
from .layout import is_packed
from .linear import GGUFModule, gguf_modules, packed_modules
from .lora_names import register_lora_names
from .patch_match import matching_patches
from .patch_rows import Patch
from .patches import OnTheFly

_KEY = "wanquant"

register_lora_names()


class PackedPatcher(ModelPatcher):
    """A subclass of the host's patcher that keeps the patches of packed weights in `weight_function`.

    The host would write a dense weight (full load), append a second patch (partial unload), or round the LoRA into
    the packed blocks (dynamic VRAM). `sync` runs after every method that does so, and sets the right patches.
    """

    def sync(self) -> None:
        """Give every packed layer the patches that are active now, or none while no weights are loaded.

        Clones share the model. While another clone is loaded, its patches stay.
        """
        loaded = host.loaded_patches_uuid(self.model)
        if loaded not in (None, self.patches_uuid):
            return
        active = (self.patches, self.get_combined_hook_patches(self.current_hooks)) if loaded else ()
        for key, module in gguf_modules(self.model):
            if is_packed(module.weight):
                _set_patches(key, module, [patches[key] for patches in active if key in patches])
            else:
                # The host dequantizes some tiny layers for good, and writes the patches into them.
                module.weight_function = [f for f in module.weight_function if not isinstance(f, OnTheFly)]

    def keep_factors_on_device(self, device: torch.device, budget: float) -> int:
        """Move the LoRAs of layers to `device` while the sum stays within `budget` bytes.

        In the legacy memory mode these are the layers whose weights are on `device`, with dynamic VRAM all layers.

        Returns:
            The bytes that the moved LoRAs need.
        """
        used = 0
        for function in self._on_the_fly(None if self.is_dynamic() else device):
            if not comfy.model_management.is_device_cpu(device) and used + function.size() <= budget:
                used += function.move_to(device)
        host.add_resident_bytes(self.model, used)
        return used

    def restore_loaded_backups(self) -> int:
        """Move LoRAs to main memory too, when dynamic VRAM frees what is on the device outside its pages."""
        for function in self._on_the_fly():
            function.move_to(torch.device("cpu"))
        restored: int = super().restore_loaded_backups()
        return restored

    def _on_the_fly(self, device: torch.device | None = None) -> Iterator[OnTheFly]:
        """Yield the patches of all packed layers, or of those whose weights are on `device`."""
        modules = (m for _, m in packed_modules(self.model) if device is None or m.weight.device.type == device.type)
        return (f for module in modules for f in module.weight_function if isinstance(f, OnTheFly))

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        force_cast: bool = False,
    ) -> Tensor | None:
        # Dynamic VRAM sets force_cast to keep a tiny layer on the device. return_weight asks for a dense weight.
        if not (return_weight or force_cast) and self._is_packed(key):
            return None
        weight: Tensor | None = super().patch_weight_to_device(
            key, device_to, inplace_update, return_weight, force_cast
        )
        return weight

    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        matching = matching_patches(self.model, patches)
        added: list[Any] = super().add_patches(matching, strength_patch, strength_model)
        return added

    def add_hook_patches(
        self, hook: WeightHook, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        # The host gives each hook to the model and to the text encoder, so no patches at all are not an error here.
        matching = matching_patches(self.model, patches) if patches else patches
        added: list[Any] = super().add_hook_patches(hook, matching, strength_patch, strength_model)
        return added

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        self.sync()

    def partially_unload(self, *args: object, **kwargs: object) -> int:
        freed: int = super().partially_unload(*args, **kwargs)
        self.sync()
        return freed

    def patch_hooks(self, hooks: HookGroup | None) -> None:
        super().patch_hooks(hooks)
        self.sync()

    def patch_hook_weight_to_device(
        self, hooks: HookGroup, combined_patches: dict[str, list[Patch]], key: str, *args: object, **kwargs: object
    ) -> None:
        if self.is_dynamic() or not self._is_packed(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def clone(self, *args: object, **kwargs: object) -> ModelPatcher:
        return with_packed_patches(super().clone(*args, **kwargs))

    def model_state_dict_for_saving(self, *_: object, **__: object) -> NoReturn:
        raise QuantError(
            "a GGUF model cannot be saved as safetensors, because its weights are packed blocks;"
            " save it with Save Quantized Model, which merges the LoRAs too"
        )

    def _is_packed(self, key: str) -> bool:
        return is_packed(comfy.utils.get_attr(self.model, key))


def _set_patches(key: str, module: GGUFModule, sources: list[list[Patch]]) -> None:
    """Set one weight function per source, before those of other nodes; reuse a function with the same patches."""
    present = [f for f in module.weight_function if isinstance(f, OnTheFly)]
    others = [f for f in module.weight_function if not (isinstance(f, OnTheFly) or host.is_host_patch(f))]
    mine = [next((f for f in present if f.applies(p)), None) or OnTheFly(key, p, module) for p in sources]
    module.weight_function = mine + others
    host.keep_from_rounding(module)


def with_packed_patches(patcher: ModelPatcher) -> ModelPatcher:
    """Make `patcher` a `PackedPatcher`, in addition to its own class (legacy or dynamic), and return it.

    The host creates the patcher and chooses its class, so the instance gets a subclass of it as `__class__`.
    """
    if not isinstance(patcher, PackedPatcher):
        patcher.__class__ = _packed_class(type(patcher))  # type: ignore[arg-type]
    if not patcher.get_callbacks(CallbacksMP.ON_LOAD, _KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, _KEY, _after_load)
    return patcher


@cache
def _packed_class(base: type[ModelPatcher]) -> type[ModelPatcher]:
    return type(f"Packed{base.__name__}", (PackedPatcher, base), {})


def _after_load(
    patcher: ModelPatcher, device: torch.device, memory: float, force_patch_weights: bool, full_load: bool
) -> None:
    """Handle the host's ON_LOAD callback; `memory` is the bytes that may be loaded, 0 without a limit.

    Clones inherit callbacks, so one that was not made by `clone` becomes a `PackedPatcher` here.
    """
    with_packed_patches(patcher).sync()
    if not patcher.is_dynamic():
        used = host.resident_bytes(patcher.model)
        patcher.keep_factors_on_device(device, memory - used if memory else float("inf"))
