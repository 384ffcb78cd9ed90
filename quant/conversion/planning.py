"""The types of the files that a conversion makes: by recipe or by size, as far as the source's values allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..gguf.header import read_header
from ..gguf.provenance import FIVE_D
from ..plan import target_size as budget
from ..plan.recipe import Fallback, Plan, find_recipe, plan
from ..qtype import QTYPES
from ..sources.checkpoint import Checkpoint
from .job import Job
from .stream import Stream


def plan_jobs(stream: Stream, jobs: Mapping[Job, Mapping[str, Any]]) -> dict[Job, Plan]:
    """The types of every file; those of a size share the errors measured.

    Args:
        jobs: with the metadata that their files get.

    Raises:
        QuantError: a size that cannot be reached.
    """
    tensors = stream.checkpoint.tensors
    sized = [job for job in jobs if job.target_size is not None]
    for job in sized:
        budget.check_size(job.target_bytes, tensors, jobs[job], five_d=jobs[job][FIVE_D])
    plans = {job: plan(find_recipe(job.recipe), tensors) for job in jobs if job not in sized}
    if sized:
        fronts = budget.measure(
            tensors, stream.importance, stream.effort, stream.device, lambda tensor: stream.report(tensor, 0)
        )
        for job in sized:
            five_d = jobs[job][FIVE_D]
            plans[job] = budget.plan_for_size(job.target_bytes, tensors, jobs[job], fronts, five_d=five_d)
    return {job: _within_range(stream, plans[job]) for job in jobs}


def plan_of_reused(checkpoint: Checkpoint, job: Job) -> Plan:
    """What the file that is there was made by; which types a target size would rather have chosen, it does not tell."""
    if job.target_size is not None:
        return Plan({}, ())
    planned, stored = plan(find_recipe(job.recipe), checkpoint.tensors), read_header(job.destination).tensors
    wanted = (name for name, qtype in planned.types.items() if qtype.name == "F16")
    beyond = (_beyond_f16(name) for name in wanted if name in stored and stored[name].qtype.name == "BF16")
    return Plan(planned.types, (*planned.fallbacks, *beyond))


def _within_range(stream: Stream, planned: Plan) -> Plan:
    """Replaces F16 by BF16 for tensors with values that F16 cannot hold."""
    types, fallbacks = dict(planned.types), list(planned.fallbacks)
    for name, tensor in stream.checkpoint.tensors.items():
        if types[name].name == "F16" and tensor.dtype != torch.float16 and not stream.fits_f16(tensor):
            types[name] = QTYPES["BF16"]
            fallbacks.append(_beyond_f16(name))
    return Plan(types, tuple(fallbacks))


def _beyond_f16(name: str) -> Fallback:
    return Fallback(name, "F16", "BF16", "values beyond the range of F16")
