"""Peak memory of sampling a Wan model, found by running the host's own forward on meta tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..quant import QuantError
from .linear import packed_modules
from .live_memory import LiveMemory
from .low_vram import LeanPlan, apply_lean
from .meta_wan import META, meta_twin
from .patch_rows import Patch
from .patches import OnTheFly

GIB = 1 << 30
CONTEXT_BYTES = round(0.4 * GIB)
"""CUDA's context and libraries, before any tensor."""

# What a sampler holds at the latent's size during a forward, in float32: its state, the noise, the latent image, the
# previous prediction, and of each of two conditionings the output and the weights it is averaged with.
_SAMPLER_LATENTS = 8
_PROMPT_TOKENS = 512
_HAS_FUSED_NORMS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
_CLIP_WIDTH = 1280

TIME_PROJECTION = "diffusion_model.time_projection.1"
"""A sixth of a gigabyte in 16 bits, for a product with a single row: a plan leaves it in main memory."""


@dataclass(frozen=True)
class Job:
    """The inputs of one forward that its memory depends on."""

    latent: tuple[int, ...]
    """(batch, channels, frames, height, width)."""
    image_tokens: int = 0
    """Of CLIP vision, 257 an image."""
    control_streams: int = 0
    """Of VACE."""
    masked: bool = False
    """With a mask of what to sample, by which the 5B has a time for each frame."""

    @classmethod
    def of_video(cls, width: int, height: int, frames: int, *, channels: int = 16) -> Job:
        """One video of so many pixels.

        Args:
            channels: of the latent: 16 for Wan 2.1's VAE, 48 for Wan 2.2's.

        Raises:
            QuantError: sizes or frames that Wan cannot take.
        """
        step = 2 * _pixels(channels)
        if width < step or height < step or width % step or height % step:
            raise QuantError(f"size {width}x{height}: this Wan model takes multiples of {step} from {step} on")
        if frames < 1 or frames % 4 != 1:
            raise QuantError(f"frames {frames}: Wan takes 1, 5, 9, ... (a multiple of 4 and 1 more)")
        size = height // _pixels(channels), width // _pixels(channels)
        return cls((1, channels, frames // 4 + 1, *size))

    def with_latent_frames(self, frames: int) -> Job:
        batch, channels, _, *size = self.latent
        return replace(self, latent=(batch, channels, frames, *size))

    def __str__(self) -> str:
        batch, channels, frames, height, width = self.latent
        pixels = _pixels(channels)
        videos = f"{batch} videos of " if batch > 1 else ""
        return f"{videos}{pixels * width}x{pixels * height}, {4 * frames - 3} frames"


def _pixels(channels: int) -> int:
    """To a side of a latent's cell."""
    return 16 if channels == 48 else 8


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment that needs most of them, and the arithmetic of the whole forward."""

    weights: int
    scratch: int
    activations: int
    flops: int
    context: int = CONTEXT_BYTES

    @property
    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("weights", "scratch", "activations", "context")}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {nbytes / GIB:.2f}" for name, nbytes in self.parts.items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


class Simulator:
    """Runs forwards of one model on meta tensors, with the plans in place.

    What it assumes: attention as flash attention (an output and a float32 row of statistics, no matrix of scores), RMS
    norm as the kernel that torch has for it on GPUs, rope in torch operations, decoding in fused kernels. Weights are
    streamed: at any time the packed bytes of two layers are there, the one in use and the next, the largest two of the
    model, and what the host cannot stream.
    """

    def __init__(self, model: BaseModel, *, weights: int) -> None:
        """`model` is on meta tensors; `weights` are the bytes of the true model's, see `streamed_bytes`."""
        self._model, self._weights = model, weights
        self._known: dict[tuple[Job, LeanPlan | None], Peak] = {}

    @classmethod
    def of(cls, patcher: ModelPatcher) -> Simulator:
        """For a loaded MODEL with its LoRAs."""
        model = meta_twin(patcher.model)
        _attach_patches(model, patcher)
        return cls(model, weights=streamed_bytes(patcher.model))

    @property
    def heads(self) -> int:
        """Of the self-attention."""
        return int(self._model.diffusion_model.num_heads)

    def peak(self, job: Job, plan: LeanPlan | None) -> Peak:
        """`plan` is None for the host's own forward."""
        if (job, plan) not in self._known:
            memory = self.run(job, plan)
            moment = memory.peak
            self._known[job, plan] = Peak(self._weights, moment.scratch, moment.activations, memory.now.flops)
        return self._known[job, plan]

    def run(self, job: Job, plan: LeanPlan | None, *, record: bool = False) -> LiveMemory:
        """One forward; the memory's history is that of the first blocks."""
        patcher = ModelPatcher(self._model, META, META)
        if plan:
            patcher = apply_lean(patcher, plan)
        memory = LiveMemory(META, record=record)
        # The host samples in inference mode, where the count would not see operations that are made of others.
        with torch.inference_mode(False), torch.no_grad(), memory, _FusedNorms():
            options = {"wrappers": patcher.wrappers, "optimized_attention_override": _FlashAttention(memory)}
            state = torch.empty(_SAMPLER_LATENTS, *job.latent, device=META)
            time = torch.ones(job.latent[0], device=META)
            self._model.apply_model(state[0], time, transformer_options=options, **self._inputs(job))
        return memory

    def _inputs(self, job: Job) -> dict[str, Any]:
        batch, channels, *size = job.latent
        model = self._model.diffusion_model
        prompt = torch.empty(batch, _PROMPT_TOKENS, model.text_dim, device=META)
        inputs: dict[str, Any] = {"c_crossattn": prompt}
        if model.in_dim > channels:
            inputs["c_concat"] = torch.empty(batch, model.in_dim - channels, *size, device=META)
        if job.image_tokens:
            inputs["clip_fea"] = torch.empty(batch, job.image_tokens, _CLIP_WIDTH, device=META)
        if job.masked:
            inputs["denoise_mask"] = torch.empty(job.latent, device=META)
        if job.control_streams:
            control = (batch, job.control_streams, model.vace_in_dim, *size)
            inputs |= {"vace_context": torch.empty(control, device=META), "vace_strength": [1.0] * job.control_streams}
        return inputs


@dataclass(frozen=True)
class _FlashAttention:
    """In place of the host's attention: allocates what flash attention does."""

    memory: LiveMemory
    takes_some_queries: bool = True

    def __call__(
        self, _: object, q: Tensor, k: Tensor, v: Tensor, heads: int, *_args: object, **_kwargs: object
    ) -> Tensor:
        batch, queries, width = q.shape
        self.memory.add_flops(4 * batch * queries * k.shape[1] * width)
        statistics = q.new_empty(batch, heads, queries, dtype=torch.float32)
        output = torch.empty_like(q)
        del statistics
        return output


class _FusedNorms(TorchFunctionMode):
    """In place of torch's RMS norm, which on meta tensors is made of others: allocates what its GPU kernel does.

    Source: aten/src/ATen/native/layer_norm.cpp rms_norm_symint, torch 2.9.0, the first that has it for CUDA.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is not torch.nn.functional.rms_norm or not _HAS_FUSED_NORMS:
            return func(*args, **(kwargs or {}))
        x: Tensor = args[0]
        output, scales = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        del scales
        return output


def _attach_patches(model: BaseModel, patcher: ModelPatcher) -> None:
    """The LoRAs of `patcher`, on meta tensors, where their layers are in `model`."""
    for key, module in packed_modules(model):
        if key in patcher.patches:
            patches = [_patch_on_meta(patch) for patch in patcher.patches[key]]
            module.weight_function = [OnTheFly(key, patches, module)]


def _patch_on_meta(patch: Patch) -> Patch:
    strength, value, *rest = patch

    def on_meta(part: object) -> object:
        return torch.empty_like(part, device=META) if isinstance(part, Tensor) else part

    if hasattr(value, "weights"):
        value = copy.copy(value)
        value.weights = tree_map(on_meta, value.weights)
    return (strength, tree_map(on_meta, value), *rest)


def streamed_bytes(model: BaseModel) -> int:
    """Weights on the device when all that can be is streamed, with `TIME_PROJECTION` left in main memory.

    Source: comfy/model_management.py get_cast_buffer (a buffer for each of two streams, as large as the largest layer
    it carried), comfy/model_patcher.py ModelPatcher.load (without `comfy_cast_weights`: resident), ComfyUI 0.30.0.
    """
    resident, streamed = 0, [0, 0]
    for name, module in model.named_modules():
        nbytes = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if not hasattr(module, "comfy_cast_weights"):
            resident += nbytes
        elif name != TIME_PROJECTION:
            streamed.append(nbytes)
    return resident + sum(sorted(streamed)[-2:])
