"""The peak memory of sampling a Wan model, predicted by running ComfyUI's own forward on meta tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.wan.model import WanModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import cond_cat
from torch import Tensor
from torch.utils._pytree import tree_map

from ...quant import QuantError
from ...quant.units import GIB
from .. import host
from ..lean import MemoryPlan, apply_lean
from ..packed.foreign import foreign_class
from ..packed.linear import packed_modules
from ..packed.patch_rows import Patch
from ..packed.patches import OnTheFly
from .causal import is_causal, last_block
from .context import context_bytes, unseen_bytes
from .gpu_kernels import FlashAttention, FusedNorms, use_flash_attention
from .live_memory import LiveMemory
from .memory_notes import attention_of
from .meta_wan import META, meta_twin
from .operations import signature
from .sampling_job import SamplingJob
from .windows import first_window

# A sampler holds these float32 tensors of the latent's shape during a forward: its state, the noise, the latent image
# and the previous prediction, and for each of two conditionings the sum of the outputs and the sum of their factors.
_SAMPLER_LATENTS = 8
_PROMPT_TOKENS = 512

TIME_PROJECTION = "diffusion_model.time_projection.1"
"""A Linear of 0.29 GiB in 16 bits (14B) that is multiplied with one row per time step: it stays in main memory."""


@dataclass(frozen=True)
class Peak:
    """The bytes in use at the moment of the highest memory use, and the arithmetic of the whole forward."""

    weight_bytes: int
    scratch_bytes: int
    """Weights in dequantized form."""
    activation_bytes: int
    flops: int
    """Floating-point operations."""
    held_bytes: int
    """What torch's allocator holds at most; see `allocator` and `unseen_bytes`."""
    context_bytes: int
    moved_bytes: int
    """What the operations of the whole forward read and write."""

    @classmethod
    def of(cls, memory: LiveMemory, weight_bytes: int, device: torch.device = META) -> Peak:
        """Return the peak of what `memory` has counted.

        Args:
            device: see `context_bytes`.
        """
        moment, held = memory.peak, memory.held_bytes() + unseen_bytes(device)
        sizes = weight_bytes, moment.scratch_bytes, moment.activation_bytes
        return cls(*sizes, memory.now.flops, held, context_bytes(device), memory.moved_bytes)

    @property
    def fragmentation_bytes(self) -> int:
        """Memory that the allocator holds beyond the tensors in it."""
        return self.held_bytes - self.scratch_bytes - self.activation_bytes

    @property
    def bytes_by_part(self) -> dict[str, int]:
        return {
            "weights": self.weight_bytes,
            "scratch": self.scratch_bytes,
            "activations": self.activation_bytes,
            "fragmentation": self.fragmentation_bytes,
            "context": self.context_bytes,
        }

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_part.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {nbytes / GIB:.2f}" for name, nbytes in self.bytes_by_part.items())
        return f"{self.total_bytes / GIB:.2f} GiB ({parts})"


class Simulator:
    """A model on meta tensors whose forwards run with any memory plan, without computing or allocating anything.

    It assumes the following about the GPU:
    - Attention is flash attention: it allocates the output and one float32 statistic per query, not the scores.
    - RMS norm is torch's fused kernel, where torch has one for GPUs.
    - Rotary embeddings are separate torch operations.
    - Dequantization is a fused kernel without temporaries.
    - Weights are streamed. At any time the GPU holds the two largest layers of the model, for the layer in use and the
      next one, and the weights that ComfyUI cannot stream.
    """

    def __init__(
        self,
        model: BaseModel,
        *,
        weight_bytes: int,
        weight_elements: int = 0,
        attention: FlashAttention | None = None,
        device: torch.device = META,
    ) -> None:
        """
        Args:
            model: on meta tensors.
            weight_bytes: result of `streamed_bytes` for the complete model.
            weight_elements: of the two largest layers among these, 0 if unknown.
            attention: what the blocks call instead of ComfyUI's attention.
            device: see `context_bytes`.
        """
        use_flash_attention(model.diffusion_model)
        self._model, self._weight_bytes, self._device = model, weight_bytes, device
        self.weight_elements, self._attention = weight_elements, attention or FlashAttention()
        self._peaks: dict[tuple[SamplingJob, MemoryPlan | None], Peak] = {}

    @classmethod
    def from_patcher(cls, patcher: ModelPatcher) -> Simulator:
        """Return a simulator of a loaded MODEL with its LoRAs.

        Raises:
            QuantError: as `check_predictable` raises it.
        """
        check_predictable(patcher)
        model = meta_twin(patcher.model)
        _attach_patches(model, patcher)
        nbytes, elements = streamed_bytes(patcher.model), streamed_elements(patcher.model)
        attention, device = attention_of(patcher), patcher.load_device
        return cls(model, weight_bytes=nbytes, weight_elements=elements, attention=attention, device=device)

    @property
    def heads(self) -> int:
        """The number of self-attention heads."""
        return int(self._model.diffusion_model.num_heads)

    def peak(self, job: SamplingJob, plan: MemoryPlan | None) -> Peak:
        """Return the peak of `job` with `plan`; None stands for ComfyUI's own forward."""
        if (job, plan) not in self._peaks:
            self._peaks[job, plan] = Peak.of(self.run(job, plan), self._weight_bytes, self._device)
        return self._peaks[job, plan]

    def run(self, job: SamplingJob, plan: MemoryPlan | None, *, record: bool = False) -> LiveMemory:
        """Run the forwards of one sampling step and return the memory count, with its history if `record`.

        `meta_twin` keeps one of several equal blocks, so the history covers fewer blocks than the model has.
        """
        patcher = ModelPatcher(self._model, META, META)
        if plan:
            patcher = apply_lean(patcher, plan)
        memory = LiveMemory(META, record=record)
        # ComfyUI samples in inference mode. There a dispatch mode does not see the parts of composite operations.
        with torch.inference_mode(False), torch.no_grad(), memory, FusedNorms():
            options = {"wrappers": patcher.wrappers, "optimized_attention_override": self._attention}
            state = torch.empty(_SAMPLER_LATENTS, *job.latent, device=META)
            conditionings = [self._prompt() | outline.entries() for outline in job.conditionings]
            frames = min(job.frames_at_a_time or job.latent[2], job.latent[2])
            if job.frames_at_a_time and is_causal(self._model.diffusion_model):
                conditionings = conditionings[:1]  # without guidance
                options |= last_block(self._model, job, frames, META)
            run_forwards(self._model, state[0], conditionings, options, frames)
        return memory

    def _prompt(self) -> dict[str, Any]:
        """Return the encoded prompt as ComfyUI pads it, for a prompt that is not longer."""
        return {"cross_attn": torch.empty(()).expand(1, _PROMPT_TOKENS, self._model.diffusion_model.text_dim)}


