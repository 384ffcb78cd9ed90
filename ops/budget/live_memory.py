"""Counting the memory of a computation from the tensors that are alive, on meta tensors as on real ones."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .. import host

_FLOPS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}

Arguments = tuple[object, ...]
Keywords = dict[str, object]

_ALIGNMENT = 512
"""Bytes: what torch's CUDA allocator rounds a request up to. Source: c10/cuda/CUDACachingAllocator.h kMinBlockSize."""

_DECODES = ("wanquant::dequantize_into", "wanquant::dequantize")
"""The pack's operators (quant/torch_op.py)."""


class Moment(NamedTuple):
    """What is alive after an allocation or a release."""

    flops: int
    """Floating-point operations so far, which stand for the time."""
    activations: int
    scratch: int

    @property
    def nbytes(self) -> int:
        return self.activations + self.scratch


class LiveMemory(TorchDispatchMode):
    """While it is entered, follows every storage that an operation allocates on `device`, from then to its release.

    Storages that existed before (weights) do not count. Decoded weights are scratch, everything else activations.
    What an operation allocates and frees within itself is not seen: workspaces of matrix products and convolutions.

    Attributes:
        now: the present moment.
        peak: the moment with the most bytes.
        history: all moments, if `record`.
    """

    def __init__(self, device: torch.device | str, *, record: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = torch.device(device).type
        self._kernels = _MetaKernels() if self._device_type == "meta" else _call
        self._alive: dict[int, tuple[int, weakref.ref[object]]] = {}
        self._scratch: set[int] = set()
        self._record = record
        self.now = self.peak = Moment(0, 0, 0)
        self.history: list[Moment] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, which takes seconds, to keep it out of the method below.
        return False

    def __torch_dispatch__(
        self, func: OpOverload[..., object], types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = self._kernels(func, args, kwargs)
        if count := _FLOPS.get(func._overloadpacket):
            self.add_flops(count(*args, **kwargs, out_val=out))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in known and storage.device.type == self._device_type:
                self._follow(storage)
        if func._schema.name in _DECODES:
            decoded = args[2] if out is None else out
            self._as_scratch(next(_storages(decoded)))
        return out

    def add_flops(self, flops: int) -> None:
        self._step(self.now._replace(flops=self.now.flops + flops))

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        if key in self._alive:
            return
        self._alive[key] = (nbytes, weakref.ref(storage, lambda _: self._released(key)))
        self._step(self.now._replace(activations=self.now.activations + nbytes))

    def _released(self, key: int) -> None:
        nbytes, _ = self._alive.pop(key)
        part = "scratch" if key in self._scratch else "activations"
        self._scratch.discard(key)
        self._step(self.now._replace(**{part: getattr(self.now, part) - nbytes}))

    def _as_scratch(self, storage: torch.UntypedStorage) -> None:
        """Count a followed storage as scratch from now on; the total does not change."""
        key = storage._cdata
        if key in self._alive and key not in self._scratch:
            self._scratch.add(key)
            moved = self._alive[key][0]
            self._step(Moment(self.now.flops, self.now.activations - moved, self.now.scratch + moved))

    def _step(self, moment: Moment) -> None:
        self.now = moment
        if moment.nbytes >= self.peak.nbytes:
            self.peak = moment
        if self._record:
            self.history.append(moment)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Of the tensors in nested containers; of a packed tensor, that of its bytes."""
    if isinstance(tree, Tensor):
        stored = host.packed_bytes(tree) if isinstance(tree, QuantizedTensor) else tree
        yield stored.untyped_storage()
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _storages(part)
    elif isinstance(tree, dict):
        yield from _storages(tuple(tree.values()))


def _call(func: OpOverload[..., object], args: Arguments, kwargs: Keywords) -> object:
    return func(*args, **kwargs)


class _MetaKernels:
    """Calls of operations on meta tensors, which are many and alike, and slow as torch has most of them in Python.

    What one returned for arguments of the same shapes is made anew. Operations that return views are called.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[_Form] | None] = {}

    def __call__(self, func: OpOverload[..., object], args: Arguments, kwargs: Keywords) -> object:
        key = (func, signature(args), signature(kwargs))
        forms = self._known.get(key)
        if forms:
            remade = [torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta") for form in forms]
            return remade[0] if len(remade) == 1 else tuple(remade)
        if key in self._known:
            return _written(func, args, kwargs)
        out = func(*args, **kwargs)
        aliased = [argument for argument in func._schema.arguments if argument.alias_info]
        outs = out if isinstance(out, tuple) else (out,)
        made = [_Form(o.shape, o.stride(), o.dtype) for o in outs if type(o) is Tensor and o.is_meta]
        if not aliased and len(made) == len(outs):
            self._known[key] = made
        elif aliased and out is _written(func, args, kwargs):
            self._known[key] = None
        return out


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _written(func: OpOverload[..., object], args: Arguments, kwargs: Keywords) -> object:
    """The argument that the operation writes, if it is one."""
    written = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    ]
    return written[0] if len(written) == 1 else None


def signature(value: object) -> Hashable:
    """Equal for arguments that differ only in the values of tensors."""
    if isinstance(value, Tensor):
        return value.device, value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(signature(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, signature(part)) for name, part in value.items())
    return type(value), value
