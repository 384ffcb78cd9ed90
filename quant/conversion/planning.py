"""The type plans of a conversion: by recipe or by size, with BF16 in place of F16 where values are too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import QuantError
from ..native.layer_type import LayerType
from ..plan.container import Container, GGUFContainer, NativeContainer
from ..plan.recipe import Fallback, TypePlan, find_recipe, plan_types
from ..plan.target_size import ParetoFront, check_size, measure, plan_for_size
from ..qtype import QTYPES
from ..safetensors.header import read_any_header
from ..sources.checkpoint import Checkpoint
from .layer_encoder import LayerEncoder
from .output import Output, tokenizer_of
from .settings import Target
from .stream import Stream


def plan_outputs(stream: Stream, outputs: Sequence[Output]) -> list[TypePlan]:
    """Return the type plan of every file; files with a target size share one measurement of the errors.

    Raises:
        QuantError: a size that cannot be reached with this model.
    """
    tensors, settings = stream.checkpoint.tensors, stream.settings
    # The encoders of the small types at effort "fast" need more than a source.
    searches = settings.effort != "fast"
    sized = [output for output in outputs if output.target.target_size is not None and not output.reused]
    for output in outputs:
        check_output(stream, output)
    fronts: dict[Container, Mapping[str, ParetoFront]] = {}
    for container in {_container(stream, output): None for output in sized}:
        small = searches and any(
            _is_small(stream, output) for output in sized if _container(stream, output) == container
        )
        fronts[container] = measure(
            tensors,
            stream.importance,
            settings.effort,
            stream.device,
            lambda t: stream.advance(t, 0),
            container,
            small=small,
        )
    plans = [_plan(stream, output, fronts.get(_container(stream, output), {})) for output in outputs]
    for plan, output in zip(plans, outputs, strict=True):
        if not output.reused:
            _try_encoders(stream, plan)
    return plans


def check_output(stream: Stream, output: Output) -> None:
    """Refuse a file that cannot be made of this model, before any value is read.

    Raises:
        QuantError: a size that cannot be reached, or a type that this effort cannot write.
    """
    target, tensors, searches = output.target, stream.checkpoint.tensors, stream.settings.effort != "fast"
    if output.reused:
        return
    if target.target_size is not None:
        check_size(target.target_bytes, tensors, output.metadata, _container(stream, output), small=searches)
    else:
        _try_encoders(stream, plan_types(find_recipe(target.recipe), tensors))


def _container(stream: Stream, output: Output) -> Container:
    if not output.target.is_native:
        return GGUFContainer(stream.settings.five_d)
    return NativeContainer(find_recipe(output.target.recipe).base, len(tokenizer_of(stream.checkpoint)))


def _is_small(stream: Stream, output: Output) -> bool:
    size, tensors = output.target.target_bytes, stream.checkpoint.tensors
    return _container(stream, output).is_small(size, tensors, output.metadata)


def _try_encoders(stream: Stream, plan: TypePlan) -> None:
    """Refuse types that this effort cannot write here, before any tensor is quantized.

    Each is tried with importance and without, as far as tensors have any.
    """
    names = {(qtype, name in stream.importance): name for name, qtype in reversed(plan.types.items())}
    for (qtype, is_known), name in names.items():
        if isinstance(qtype, LayerType):
            continue
        block = torch.ones(1, qtype.block_size, device=stream.device)
        encoder = LayerEncoder(block[0]) if is_known else LayerEncoder()
        try:
            encoder.quantize(qtype, block, stream.settings.effort)
        except QuantError as error:
            raise QuantError(f"tensor {name}: {error}") from None


def _plan(stream: Stream, output: Output, fronts: Mapping[str, ParetoFront]) -> TypePlan:
    target, tensors = output.target, stream.checkpoint.tensors
    if output.reused:
        return _plan_of_reused(stream.checkpoint, target)
    if target.target_size is None:
        type_plan = plan_types(find_recipe(target.recipe), tensors)
    else:
        container = _container(stream, output)
        if not _is_small(stream, output):  # whatever other files of this pass needed
            fronts = {name: front.without_small() for name, front in fronts.items()}
        type_plan = plan_for_size(target.target_bytes, tensors, output.metadata, fronts, container)
    return _with_bf16(stream, type_plan)


def _plan_of_reused(checkpoint: Checkpoint, target: Target) -> TypePlan:
    """Return the plan of a file that exists already; for a target size, the file does not record any fallbacks."""
    if target.target_size is not None:
        return TypePlan({}, ())
    type_plan = plan_types(find_recipe(target.recipe), checkpoint.tensors)
    stored = read_any_header(target.destination).tensors
    planned_f16 = (name for name, qtype in type_plan.types.items() if qtype.name == "F16")
    too_large = (_too_large(name) for name in planned_f16 if name in stored and stored[name].stored == "BF16")
    return TypePlan(type_plan.types, (*type_plan.fallbacks, *too_large))


def _with_bf16(stream: Stream, type_plan: TypePlan) -> TypePlan:
    """Replace F16 by BF16 for tensors with values beyond the range of F16."""
    types, fallbacks = dict(type_plan.types), list(type_plan.fallbacks)
    for name, tensor in stream.checkpoint.tensors.items():
        if types[name].name == "F16" and tensor.dtype != torch.float16 and not stream.is_within_f16(tensor):
            types[name] = QTYPES["BF16"]
            fallbacks.append(_too_large(name))
    return TypePlan(types, tuple(fallbacks))


def _too_large(name: str) -> Fallback:
    return Fallback(name, "F16", "BF16", "values beyond the range of F16")