def check_predictable(patcher: ModelPatcher) -> None:
    """Refuse a MODEL with weights of another pack, whose layers dequantize in ways that cannot be predicted.

    Raises:
        QuantError: the class of such a weight, and which loader to use.
    """
    found = foreign_class(patcher.model.diffusion_model)
    if found:
        raise QuantError(
            f"the weights of this MODEL are of another pack's class {found}, whose memory use cannot be predicted; load"
            " the file with Load Diffusion Model (Quantized) instead"
        )


def check_prompts(model: WanModel, conds: Iterable[Mapping[str, Any]]) -> None:
    """Check that the model can multiply the prompts of conditionings; otherwise torch names the shapes of matrices.

    Raises:
        QuantError: a prompt of another text encoder.
    """
    width = model.text_embedding[0].in_features
    for cond in conds:
        prompt = cond.get("cross_attn")
        if prompt is not None and prompt.shape[-1] != width:
            raise QuantError(
                f"prompt of shape {tuple(prompt.shape)}: expected (batch, tokens, {width}) for this Wan model; use"
                " umT5-XXL and the type wan in the loader of its text encoder"
            )


def run_forwards(
    model: BaseModel,
    latent: Tensor,
    conditionings: list[dict[str, Any]],
    options: dict[str, Any],
    frames: int | None = None,
) -> None:
    """Run one forward per distinct shape of conditioning, while all of them are in memory, as a sampler does.

    Args:
        latent: float32, (batch, channels, frames, height, width).
        conditionings: entries of each conditioning.
        options: transformer_options of ComfyUI.
        frames: the number of latent frames in a forward; None for all.

    Source: comfy/samplers.py encode_model_conds, _calc_cond_batch, ComfyUI 0.30.0.
    """
    time, done, x = torch.ones(len(latent), device=latent.device), set(), latent[:, :, :frames]
    whole = [model.extra_conds(noise=latent, device=latent.device, **entries) for entries in conditionings]
    cut = x.shape != latent.shape
    for conds in [first_window(model, conds, latent, x.shape[2]) for conds in whole] if cut else whole:
        inputs = {name: cond.process_cond(batch_size=len(latent), area=None) for name, cond in conds.items()}
        shapes = signature({name: cond.cond for name, cond in inputs.items()})
        if shapes not in done:
            model.apply_model(x, time, transformer_options=options, **cond_cat([inputs]))
        done.add(shapes)


def _attach_patches(model: BaseModel, patcher: ModelPatcher) -> None:
    """Attach the LoRAs of `patcher`, on meta tensors, to those of its layers that `model` has."""
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


def streamed_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights on the device while as many as possible are streamed.

    `TIME_PROJECTION` does not count.

    Source: comfy/model_management.py get_cast_buffer (one buffer for each of two streams, as large as the largest layer
    that it carried), comfy/model_patcher.py ModelPatcher.load (modules without `comfy_cast_weights` stay on the
    device), ComfyUI 0.30.0.
    """
    resident, streamed = 0, [0, 0]
    for name, module in model.named_modules():
        nbytes = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if not host.is_streamed(module):
            resident += nbytes
        elif name != TIME_PROJECTION:
            streamed.append(nbytes)
    return resident + sum(sorted(streamed)[-2:])


def streamed_elements(model: torch.nn.Module) -> int:
    """Return the number of elements of the two largest layers in `streamed_bytes`."""
    sizes = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if host.is_streamed(module) and name != TIME_PROJECTION:
            sizes.append((sum(parameter.nbytes for parameter in own), sum(parameter.numel() for parameter in own)))
    return sum(elements for _, elements in sorted(sizes)[-2:])
