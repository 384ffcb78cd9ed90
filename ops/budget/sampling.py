"""Sampling within a budget: the wrappers that Wan Low VRAM adds to a MODEL, in the order in which ComfyUI calls them.

1. The node Wan Low VRAM calls `with_budget`, which only adds wrappers to a clone. The node also predicts a peak for its
   width, height and frames, to show it; sampling does not use that prediction.
2. A sampler node starts a sampling: OUTER_SAMPLE, `_BudgetedSampling.outer_sample`, notes the denoise mask.
3. ComfyUI is about to load the model: PREPARE_SAMPLING, `_BudgetedSampling.prepare`, chooses the memory plan for the
   latent and its conditionings, or refuses. What the plan leaves of the budget is the room for weights.
   a) All weights have room, or the device is the CPU: ComfyUI loads the model as usual. What is left after that holds
      8-bit rows of weights, if products are in 8-bit integers.
   b) Otherwise all other models leave the accelerator, and ComfyUI loads this one with its weights offloaded: all of
      them on NVIDIA. Elsewhere MIN_WEIGHT_MEMORY_RATIO (comfy/model_management.py) may keep some in legacy mode.
      Legacy memory mode: `partially_load` then moves weights to the accelerator until the room is used.
      Dynamic VRAM: LoRA factors take their share of the room first. The rest is the limit up to which streamed weights
      stay on the accelerator. ComfyUI removes the limit as the sampler node returns (execution.py, 0.30.0).
4. Each step: PREDICT_NOISE, `_BudgetedSampling.step`, notes the time. CALC_COND_BATCH, `calc_conds_separately`, which
   some nodes call more than once, runs one forward per conditioning.
5. Each forward: DIFFUSION_MODEL. `apply_lean` replaces the blocks as the plan says, or leaves ComfyUI's own, and
   `_BudgetedSampling.forward` runs the time projection in main memory in case b).
6. The sampling ends: the 8-bit rows are freed. The weights stay where they are until ComfyUI needs the memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import comfy.model_management
import comfy.sample
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...quant import QuantError
from ...quant.errors import PrintableLog
from ...quant.units import GIB
from .. import host, host_products
from ..lean import MemoryPlan, apply_lean, calc_conds_separately
from ..lean.weights import is_untouched
from ..loading.prefetch import prefetch_blocks
from ..packed.precision import precision_of
from .automatic import AUTOMATIC, automatic_budget
from .causal import frames_at_a_time, is_causal
from .choose_plan import ChosenPlan, choose_plan
from .experts import simulator_for
from .memory_notes import attention_of, memory_notes
from .resident import keep_factors, keep_weights, unload_other_models
from .row_room import keep_rows, row_room, spendable
from .sampling_job import ConditioningOutline, SamplingJob, clip_vision_entries
from .simulator import Simulator, check_predictable, check_prompts
from .step_time import StepClock, step_key
from .windows import frames_in_a_window

logger = PrintableLog(__name__)

_KEY = "wanquant.budget"
_COMPILED_RUNS_STOCK = (
    "a compiled model runs ComfyUI's own forward and may exceed the budget; remove TorchCompileModel from the workflow"
)
_NOT_A_NUMBER = (
    "the result is not a number (NaN); choose precision exact in the loader if it is int8, and bfloat16 or float32 as"
    " compute_dtype if it is float16"
)
_POSE_CACHE = (
    "the budget does not include what Wan Animate 2 Cache keeps on the GPU: its buffers, and with device gpu the whole"
    " cache"
)


def is_wan(model: ModelPatcher) -> bool:
    return isinstance(model.model.diffusion_model, wan.WanModel)


def with_budget(model: ModelPatcher, budget: int, expected: tuple[int, ...] | None = None) -> ModelPatcher:
    """Return a clone of a Wan model that is sampled within a budget.

    A latent that cannot be sampled within the budget raises QuantError when its sampling starts.

    Args:
        budget: bytes of accelerator memory, including CUDA's context; `AUTOMATIC` is chosen when sampling starts.
        expected: the shape of the latent that was predicted for. The log says if another one is sampled.

    Raises:
        QuantError: the weights are tensors of another pack, whose memory use is unknown.
    """
    check_predictable(model)
    sampling = _BudgetedSampling(budget, expected)
    patched = _without_prefetch(apply_lean(model, sampling.plan))
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, sampling.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, sampling.prepare),
        (WrappersMP.PREDICT_NOISE, sampling.step),
        (WrappersMP.CALC_COND_BATCH, calc_conds_separately),
        (WrappersMP.DIFFUSION_MODEL, sampling.forward),
    ):
        patched.remove_wrappers_with_key(kind, _KEY)
        patched.add_wrapper_with_key(kind, _KEY, wrapper)
    return patched


def _without_prefetch(model: ModelPatcher) -> ModelPatcher:
    """Remove the loader's prefetch, in place.

    It holds the weights of two blocks. Its hooks on blocks also make each lean block copy its input.
    """
    present = model.wrappers.get(WrappersMP.DIFFUSION_MODEL, {})
    for key in [key for key, wrappers in present.items() if prefetch_blocks in wrappers]:
        model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, key)
    return model


def expected_job(model: ModelPatcher, width: int, height: int, frames: int) -> SamplingJob:
    """Return the job of one video of this size, from an image if the model is an image-to-video model.

    A causal model makes it frame by frame.

    Raises:
        QuantError: the model does not support this size or number of frames.
    """
    video = SamplingJob.for_video(width, height, frames, channels=model.model.latent_format.latent_channels)
    return _from_image(model, video)


def job_of_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> SamplingJob:
    """Return the job of one latent, from an image as for `expected_job`.

    Args:
        latent: ComfyUI's dict. Its samples are of any dtype, (batch, channels, frames, height, width), or what samplers
            make that of: a picture, and an empty latent of any model.

    Raises:
        QuantError: the latent is not one of a video for this model.
    """
    ratios = (latent.get(f"downscale_ratio_{name}") for name in ("spacial", "temporal"))
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
    channels = model.model.latent_format.latent_channels
    if samples.ndim != 5 or samples.shape[1] != channels or 0 in samples.shape:
        raise QuantError(
            f"latent of shape {tuple(samples.shape)}: expected (batch, {channels}, frames, height, width) for this Wan"
            " model; connect the latent that its sampler gets, or none"
        )
    return _from_image(model, SamplingJob(tuple(samples.shape)))


def _from_image(model: ModelPatcher, job: SamplingJob) -> SamplingJob:
    if is_causal(model.model.diffusion_model):
        return replace(job, frames_at_a_time=1)
    job = replace(job, frames_at_a_time=frames_in_a_window(model.model_options, job.latent[2]))
    from_image = model.model.diffusion_model.img_emb is not None
    return job.with_entries(**clip_vision_entries(257)) if from_image else job


class _BudgetedSampling:
    """The wrappers of one MODEL and the state that they share."""

    def __init__(self, budget: int, expected: tuple[int, ...] | None) -> None:
        self._budget, self._expected, self._clock = budget, expected, StepClock()
        self._step_key: Hashable = None
        self._mask_entries: dict[str, object] = {}
        """What the sampler adds to each conditioning."""
        self._frames_at_a_time: int | None = None
        self._frames = 0
        """The latent frames of the whole video that is sampled."""
        self._weights_have_room = False
        """The budget includes all weights, so that none are streamed."""
        self._chosen: ChosenPlan | None = None
        self._simulator: Simulator | None = None
        self._simulated: Hashable = None
        """What the simulator depends on besides the model."""
        self._until_end: ExitStack | None = None
        """What is undone when the sampling ends, also after an error or an interruption."""

    def plan(self, _: torch.Size) -> MemoryPlan | None:
        return self._chosen.plan if self._chosen else None

    def outer_sample(self, executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        """Wrap ComfyUI's `CFGGuider.outer_sample`, whose arguments are noise, latent, sampler, sigmas and mask."""
        mask = args[4] if len(args) > 4 else kwargs.get("denoise_mask")
        noise: Any = args[0] if args else kwargs["noise"]
        self._frames = noise.shape[2]
        self._frames_at_a_time = frames_at_a_time(args[2] if len(args) > 2 else kwargs.get("sampler"))
        self._mask_entries = {} if mask is None else {"denoise_mask": mask}
        self._clock = StepClock()  # A sampling that was interrupted left its steps in the one before.
        try:
            with ExitStack() as self._until_end:
                out: Tensor = executor(*args, **kwargs)
        finally:
            self._until_end = None
        self._clock.keep(self._step_key)
        if torch.isnan(out).any():
            logger.warning("Wan Low VRAM: %s", _NOT_A_NUMBER)
        return out

    def step(self, executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        """Wrap ComfyUI's `CFGGuider.predict_noise`."""
        self._clock.step()
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
        """Wrap ComfyUI's `prepare_sampling`, which loads the model.

        Raises:
            QuantError: the sampling exceeds the budget with every memory plan, or a prompt is for another model.
        """
        check_prompts(model.model.diffusion_model, (cond for each in conds.values() for cond in each))
        outlines = (
            ConditioningOutline.from_entries(self._mask_entries | cond) for each in conds.values() for cond in each
        )
        window = frames_in_a_window(model.model_options, self._frames)
        # ComfyUI's own wrapper may have replaced the frames by those of a window.
        latent = (*noise_shape[:2], self._frames, *noise_shape[3:]) if window else tuple(noise_shape)
        job = SamplingJob(latent, tuple(outlines), self._frames_at_a_time or window)
        if self._expected not in (None, job.latent):
            logger.warning(
                "Wan Low VRAM: the latent at its input has the shape %s, but %s is sampled; the memory plan is for the"
                " latter, and the predicted peak and the tiles are for the former",
                self._expected,
                job.latent,
            )
        budget = self._budget or automatic_budget(model.load_device)
        self._chosen = choose_plan(self._simulator_of(model), job, budget, is_all=self._budget == AUTOMATIC)
        self._step_key = step_key(model, job.latent, self._chosen.plan)
        precision = precision_of(model.model.model_config.custom_operations)
        line = "Wan Low VRAM: %s in %.2f GiB: predicted peak %s; precision %s"
        logger.info(line, job, budget / GIB, self._chosen, precision)
        for note in memory_notes(model):
            logger.info("Wan Low VRAM: %s", note)
        if self._chosen.plan and model.get_wrappers(WrappersMP.APPLY_MODEL, host.COMPILE_KEY):
            logger.warning("Wan Low VRAM: %s", _COMPILED_RUNS_STOCK)
        if "animate2_cache" in model.model_options.get("transformer_options", {}):
            logger.warning("Wan Low VRAM: %s", _POSE_CACHE)
        room = budget - self._chosen.peak.total_bytes
        self._weights_have_room = room >= model.model_size()
        if self._weights_have_room or comfy.model_management.is_device_cpu(model.load_device):
            prepared: tuple[BaseModel, object, object] = executor(model, noise_shape, conds, **kwargs)
            factor_bytes = keep_factors(model, room - model.model_size())
            self._keep_rows(model, job, spendable(model, budget) - factor_bytes)
            return prepared
        unload_other_models(model)
        prepared = executor(model, noise_shape, conds, **kwargs | {"force_full_load": False, "force_offload": True})
        keep_weights(model, room)
        return prepared

    def _keep_rows(self, model: ModelPatcher, job: SamplingJob, budget: int) -> None:
        """Keep 8-bit rows until the sampling ends. Outside `outer_sample` nothing would say when that is."""
        if self._until_end is not None and self._chosen:
            peak = self._chosen.peak
            if kept := keep_rows(model, row_room(model, job, peak, budget), peak):
                self._until_end.callback(kept.release)

    def _simulator_of(self, model: ModelPatcher) -> Simulator:
        wanted = model.patches_uuid, attention_of(model)
        if self._simulator is None or self._simulated != wanted:
            self._simulator, self._simulated = simulator_for(model), wanted
        return self._simulator

    def forward(self, executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        """Wrap the forward of the transformer."""
        with _time_projection_in_main_memory(executor.class_obj, unless=self._weights_have_room):
            out: Tensor = executor(*args, **kwargs)
        return out


@contextmanager
def _time_projection_in_main_memory(model: wan.WanModel, *, unless: bool) -> Iterator[None]:
    """While open, multiply with the time projection's offloaded weight on the CPU.

    It is the model's largest weight, and its input has one row per time step. A forward of another node, such as that
    of a LoRA in bypass mode, is left alone.
    """
    layer = model.time_projection[-1]
    if unless or layer.weight.device.type != "cpu" or not is_untouched(layer):
        yield
        return
    with host.in_place({layer: partial(_on_weights_device, layer)}):
        yield


def _on_weights_device(layer: torch.nn.Linear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Run a Linear on the device of its weight, and return the output on the device of `x`."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(layer.weight.device), (args, kwargs))
    held = host_products.without_pages(layer)
    return type(layer).forward(held, x.to(layer.weight.device), *args, **kwargs).to(x.device)
