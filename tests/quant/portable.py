"""PortableOps, which checks that a computation uses only operations that MPS and XPU have, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# According to native_functions.yaml of torch 2.13, each has an MPS kernel or is composed of operations that have one.
# The names of in-place operations are listed without their final underscore.
_OPERATIONS = """
    _to_copy arange cat clone copy detach empty full_like lift_fresh ones_like scalar_tensor zeros_like
    expand permute repeat select slice split split_with_sizes stack t transpose unbind unsqueeze _unsafe_view view
    __lshift__ __rshift__ bitwise_and bitwise_or
    abs add addcmul clamp div floor log2 mul nan_to_num neg pow reciprocal remainder round rsub sub trunc
    amax amin any argmax argmin eq ge gt le lt ne max maximum mean min minimum prod sqrt sum
    embedding gather index index_put index_select masked_fill nonzero where _local_scalar_dense
"""
ALLOWED = frozenset(_OPERATIONS.split())
_SHIFTS = ("__lshift__", "__rshift__")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_DTYPES = frozenset((*_INTEGERS, torch.float16, torch.bfloat16, torch.float32))


class PortableOps(TorchDispatchMode):
    """A context that raises AssertionError for operations and dtypes that MPS or XPU lack; `seen` has all that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        name = name if name.startswith("__") else name.rstrip("_")
        self.seen.add(name)
        assert name in ALLOWED, f"{func} is not on the list of operations that MPS and XPU have"
        result = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)):
            assert tensor.dtype in _DTYPES, f"{func} on {tensor.dtype}"
            assert name not in _SHIFTS or tensor.dtype != torch.uint8, f"{func} on uint8: MPS before torch 2.6 is wrong"
        return result
