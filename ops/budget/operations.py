"""What torch's operations allocate, read, write and compute; on meta tensors, found once for calls that are alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from .. import host

_FLOPS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}

Operation = OpOverload[..., object]
Arguments = tuple[object, ...]
Keywords = dict[str, object]

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided")
"""Operations that neither read nor write."""

_MOST_KNOWN = 8192
"""Calls that are remembered, of about 1 KiB each; those of one forward are a few hundred."""


class Cost(NamedTuple):
    """What an operation takes besides memory."""

    flops: int
    """Floating-point operations."""
    moved_bytes: int
    """What it reads and writes."""


class Done(NamedTuple):
    """An operation that has run."""

    out: object
    allocated: Sequence[torch.UntypedStorage]
    """The storages of its outputs that were not there before."""
    cost: Cost


def run(func: Operation, args: Arguments, kwargs: Keywords) -> Done:
    """Run an operation."""
    out = func(*args, **kwargs)
    known = {storage._cdata for storage in storages((args, kwargs))}
    allocated = [storage for storage in storages(out) if storage._cdata not in known]
    count = _FLOPS.get(func._overloadpacket)
    flops = count(*args, **kwargs, out_val=out) if count else 0
    return Done(out, allocated, Cost(flops, _moved_bytes(func, args, kwargs, out)))


class MetaOperations:
    """Runs operations on meta tensors, most of which torch implements slowly, in Python.

    An operation that allocates its outputs is called once per set of argument shapes. Later calls only allocate outputs
    of the same shapes, or return the argument that the operation writes to.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Cost, list[_OutputSpec]]] = {}
        """The outputs are none for an operation that returns the argument it writes to."""

    def __call__(self, func: Operation, args: Arguments, kwargs: Keywords) -> Done:
        key = (func, torch.get_default_dtype(), signature(args), signature(kwargs))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            done = run(func, args, kwargs)
            outs = done.out if isinstance(done.out, tuple) else (done.out,)
            specs = [_OutputSpec(o.shape, o.stride(), o.dtype) for o in outs if type(o) is Tensor and o.is_meta]
            if len(specs) == len(done.allocated) == len(outs):
                self._known[key] = done.cost, specs
            elif done.out is not None and done.out is _written_argument(func, args, kwargs):
                self._known[key] = done.cost, []
            return done
        cost, specs = known
        if not specs:
            return Done(_written_argument(func, args, kwargs), (), cost)
        outputs = [torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta") for spec in specs]
        allocated = [output.untyped_storage() for output in outputs]
        return Done(outputs[0] if len(outputs) == 1 else tuple(outputs), allocated, cost)


class _OutputSpec(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def signature(value: object) -> Hashable:
    """Return a key that is equal for arguments that differ only in the values of their tensors."""
    if isinstance(value, Tensor):
        return value.device, value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes()
    if isinstance(value, list | tuple):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((name, signature(part)) for name, part in value.items())
    return type(value), value


def storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors in nested containers; for a packed tensor, the storage of its bytes."""
    if isinstance(tree, Tensor):
        stored = host.packed_bytes(tree) if isinstance(tree, QuantizedTensor) else tree
        yield stored.untyped_storage()
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from storages(part)
    elif isinstance(tree, dict):
        yield from storages(tuple(tree.values()))


@cache
def is_view(func: Operation) -> bool:
    """Return whether an operation only returns other views of its arguments."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _moved_bytes(func: Operation, args: Arguments, kwargs: Keywords, out: object) -> int:
    """Return the bytes that an operation reads and writes."""
    name = func._schema.name
    if is_view(func) or name in _ALLOCATIONS:
        return 0
    read = args[1:] if name == "aten::copy_" else args
    return sum(_nbytes((read, {key: value for key, value in kwargs.items() if key != "out"}, out)))


def _nbytes(tree: object) -> Iterator[int]:
    """Yield the bytes of the tensors in nested containers, without the repetitions of expanded ones."""
    if isinstance(tree, Tensor):
        yield min(tree.nbytes, next(storages(tree)).nbytes())
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _nbytes(part)
    elif isinstance(tree, dict):
        yield from _nbytes(tuple(tree.values()))


def _written_argument(func: Operation, args: Arguments, kwargs: Keywords) -> object:
    """Return the argument that the operation writes to, or None if it writes to none or to several."""
    written = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(func)]
    return written[0] if len(written) == 1 else None


@cache
def _written(func: Operation) -> tuple[tuple[int, str], ...]:
    """Return the positions and the names of the arguments that an operation writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            found.append((i, argument.name))
    return tuple(found)
