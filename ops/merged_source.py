"""A loaded model with its LoRAs merged, as a source that the converter reads tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import comfy.lora
import comfy.model_detection
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..quant import QTYPES, QuantError
from ..quant.sources.attention import preference_metadata
from ..quant.sources.checkpoint import Checkpoint, SourceTensor
from ..quant.sources.files import SourceFiles, SourceIdentity
from ..quant.sources.names import find_naming, unwrapped
from ..quant.sources.tensors import DTYPES
from ..quant.units import counted
from . import host
from .packed.foreign import understood
from .packed.layout import dense, is_packed
from .packed.patch_rows import Patch

_Value = TypeVar("_Value")

_PREFIX = "diffusion_model."
# Merging a patch needs so many float32 tensors of the weight's size: the weight, the copy that the host adds to, the
# patch, and an intermediate result of the patch.
_MERGING_COPIES = 4
_STORED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Identity(SourceIdentity):
    """The identity of a model in memory, which has neither a file size nor a time."""

    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class _Parameter(SourceTensor):
    """A parameter of the model as it was loaded, with its patches."""

    weight: Tensor = field(repr=False, compare=False)
    patches: list[Patch] = field(repr=False, compare=False)
    memory: _Memory = field(repr=False, compare=False)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        packed = self.read_packed(start, self._stop(stop))
        if packed is None:
            return self.memory.values(self)[start : self._stop(stop)]
        self.memory.hash_if_next(self)
        return QTYPES[self.stored].dequantize(packed)

    def read_packed(self, start: int, stop: int) -> Tensor | None:
        if self.patches or not isinstance(self.weight, QuantizedTensor) or not is_packed(self.weight):
            return None
        qtype = QTYPES[self.stored]
        qdata: Tensor = host.packed_bytes(self.weight).detach().flatten()
        return qdata[start // qtype.block_size * qtype.type_size : stop // qtype.block_size * qtype.type_size].cpu()

    def merged(self, device: torch.device) -> Tensor:
        """Return the whole tensor with its patches, of `shape` and `dtype`.

        Patches are added in float32 on `device`.
        """
        weight = dense(self.weight, torch.float32)
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        if not self.patches:
            return weight.to(self.dtype)
        weight = weight.to(device, torch.float32, copy=weight is self.weight)
        key = _PREFIX + self.name
        merged: Tensor = comfy.lora.calculate_weight(
            self.patches, weight, key, torch.float32, {key: [(weight.clone(), None)]}
        )
        if merged.shape != self.shape:
            raise QuantError(
                f"tensor {self.name}: a patch changes its shape from {self.shape} to {tuple(merged.shape)};"
                " remove the LoRA that does so, and save again"
            )
        return merged


class _Memory(SourceFiles):
    """The parameters of a model, read one at a time, and the SHA-256 of all of them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(())
        self.device = device
        self.tensors: list[_Parameter] = []
        self._held: tuple[str, Tensor] | None = None
        self._hash = hashlib.sha256()
        self._hashed = 0

    def values(self, tensor: _Parameter) -> Tensor:
        """Return the merged values, flat, of the tensor's dtype; only those of the latest tensor are kept."""
        if self._held is None or self._held[0] != tensor.name:
            self._held = None
            with torch.no_grad():
                # A weight without patches is the model's own parameter, and no encoder may record what it does with it.
                self._held = (tensor.name, tensor.merged(self.device).detach().flatten())
            self.hash_if_next(tensor)
        return self._held[1]

    def hash_if_next(self, tensor: _Parameter) -> None:
        """Add the tensor to the SHA-256 if it is the next one in order."""
        if self._hashed < len(self.tensors) and self.tensors[self._hashed] is tensor:
            self._feed(tensor)

    def sha256(self) -> str:
        """Return the hex digest of the weights as they were loaded and of the patches."""
        while self._hashed < len(self.tensors):
            self._feed(self.tensors[self._hashed])
        return self._hash.hexdigest()

    def close(self) -> None:
        self._held = None

    def _feed(self, tensor: _Parameter) -> None:
        self._hashed += 1
        for part in _parts((tensor.name, tensor.weight, tensor.patches)):
            self._hash.update(part)


