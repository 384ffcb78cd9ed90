"""Keeps the sampling of a MODEL within a number of GiB: its plan, its weights and the other models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...quant.units import GIB
from .. import host
from ..lean import LeanPlan, apply_lean, one_by_one
from ..loading.prefetch import prefetch_blocks
from ..packed.patcher import PackedPatcher
from .choose_plan import Choice, choose
from .experts import simulate
from .sampling_job import Condition, Job, image_fields
from .simulator import Simulator

logger = logging.getLogger(__name__)

_KEY = "wanquant.budget"
_COMPILED_RUNS_STOCK = (
    "a compiled model runs as in ComfyUI and does not keep to the budget; take TorchCompileModel out of the graph"
)
_POSE_CACHE = (
    "what Wan Animate 2 Cache keeps on the GPU (its buffers, with device gpu the whole cache) is not in the budget"
)


def is_wan(model: ModelPatcher) -> bool:
    return isinstance(model.model.diffusion_model, wan.WanModel)


def with_budget(model: ModelPatcher, budget: int) -> ModelPatcher:
    """A clone of a Wan model that is sampled in `budget` bytes of an accelerator's memory, CUDA's context included.

    The plan is made when sampling begins, from the latent's shape; one that does not fit is refused there. Everything
    else leaves the accelerator, prompts run one after the other, and weights stay as far as there is room.
    """
    sampling = _Sampling(budget)
    patched = _without_prefetch(apply_lean(model, sampling.plan))
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, sampling.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, sampling.prepare),
        (WrappersMP.CALC_COND_BATCH, one_by_one),
        (WrappersMP.DIFFUSION_MODEL, sampling.forward),
    ):
        patched.remove_wrappers_with_key(kind, _KEY)
        patched.add_wrapper_with_key(kind, _KEY, wrapper)
    return patched


def _without_prefetch(model: ModelPatcher) -> ModelPatcher:
    """It would hold two blocks' weights, and by its hooks have each lean block copy its input."""
    present = model.wrappers.get(WrappersMP.DIFFUSION_MODEL, {})
    for key in [key for key, wrappers in present.items() if prefetch_blocks in wrappers]:
        model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, key)
    return model


def preview_job(model: ModelPatcher, width: int, height: int, frames: int) -> Job:
    """One video, from an image where the model takes one.

    Raises:
        QuantError: sizes or frames that Wan cannot take.
    """
    video = Job.of_video(width, height, frames, channels=model.model.latent_format.latent_channels)
    return video.given(**image_fields(257)) if model.model.diffusion_model.img_emb is not None else video


class _Sampling:
    """What the wrappers of one MODEL share."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._mask: dict[str, object] = {}
        """The field of the conditionings that the sampler adds."""
        self._ample = False
        """There is room for all weights."""
        self._choice: Choice | None = None
        self._simulator: Simulator | None = None
        self._patches: object = None

    def plan(self, _: torch.Size) -> LeanPlan | None:
        return self._choice.plan if self._choice else None

    def outer_sample(self, executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        """`args` are (noise, latent image, sampler, sigmas, denoise mask, ...)."""
        mask = args[4] if len(args) > 4 else kwargs.get("denoise_mask")
        self._mask = {} if mask is None else {"denoise_mask": mask}
        out: Tensor = executor(*args, **kwargs)
        return out

    def prepare(
        self,
        executor: WrapperExecutor,
        model: ModelPatcher,
        noise_shape: torch.Size,
        conds: dict[str, list[dict[str, Any]]],
        **kwargs: object,
    ) -> tuple[BaseModel, object, object]:
        each = [Condition.of(self._mask | fields) for conditioning in conds.values() for fields in conditioning]
        job = Job(tuple(noise_shape), tuple(each))
        self._choice = choose(self._simulator_of(model), job, self._budget)
        logger.info("Wan Low VRAM: %s in %.2f GiB: predicted peak %s", job, self._budget / GIB, self._choice)
        if self._choice.plan and model.get_wrappers(WrappersMP.APPLY_MODEL, host.COMPILE_KEY):
            logger.warning("Wan Low VRAM: %s", _COMPILED_RUNS_STOCK)
        if "animate2_cache" in model.model_options.get("transformer_options", {}):
            logger.warning("Wan Low VRAM: %s", _POSE_CACHE)
        room = self._budget - self._choice.peak.total
        self._ample = room >= model.model_size()
        if self._ample or comfy.model_management.is_device_cpu(model.load_device):
            prepared: tuple[BaseModel, object, object] = executor(model, noise_shape, conds, **kwargs)
            _keep_factors(model, room - model.model_size())
            return prepared
        _make_way(model)
        prepared = executor(model, noise_shape, conds, **kwargs | {"force_full_load": False, "force_offload": True})
        _keep_weights(model, room)
        return prepared

    def _simulator_of(self, model: ModelPatcher) -> Simulator:
        if self._simulator is None or self._patches != model.patches_uuid:
            self._simulator, self._patches = simulate(model), model.patches_uuid
        return self._simulator

    def forward(self, executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        with _time_projection_in_main_memory(executor.class_obj, unless=self._ample):
            out: Tensor = executor(*args, **kwargs)
        return out


def _make_way(model: ModelPatcher) -> None:
    """Unload every other model from the accelerator; the host does not where dynamic VRAM could do so later."""
    loaded = comfy.model_management.current_loaded_models
    own = [entry for entry in loaded if entry.model is not None and entry.model.is_clone(model)]
    comfy.model_management.free_memory(1e30, model.load_device, keep_loaded=own)


def _keep_weights(model: ModelPatcher, room: int) -> None:
    """Let as many bytes of weights stay on the accelerator, after they were all offloaded."""
    if not model.is_dynamic():
        model.partially_load(model.load_device, room)
        return
    held = _keep_factors(model, room)
    host.limit_resident(model.model, model.load_device, room - held)


def _keep_factors(model: ModelPatcher, room: int) -> int:
    """Bytes of LoRAs that stay on the accelerator, in the legacy memory mode after the weights, by the patcher itself.

    With dynamic VRAM they come first: the weights are read ahead, the LoRAs where they are used.
    """
    if not (model.is_dynamic() and isinstance(model, PackedPatcher)):
        return 0
    return model.keep_factors_on_device(model.load_device, room)


@contextmanager
def _time_projection_in_main_memory(model: wan.WanModel, *, unless: bool) -> Iterator[None]:
    """While open, the product with the largest weight runs where the weight lies: it has a row for each timestep."""
    layer = model.time_projection[-1]
    if unless or layer.weight.device.type != "cpu":
        yield
        return
    with host.in_place({layer: partial(_on_weights_device, layer)}):
        yield


def _on_weights_device(layer: torch.nn.Linear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """A Linear's forward, its input and what else the host hands it moved to the weight."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(layer.weight.device), (args, kwargs))
    return type(layer).forward(layer, x.to(layer.weight.device), *args, **kwargs).to(x.device)
