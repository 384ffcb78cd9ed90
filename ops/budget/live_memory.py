"""A count of the memory that a computation uses, from the tensors that are alive; they may be on meta."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import host_products
from ..packed.layout import is_packed
from .allocator import Event, most_held_bytes
from .operations import Arguments, Keywords, MetaOperations, Operation, is_view, run, storages

_ALIGNMENT = 512
"""Torch's CUDA allocator rounds requests up to a multiple of this many bytes.

Source: c10/cuda/CUDACachingAllocator.h kMinBlockSize.
"""

_DEQUANTIZE_OPERATORS = ("wanquant::dequantize_into", "wanquant::dequantize")
"""The pack's own operators, of quant/torch_op.py."""

_META_OPERATIONS = MetaOperations()

_PRODUCTS = ("aten::mm", "aten::addmm")
_WORKSPACE = 0
"""Stands for the workspace of a product among the storages, whose numbers are addresses."""


class Moment(NamedTuple):
    """The memory in use after an allocation or a release."""

    flops: int
    """Floating-point operations so far, as a measure of time."""
    activation_bytes: int
    scratch_bytes: int
    """Weights in dequantized form."""

    @property
    def nbytes(self) -> int:
        return self.activation_bytes + self.scratch_bytes


class LiveMemory(TorchDispatchMode):
    """A context manager that counts every storage on `device` from its allocation by an operation to its release.

    Storages that existed before, such as the weights, do not count. Dequantized weights count as scratch, everything
    else as activations. What an operation allocates and frees internally, such as a convolution's workspace, is not
    seen.

    Attributes:
        now: the current moment.
        peak: the moment with the most bytes.
        moved_bytes: what operations read and wrote so far.
        history: all moments, if `record` is true.
    """

    def __init__(self, device: torch.device | str, *, record: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = torch.device(device).type
        self._run = _META_OPERATIONS if self._device_type == "meta" else run
        self._alive: dict[int, tuple[int, weakref.ref[object]]] = {}
        self._scratch: set[int] = set()
        self._record = record
        self.now = self.peak = Moment(0, 0, 0)
        self.moved_bytes = 0
        self.history: list[Moment] = []
        self._events: list[Event] = []

    def held_bytes(self) -> int:
        """Return the most bytes that torch's allocator holds for all of this, which takes a moment."""
        return most_held_bytes(self._events)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, for seconds, to keep it from tracing the method below.
        return False

    def __torch_dispatch__(
        self, func: Operation, types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if is_view(func) and not types:  # A view of a quantized tensor may be a new tensor.
            return func(*args, **kwargs)
        # Quantized tensors of different formats have one signature.
        out, allocated, cost = (run if types else self._run)(func, args, kwargs)
        if cost.flops:
            self._step(flops=cost.flops)
        self.moved_bytes += cost.moved_bytes
        for storage in allocated:
            if storage.device.type == self._device_type:
                self._follow(storage)
        name = func._schema.name
        if name in _PRODUCTS:
            self._multiply(*(arg for arg in args if isinstance(arg, Tensor)))
        if name == "aten::clone" and isinstance(out, QuantizedTensor):
            self._count_as_scratch(next(storages(out)))
        if name in _DEQUANTIZE_OPERATORS:
            dequantized = args[2] if out is None else out
            self._count_as_scratch(next(storages(dequantized)))
        return out

    def _multiply(self, *operands: Tensor) -> None:
        """Count what a product with a quantized weight needs while it runs; `operands` are its input and the weight."""
        x, weight = operands[-2:]
        if isinstance(weight, QuantizedTensor) and not isinstance(x, QuantizedTensor) and not is_packed(weight):
            self._count_as_scratch(next(storages(weight)))
            nbytes = host_products.workspace_bytes(x, weight)
            self._step(scratch=nbytes)
            self._step(scratch=-nbytes)
            self._events += (Event(_WORKSPACE, nbytes), Event(_WORKSPACE, None))

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        if key in self._alive:
            return
        self._alive[key] = (nbytes, weakref.ref(storage, lambda _: self._released(key)))
        self._events.append(Event(key, nbytes))
        self._step(activation=nbytes)

    def _released(self, key: int) -> None:
        nbytes, _ = self._alive.pop(key)
        self._events.append(Event(key, None))
        if key in self._scratch:
            self._scratch.remove(key)
            self._step(scratch=-nbytes)
        else:
            self._step(activation=-nbytes)

    def _count_as_scratch(self, storage: torch.UntypedStorage) -> None:
        """Count a followed storage as scratch from now on; the total does not change."""
        key = storage._cdata
        if key in self._alive and key not in self._scratch:
            self._scratch.add(key)
            moved = self._alive[key][0]
            self._step(activation=-moved, scratch=moved)

    def _step(self, *, flops: int = 0, activation: int = 0, scratch: int = 0) -> None:
        now = self.now
        self.now = moment = Moment(now.flops + flops, now.activation_bytes + activation, now.scratch_bytes + scratch)
        if moment.nbytes >= self.peak.nbytes:
            self.peak = moment
        if self._record:
            self.history.append(moment)