def _parts(value: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yield all bytes that distinguish one value from another."""
    if isinstance(value, QuantizedTensor):
        value = host.packed_bytes(value) if is_packed(value) else value.dequantize()
    if isinstance(value, Tensor):
        yield repr((value.dtype, value.shape)).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(value, WeightAdapterBase):
        yield from _parts((type(value).__name__, value.weights))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode() + b"\0"


def merged_checkpoint(patcher: ModelPatcher, device: torch.device) -> Checkpoint:
    """Return a MODEL with its patches merged as a checkpoint, like one from `open_checkpoint`.

    Args:
        patcher: the model, from any loader; its weights may be on any device.
        device: the device that merges LoRAs and other patches.

    Raises:
        QuantError: not a Wan model, a weight of another pack whose values are unknown, or a LoRA or another change of
            the model that is not a patch of its weights.
    """
    model = patcher.model.diffusion_model
    _refuse_unmergeable(patcher)
    weights = dict(model.named_parameters())
    path = Path("MODEL")
    architecture = find_naming(path, weights.keys()).architecture
    memory = _Memory(device)
    patches = _by_name((key, patch) for key, added in patcher.patches.items() for patch in added)
    as_loaded = _by_name(host.unpatched_weights(patcher).items())
    for key, weight in weights.items():
        name = unwrapped(key)
        known = understood(model.get_submodule(key.rpartition(".")[0]), name, as_loaded.get(name, [weight])[0])
        memory.tensors.append(_parameter(name, known, patches.get(name, []), memory))
    tensors: Mapping[str, SourceTensor] = {tensor.name: tensor for tensor in memory.tensors}
    identity = _Identity(path, (), sum(tensor.nbytes for tensor in memory.tensors))
    on_cpu = (tensor for tensor in memory.tensors if tensor.patches and device.type == "cpu")
    held = max((_MERGING_COPIES * 4 * math.prod(tensor.shape) for tensor in on_cpu), default=0)
    preferences = {unwrapped(name): config for name, config in host.attention_preferences(model).items()}
    metadata = _detection_metadata(patcher.model, memory.tensors) | preference_metadata(preferences)
    checkpoint = Checkpoint(identity, str(path), metadata, architecture, {}, tensors, memory, held)
    n_patched = sum(bool(tensor.patches) for tensor in memory.tensors)
    baked = f"the LoRAs of MODEL are baked into {counted(n_patched, 'tensor')}, before their rounding"
    note = f"{baked}; load the file without them"
    return replace(checkpoint, notes=(note,)) if n_patched else checkpoint


def _by_name(items: Iterable[tuple[str, _Value]]) -> dict[str, list[_Value]]:
    """Return what the host keeps by key, by the names in a file, which lack what torch.compile inserts."""
    found: dict[str, list[_Value]] = {}
    for key, value in items:
        found.setdefault(unwrapped(key).removeprefix(_PREFIX), []).append(value)
    return found


def _refuse_unmergeable(patcher: ModelPatcher) -> None:
    """Refuse what a node added to the model otherwise than as patches, which alone are merged."""
    change = next(iter(_changes_beside_patches(patcher)), None)
    if change is not None:
        raise QuantError(
            f"MODEL: has {change}, which cannot be merged into weights, expected LoRAs of the node Load LoRA only;"
            " load the LoRA with that node, or leave the other node out, and save again"
        )


def _changes_beside_patches(patcher: ModelPatcher) -> Iterator[str]:
    """Yield what changes a model's results otherwise than by its `patches`, as a phrase for messages."""
    yield from (f"the injection {name!r:.80}" for name, injected in patcher.injections.items() if injected)
    yield from ("a LoRA of a hook (Create Hook LoRA)" for patches in patcher.hook_patches.values() if patches)
    yield from (f"a function on {key!r:.80}" for key, added in patcher.weight_wrapper_patches.items() if added)


def _detection_metadata(model: BaseModel, parameters: list[_Parameter]) -> dict[str, str]:
    """Return the `config` metadata that the host needs to detect the model, if names and shapes do not suffice.

    Wan Animate 2 has the shapes of image to video.

    Source: comfy/model_detection.py detect_unet_config, ComfyUI 0.33.0.
    """
    detected = comfy.model_detection.detect_unet_config({each.name: each.weight for each in parameters}, "")
    own = {key: value for key, value in model.model_config.unet_config.items() if isinstance(value, str)}
    more = {key: value for key, value in own.items() if detected.get(key) != value}
    return {"config": json.dumps({"transformer": more})} if more else {}


def _parameter(name: str, weight: Tensor, patches: list[Patch], memory: _Memory) -> _Parameter:
    if isinstance(weight, QuantizedTensor):
        packed = is_packed(weight)
        stored, dtype = (weight.params.qtype, torch.float32) if packed else (host.layout_name(weight), weight.dtype)
    else:
        stored = _STORED.get(weight.dtype, str(weight.dtype))
        dtype = torch.bfloat16 if weight.itemsize == 1 else weight.dtype
    shape = tuple(weight.shape) or (1,)
    return _Parameter(name, torch.float32 if patches else dtype, shape, stored, weight, patches, memory)
