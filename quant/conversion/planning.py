"""The types of the files that a conversion makes: by recipe or by size, as far as the source's values allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..gguf.header import read_header
from ..plan.recipe import Fallback, TypePlan, find_recipe, plan
from ..plan.target_size import Front, check_size, measure, plan_for_size
from ..qtype import QTYPES
from ..sources.checkpoint import Checkpoint
from .output import Output
from .settings import Target
from .stream import Stream


def plan_outputs(stream: Stream, outputs: Sequence[Output]) -> list[TypePlan]:
    """Return the types of every file; those with a target size share the errors measured.

    Raises:
        QuantError: a size that cannot be reached.
    """
    tensors, settings = stream.checkpoint.tensors, stream.settings
    sized = [output for output in outputs if output.target.target_size is not None and not output.reused]
    for output in sized:
        check_size(output.target.target_bytes, tensors, output.metadata, five_d=settings.five_d)
    fronts: Mapping[str, Front] = {}
    if sized:
        fronts = measure(
            tensors, stream.importance, settings.effort, stream.device, lambda tensor: stream.report(tensor, 0)
        )
    return [_plan(stream, output, fronts) for output in outputs]


def _plan(stream: Stream, output: Output, fronts: Mapping[str, Front]) -> TypePlan:
    target, tensors = output.target, stream.checkpoint.tensors
    if output.reused:
        return _plan_of_reused(stream.checkpoint, target)
    if target.target_size is None:
        planned = plan(find_recipe(target.recipe), tensors)
    else:
        five_d = stream.settings.five_d
        planned = plan_for_size(target.target_bytes, tensors, output.metadata, fronts, five_d=five_d)
    return _within_range(stream, planned)


def _plan_of_reused(checkpoint: Checkpoint, target: Target) -> TypePlan:
    """Return the plan of the file that is there; it does not record what a target size would rather have chosen."""
    if target.target_size is not None:
        return TypePlan({}, ())
    planned, stored = plan(find_recipe(target.recipe), checkpoint.tensors), read_header(target.destination).tensors
    wanted = (name for name, qtype in planned.types.items() if qtype.name == "F16")
    beyond = (_beyond_f16(name) for name in wanted if name in stored and stored[name].qtype.name == "BF16")
    return TypePlan(planned.types, (*planned.fallbacks, *beyond))


def _within_range(stream: Stream, planned: TypePlan) -> TypePlan:
    """Replace F16 by BF16 for tensors with values that F16 cannot hold."""
    types, fallbacks = dict(planned.types), list(planned.fallbacks)
    for name, tensor in stream.checkpoint.tensors.items():
        if types[name].name == "F16" and tensor.dtype != torch.float16 and not stream.fits_f16(tensor):
            types[name] = QTYPES["BF16"]
            fallbacks.append(_beyond_f16(name))
    return TypePlan(types, tuple(fallbacks))


def _beyond_f16(name: str) -> Fallback:
    return Fallback(name, "F16", "BF16", "values beyond the range of F16")
