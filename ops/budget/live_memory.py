"""A count of the memory that a computation uses, from the tensors that are alive; they may be on meta."""

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

from .. import host, host_products
from ..packed.layout import is_packed
from .allocator import Event, most_held_bytes

_FLOPS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}

Arguments = tuple[object, ...]
Keywords = dict[str, object]

_ALIGNMENT = 512
"""Torch's CUDA allocator rounds requests up to a multiple of this many bytes.

Source: c10/cuda/CUDACachingAllocator.h kMinBlockSize.
"""

_DEQUANTIZE_OPERATORS = ("wanquant::dequantize_into", "wanquant::dequantize")
"""The pack's own operators, of quant/torch_op.py."""

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided")
"""Operations that neither read nor write."""

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
        self._kernels = _MetaKernels() if self._device_type == "meta" else _call
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
        self, func: OpOverload[..., object], types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = self._kernels(func, args, kwargs)
        if count := _FLOPS.get(func._overloadpacket):
            self._step(self.now._replace(flops=self.now.flops + count(*args, **kwargs, out_val=out)))
        self.moved_bytes += _moved_bytes(func, args, kwargs, out)
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in known and storage.device.type == self._device_type:
                self._follow(storage)
        if func._schema.name in _PRODUCTS:
            self._multiply(*(arg for arg in args if isinstance(arg, Tensor)))
        if func._schema.name == "aten::clone" and isinstance(out, QuantizedTensor):
            self._count_as_scratch(next(_storages(out)))
        if func._schema.name in _DEQUANTIZE_OPERATORS:
            dequantized = args[2] if out is None else out
            self._count_as_scratch(next(_storages(dequantized)))
        return out

    def _multiply(self, *operands: Tensor) -> None:
        """Count what a product with a quantized weight needs while it runs; `operands` are its input and the weight."""
        x, weight = operands[-2:]
        if isinstance(weight, QuantizedTensor) and not isinstance(x, QuantizedTensor) and not is_packed(weight):
            self._count_as_scratch(next(_storages(weight)))
            nbytes = host_products.workspace_bytes(x, weight)
            self._step(self.now._replace(scratch_bytes=self.now.scratch_bytes + nbytes))
            self._step(self.now._replace(scratch_bytes=self.now.scratch_bytes - nbytes))
            self._events += (Event(_WORKSPACE, nbytes), Event(_WORKSPACE, None))

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        if key in self._alive:
            return
        self._alive[key] = (nbytes, weakref.ref(storage, lambda _: self._released(key)))
        self._events.append(Event(key, nbytes))
        self._step(self.now._replace(activation_bytes=self.now.activation_bytes + nbytes))

    def _released(self, key: int) -> None:
        nbytes, _ = self._alive.pop(key)
        self._events.append(Event(key, None))
        part = "scratch_bytes" if key in self._scratch else "activation_bytes"
        self._scratch.discard(key)
        self._step(self.now._replace(**{part: getattr(self.now, part) - nbytes}))

    def _count_as_scratch(self, storage: torch.UntypedStorage) -> None:
        """Count a followed storage as scratch from now on; the total does not change."""
        key = storage._cdata
        if key in self._alive and key not in self._scratch:
            self._scratch.add(key)
            moved = self._alive[key][0]
            self._step(Moment(self.now.flops, self.now.activation_bytes - moved, self.now.scratch_bytes + moved))

    def _step(self, moment: Moment) -> None:
        self.now = moment
        if moment.nbytes >= self.peak.nbytes:
            self.peak = moment
        if self._record:
            self.history.append(moment)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors in nested containers; for a packed tensor, the storage of its bytes."""
    if isinstance(tree, Tensor):
        stored = host.packed_bytes(tree) if isinstance(tree, QuantizedTensor) else tree
        yield stored.untyped_storage()
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _storages(part)
    elif isinstance(tree, dict):
        yield from _storages(tuple(tree.values()))


def _moved_bytes(func: OpOverload[..., object], args: Arguments, kwargs: Keywords, out: object) -> int:
    """Return the bytes that an operation reads and writes."""
    name = func._schema.name
    if _is_view(func) or name in _ALLOCATIONS:
        return 0
    read = args[1:] if name == "aten::copy_" else args
    return sum(_nbytes((read, {key: value for key, value in kwargs.items() if key != "out"}, out)))


def _is_view(func: OpOverload[..., object]) -> bool:
    """Return whether an operation only returns other views of its arguments."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _nbytes(tree: object) -> Iterator[int]:
    """Yield the bytes of the tensors in nested containers, without the repetitions of expanded ones."""
    if isinstance(tree, Tensor):
        yield min(tree.nbytes, next(_storages(tree)).nbytes())
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _nbytes(part)
    elif isinstance(tree, dict):
        yield from _nbytes(tuple(tree.values()))


def _call(func: OpOverload[..., object], args: Arguments, kwargs: Keywords) -> object:
    return func(*args, **kwargs)


class _MetaKernels:
    """A cache of operations on meta tensors, most of which torch implements slowly, in Python.

    An operation that allocates its outputs is called once per set of argument shapes. Later calls only allocate outputs
    of the same shapes, or return the argument that the operation writes to. Operations that return views are always
    called.
    """

    def __init__(self) -> None:
        self._outputs: dict[Hashable, list[_OutputSpec] | None] = {}
        """None for an operation that returns the argument it writes to."""

    def __call__(self, func: OpOverload[..., object], args: Arguments, kwargs: Keywords) -> object:
        key = (func, signature(args), signature(kwargs))
        specs = self._outputs.get(key)
        if specs:
            outputs = [torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta") for spec in specs]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        if key in self._outputs:
            return _written_argument(func, args, kwargs)
        out = func(*args, **kwargs)
        aliased = [argument for argument in func._schema.arguments if argument.alias_info]
        outs = out if isinstance(out, tuple) else (out,)
        allocated = [_OutputSpec(o.shape, o.stride(), o.dtype) for o in outs if type(o) is Tensor and o.is_meta]
        if not aliased and len(allocated) == len(outs):
            self._outputs[key] = allocated
        elif aliased and out is _written_argument(func, args, kwargs):
            self._outputs[key] = None
        return out


class _OutputSpec(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _written_argument(func: OpOverload[..., object], args: Arguments, kwargs: Keywords) -> object:
    """Return the argument that the operation writes to, or None if it writes to none or to several."""
    written = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    ]
    return written[0] if len(written) == 1 else None


def signature(value: object) -> Hashable:
    """Return a key that is equal for arguments that differ only in the values of their tensors."""
    if isinstance(value, Tensor):
        return value.device, value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(signature(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, signature(part)) for name, part in value.items())
    return type(value), value
