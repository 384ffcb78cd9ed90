"""Peak memory of sampling a Wan model, found by running the host's own forward on meta tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import cond_cat
from torch import Tensor
from torch.utils._pytree import tree_map

from ...quant.units import GIB
from .. import host
from ..lean import LeanPlan, apply_lean
from ..packed.linear import packed_modules
from ..packed.patch_rows import Patch
from ..packed.patches import OnTheFly
from .gpu_kernels import FlashAttention, FusedNorms, use_flash_attention
from .live_memory import LiveMemory, signature
from .meta_wan import META, meta_twin
from .sampling_job import Job

CONTEXT_BYTES = round(0.4 * GIB)
"""CUDA's context and libraries, before any tensor."""

# What a sampler holds at the latent's size during a forward, in float32: its state, the noise, the latent image, the
# previous prediction, and of each of two conditionings the output and the weights it is averaged with.
_SAMPLER_LATENTS = 8
_PROMPT_TOKENS = 512

TIME_PROJECTION = "diffusion_model.time_projection.1"
"""A sixth of a gigabyte in 16 bits, for a product with a single row: a plan leaves it in main memory."""


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
        use_flash_attention(model.diffusion_model)
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
        with torch.inference_mode(False), torch.no_grad(), memory, FusedNorms():
            options = {"wrappers": patcher.wrappers, "optimized_attention_override": FlashAttention()}
            state = torch.empty(_SAMPLER_LATENTS, *job.latent, device=META)
            predict(self._model, state[0], [self._prompt() | each.fields() for each in job.conditions], options)
        return memory

    def _prompt(self) -> dict[str, Any]:
        """What the host makes of every prompt that is not longer."""
        return {"cross_attn": torch.empty(()).expand(1, _PROMPT_TOKENS, self._model.diffusion_model.text_dim)}


def predict(model: BaseModel, latent: Tensor, conditions: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """A forward for each conditioning that takes another amount of memory than those before, while all are there.

    Source: comfy/samplers.py encode_model_conds, _calc_cond_batch, ComfyUI 0.30.0.
    """
    time, done = torch.ones(len(latent), device=latent.device), set()
    encoded = [model.extra_conds(noise=latent, device=latent.device, **fields) for fields in conditions]
    for conds in encoded:
        given = {name: cond.process_cond(batch_size=len(latent), area=None) for name, cond in conds.items()}
        form = signature({name: cond.cond for name, cond in given.items()})
        if form not in done:
            model.apply_model(latent, time, transformer_options=options, **cond_cat([given]))
        done.add(form)


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


def streamed_bytes(model: torch.nn.Module) -> int:
    """Weights on the device when all that can be is streamed, with `TIME_PROJECTION` left in main memory.

    Source: comfy/model_management.py get_cast_buffer (a buffer for each of two streams, as large as the largest layer
    it carried), comfy/model_patcher.py ModelPatcher.load (without `comfy_cast_weights`: resident), ComfyUI 0.30.0.
    """
    resident, streamed = 0, [0, 0]
    for name, module in model.named_modules():
        nbytes = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if not host.is_streamed(module):
            resident += nbytes
        elif name != TIME_PROJECTION:
            streamed.append(nbytes)
    return resident + sum(sorted(streamed)[-2:])
