"""Wan Animate's tensors under the names of Diffusers, which also splits a matrix.

Source: huggingface/diffusers scripts/convert_wan_to_diffusers.py @ 58eb52c, the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import QuantError
from .renaming import rules
from .tensors import SourceTensor

_CONVOLUTIONS = "motion_encoder.enc.net_app.convs"
_HALVES = (".linear1_k.", ".linear1_v.")
_BOTH = ".linear1_kv."

RULES = (
    *rules(
        (r"(pose_patch_embedding\.|face_encoder\.(?:out_proj\.|padding_tokens$))", r"\1"),
        (r"face_encoder\.(conv1_local|conv2|conv3)\.", r"face_encoder.\1.conv."),
        (r"motion_encoder\.motion_network\.", "motion_encoder.enc.fc."),
        (r"motion_encoder\.motion_synthesis_weight$", "motion_encoder.dec.direction.weight"),
        (r"motion_encoder\.conv_in\.weight", f"{_CONVOLUTIONS}.0.0.weight"),
        (r"motion_encoder\.conv_in\.act_fn\.", f"{_CONVOLUTIONS}.0.1."),
        (r"motion_encoder\.conv_out\.", f"{_CONVOLUTIONS}.8."),
        (r"face_adapter\.(\d{1,9})\.norm_([qk])\.", r"face_adapter.fuser_blocks.\1.\2_norm."),
        (r"face_adapter\.(\d{1,9})\.to_([qkv])\.", r"face_adapter.fuser_blocks.\1.linear1_\2."),
        (r"face_adapter\.(\d{1,9})\.to_out\.", r"face_adapter.fuser_blocks.\1.linear2."),
    ),
    *(
        rule
        for number in range(7)
        for rule in rules(
            (rf"motion_encoder\.res_blocks\.{number}\.conv1\.weight", f"{_CONVOLUTIONS}.{number + 1}.conv1.0.weight"),
            (rf"motion_encoder\.res_blocks\.{number}\.conv1\.act_fn\.", f"{_CONVOLUTIONS}.{number + 1}.conv1.1."),
            (rf"motion_encoder\.res_blocks\.{number}\.conv2\.weight", f"{_CONVOLUTIONS}.{number + 1}.conv2.1.weight"),
            (rf"motion_encoder\.res_blocks\.{number}\.conv2\.act_fn\.", f"{_CONVOLUTIONS}.{number + 1}.conv2.2."),
            (rf"motion_encoder\.res_blocks\.{number}\.conv_skip\.", f"{_CONVOLUTIONS}.{number + 1}.skip.1."),
        )
    ),
)


class _Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


_T = TypeVar("_T", bound=_Named)


@dataclass(frozen=True)
class JoinedTensor(SourceTensor):
    """The concatenation of two tensors of the same dtype along their rows."""

    first: SourceTensor
    second: SourceTensor

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self._stop(stop)
        middle = math.prod(self.first.shape)
        parts = []
        if start < middle:
            parts.append(self.first.read(start, min(stop, middle)))
        if stop > middle:
            parts.append(self.second.read(max(start, middle) - middle, stop - middle))
        return torch.cat(parts)


def with_joined_halves(tensors: Iterable[_T], join: Callable[[str, _T, _T], _T]) -> Iterator[_T]:
    """Yield the tensors as ComfyUI has them: the keys and values of the face adapter are one matrix.

    Args:
        tensors: the tensors under ComfyUI's names.
        join: the function from a name and the tensors of keys and values to their concatenation along the rows.

    Raises:
        QuantError: keys without values, or values without keys.
    """
    halves: dict[str, _T] = {}
    for tensor in tensors:
        name = tensor.name
        half = next((half for half in _HALVES if half in name), None)
        if half is None:
            yield tensor
            continue
        joined = name.replace(half, _BOTH)
        other = halves.pop(joined, None)
        if other is None:
            halves[joined] = tensor
        else:
            yield join(joined, *((other, tensor) if half == _HALVES[1] else (tensor, other)))
    for tensor in halves.values():
        raise QuantError(
            f"tensor {tensor.name}: its counterpart is missing, expected one with"
            f" {_HALVES[0]} and one with {_HALVES[1]}; download the checkpoint again"
        )


def joined_tensor(name: str, key: SourceTensor, value: SourceTensor) -> SourceTensor:
    """Return the concatenation of two tensors along their rows."""
    shape = joined_shape(key, value, (str(key.dtype), str(value.dtype)), "download the checkpoint again")
    return JoinedTensor(name, key.dtype, shape, key.stored, key, value)


def joined_shape(key: _Named, value: _Named, types: tuple[str, str], advice: str) -> tuple[int, ...]:
    """Return the shape of the concatenation of two tensors along their rows.

    Args:
        types: the names of their types.
        advice: what to do if they do not fit.

    Raises:
        QuantError: the types or the lengths of the rows differ, or a tensor has 0 dimensions.
    """
    if types[0] != types[1] or not key.shape or not value.shape or key.shape[1:] != value.shape[1:]:
        raise QuantError(
            f"tensors {key.name} and {value.name}: {types[0]} {key.shape} and {types[1]} {value.shape},"
            f" expected the same type and rows of the same length; {advice}"
        )
    return (key.shape[0] + value.shape[0], *key.shape[1:])
