"""Makes the host run its Wan blocks lean, through its own wrappers and block replacements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from .. import host
from .block import LeanBlock, is_lean_block
from .control import control_forwards
from .edges import edge_forwards
from .memory_plan import MemoryPlan
from .variants import variant

PlanChooser = Callable[[torch.Size], MemoryPlan | None]
"""From the shape of a latent, (batch, channels, frames, height, width); None for the host's own forward."""

_KEY = "wanquant.low_vram"


def apply_lean(model: ModelPatcher, plan: MemoryPlan | PlanChooser) -> ModelPatcher:
    """A clone whose Wan blocks run as `plan` says, and whose prompts run one after the other.

    A chooser is asked before each forward of the transformer, and before each step of the sampler (there the channels
    are the latent's alone), with the batch that they get. What any other model does is unchanged.
    """
    choose = (lambda _: plan) if isinstance(plan, MemoryPlan) else plan
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.DIFFUSION_MODEL, _LeanForward(choose)),
        (WrappersMP.CALC_COND_BATCH, _OneByOne(choose)),
    ):
        patched.remove_wrappers_with_key(kind, _KEY)
        # Ahead of the loader's, which prefetches whole blocks where nobody replaced them: more than a lean one takes.
        patched.wrappers[kind] = {_KEY: [wrapper]} | patched.wrappers.get(kind, {})
    return patched


def calc_conds_separately(
    executor: WrapperExecutor,
    model: BaseModel,
    conds: list[Any],
    x: Tensor,
    timestep: Tensor,
    options: dict[str, Any],
) -> list[Tensor]:
    """Wraps the host's `calc_cond_batch`: each conditioning in forwards of its own, under the index that it had."""

    def alone(index: int) -> list[Any]:
        return [cond if i == index else None for i, cond in enumerate(conds)]

    return [executor(model, alone(i), x, timestep, options)[i] for i in range(len(conds))]


@dataclass(frozen=True)
class _OneByOne:
    """Positive and negative prompt in forwards of their own; the host batches them where it sees enough memory."""

    choose: PlanChooser

    def __call__(
        self,
        executor: WrapperExecutor,
        model: BaseModel,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> list[Tensor]:
        if self.choose(x.shape) is None:
            together: list[Tensor] = executor(model, conds, x, timestep, options)
            return together
        return calc_conds_separately(executor, model, conds, x, timestep, options)


@dataclass(frozen=True)
class _LeanForward:
    """Puts lean blocks in the place of the host's for one forward, around what other nodes put there."""

    choose: PlanChooser

    def __call__(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> Tensor:
        model, options = executor.class_obj, transformer_options or {}
        # Training needs the activations that lean blocks write over, and a compiled graph plans its own memory.
        lean = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        plan = self.choose(x.shape) if lean and isinstance(model, wan.WanModel) else None
        forwards: host.Forwards = {}
        if plan is not None:
            plan.check(model.num_heads)
            run = _Run(plan, _image_tokens(model, clip_fea, kwargs.get("clip_fea_ref")), not variant(model).keeps_input)
            options = _with_lean_blocks(model, run, options)
            forwards = edge_forwards(model, x.dtype) | control_forwards(model, plan)
        with host.in_place(forwards):
            out: Tensor = executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)
        return out


def _image_tokens(model: wan.WanModel, *images: object) -> int | None:
    """How many of CLIP's tokens the host puts before the text, by its own count."""
    counts = [image.shape[-2] for image in images if isinstance(image, Tensor)]
    return sum(counts) if counts or hasattr(model, "img_emb_refimage") else None


@dataclass
class _Run:
    """One forward."""

    plan: MemoryPlan
    image_tokens: int | None
    owns_tokens: bool
    """Nobody reads the coming block's input again but the block."""


def _with_lean_blocks(model: wan.WanModel, run: _Run, options: dict[str, Any]) -> dict[str, Any]:
    replace = options.get("patches_replace", {})
    present = replace.get("dit", {})
    lean = {
        ("double_block", i): _Replacement(block, run, present.get(("double_block", i)))
        for i, block in enumerate(model.blocks)
        if is_lean_block(block)
    }
    return options | {"patches_replace": replace | {"dit": present | lean}}


@dataclass
class _Replacement:
    """Of a block, as the host calls it."""

    block: wan.WanAttentionBlock
    run: _Run
    outer: Callable[..., dict[str, Any]] | None
    """The replacement that another node put there: it decides, and has ours for the original."""

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if self.outer is None:
            return self._lean(args)
        return self.outer(args, extra | {"original_block": self._lean})

    def _lean(self, args: dict[str, Any]) -> dict[str, Any]:
        options, x = args["transformer_options"], args["img"]
        seen = options.get("patches", {})
        owns = self.run.owns_tokens and not (self.outer or seen.get("double_block") or seen.get("attn2_patch"))
        x = x.contiguous() if owns else x.clone(memory_format=torch.contiguous_format)
        self.run.owns_tokens = True
        lean = LeanBlock(self.block, self.run.plan, self.run.image_tokens, options)
        return {"img": lean(x, args["vec"], args["pe"], args["txt"])}
