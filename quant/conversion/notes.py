"""Sentences on a conversion, for its report."""

from __future__ import annotations

from ..plan.recipe import TypePlan
from ..sources.checkpoint import Checkpoint
from ..units import counted
from .stream import Stream


def notes_on(stream: Stream, plan: TypePlan, kept: int = 0) -> tuple[str, ...]:
    """Return sentences on what the statistics of the inputs were used for.

    Args:
        kept: the number of tensors that an unfinished conversion had written.
    """
    notes = []
    if stream.biases:
        one, many = "bias makes up for the mean error of its layer", "biases make up for the mean error of their layers"
        notes.append(counted(len(stream.biases), one, many))
    rounded = sum((name, qtype.name) in stream.encoders.rounded for name, qtype in plan.types.items())
    if rounded:
        notes.append(f"{_matrices(rounded)} rounded for the least error of the layers' outputs")
    plainer = [name for name, qtype in plan.types.items() if (name, qtype.name) in stream.encoders.plainer]
    if plainer:
        notes.append(
            f"{_matrices(len(plainer))} rounded by importance alone, because the calibration did not help on tokens"
            f" that it had not seen; the first is {plainer[0]}"
        )
    if kept and (rounded or plainer):
        notes.append(
            f"{counted(kept, 'tensor was', 'tensors were')} kept from an unfinished conversion;"
            " the numbers of matrices are those of the others"
        )
    return tuple(notes)


def _matrices(count: int) -> str:
    return counted(count, "matrix was", "matrices were")


def requantization_warning(checkpoint: Checkpoint) -> list[str]:
    """Return a warning if the source is quantized already."""
    formats = ", ".join(checkpoint.quantized_formats)
    if not formats:
        return []
    return [f"{checkpoint.name} is quantized already ({formats}), so that the errors of both quantizations add up"]


def non_finite_warning(checkpoint: Checkpoint) -> list[str]:
    """Return a warning if values that are not finite became 0."""
    names = sorted(checkpoint.zeroed or ())
    return [f"NaN or infinity became 0 in {counted(len(names), 'tensor')}, the first is {names[0]}"] if names else []
