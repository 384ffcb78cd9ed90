"""The wrappers that make ComfyUI run a Wan model lean. They use its own wrappers and block replacements."""

from __future__ import annotations

import math
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
from .frames import frame_forwards
from .memory_plan import MemoryPlan
from .pose import is_pose_block, pose_methods
from .variants import variant
from .weights import is_own

PlanChooser = Callable[[torch.Size], MemoryPlan | None]
"""Latent shape, (batch, channels, frames, height, width) -> memory plan, or None for ComfyUI's own forward."""

_KEY = "wanquant.low_vram"


def apply_lean(model: ModelPatcher, plan: MemoryPlan | PlanChooser) -> ModelPatcher:
    """Return a clone whose Wan blocks run lean and whose prompts run one after the other. Other models are unchanged.

    Args:
        plan: a memory plan, or a function that chooses one. It is called before each step of the sampler with the shape
            of the latent, and before each forward with the shape of the transformer's input.
    """
    choose = (lambda _: plan) if isinstance(plan, MemoryPlan) else plan
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.DIFFUSION_MODEL, _LeanForward(choose)),
        (WrappersMP.CALC_COND_BATCH, _CalcConds(choose)),
    ):
        patched.remove_wrappers_with_key(kind, _KEY)
        # This wrapper goes first. The loader's prefetch, which holds two blocks, then finds the blocks replaced and
        # leaves them alone.
        patched.wrappers[kind] = {_KEY: [wrapper]} | patched.wrappers.get(kind, {})
    return patched


def runs_lean(block: torch.nn.Module) -> bool:
    """Return whether `apply_lean` cuts up a block of a Wan model."""
    return is_lean_block(block) or is_pose_block(block)


def calc_conds_separately(
    executor: WrapperExecutor,
    model: BaseModel,
    conds: list[Any],
    x: Tensor,
    timestep: Tensor,
    options: dict[str, Any],
) -> list[Tensor]:
    """Run each entry of the conditionings in a forward of its own: a wrapper of ComfyUI's `calc_cond_batch`.

    ComfyUI batches entries of equal shapes if it estimates that memory suffices: positive with negative, and prompts
    that were combined.

    Args:
        conds: positive and negative conditioning, each a list of dicts or None.
        x: noisy latent, float32, (batch, channels, frames, height, width).
        timestep: float32, (batch,).
        options: ComfyUI's model_options.

    Returns:
        One prediction per conditioning, each like `x`.
    """
    with host.in_place({}, {model: {"memory_required": lambda *_, **__: math.inf}}):
        predictions: list[Tensor] = executor(model, conds, x, timestep, options)
    return predictions


@dataclass(frozen=True)
class _CalcConds:
    """A wrapper of `calc_cond_batch` that separates the conditionings if a plan is chosen."""

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
            predictions: list[Tensor] = executor(model, conds, x, timestep, options)
            return predictions
        return calc_conds_separately(executor, model, conds, x, timestep, options)


@dataclass(frozen=True)
class _LeanForward:
    """A wrapper of the transformer's forward that replaces its blocks for the time of the forward."""

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
        # Training needs the activations that lean blocks overwrite, and a compiled graph plans its own memory.
        lean = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        plan = self.choose(x.shape) if lean and isinstance(model, wan.WanModel) else None
        forwards: host.Forwards = {}
        methods: host.Methods = {}
        if plan is not None:
            plan.check(model.num_heads)
            image_tokens = _image_tokens(model, clip_fea, kwargs.get("clip_fea_ref"))
            # A node's forward may keep tokens of any block, as those do that reuse the output of a step.
            own_forward = is_own(model, "forward_orig")
            state = _ForwardState(plan, image_tokens, own_forward, may_overwrite=not variant(model).keeps_input)
            options = _with_lean_blocks(model, state, options)
            forwards = edge_forwards(model, x.dtype) | control_forwards(model, plan) | frame_forwards(model, plan)
            methods = pose_methods(model, plan)
        with host.in_place(forwards, methods):
            out: Tensor = executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)
        return out


def _image_tokens(model: wan.WanModel, *clip_outputs: object) -> int | None:
    """Return how many CLIP vision tokens ComfyUI puts before the text, counted as ComfyUI counts them."""
    counts = [output.shape[-2] for output in clip_outputs if isinstance(output, Tensor)]
    return sum(counts) if counts or hasattr(model, "img_emb_refimage") else None


@dataclass
class _ForwardState:
    """What the blocks of one forward share."""

    plan: MemoryPlan
    image_tokens: int | None
    own_forward: bool
    """ComfyUI's own forward calls the blocks, not another node's."""
    may_overwrite: bool
    """Only the next block reads its input, so it may overwrite it."""


def _with_lean_blocks(model: wan.WanModel, state: _ForwardState, options: dict[str, Any]) -> dict[str, Any]:
    replace = options.get("patches_replace", {})
    present = replace.get("dit", {})
    lean = {
        ("double_block", i): _BlockReplacement(block, state, present.get(("double_block", i)))
        for i, block in enumerate(model.blocks)
        if is_lean_block(block) and type(block) is wan.WanAttentionBlock
    }
    return options | {"patches_replace": replace | {"dit": present | lean}}


@dataclass
class _BlockReplacement:
    """A replacement for one block, in the form in which ComfyUI calls it."""

    block: wan.WanAttentionBlock
    state: _ForwardState
    outer: Callable[..., dict[str, Any]] | None
    """Another node's replacement of the block. It runs first and gets the lean block as the original one."""

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if self.outer is None:
            return self._lean(args)
        out = self.outer(args, extra | {"original_block": self._lean})
        self.state.may_overwrite = False
        return out

    def _lean(self, args: dict[str, Any]) -> dict[str, Any]:
        # Forwards of other nodes may pass no options, and ComfyUI's own block then gets none either.
        options, x = args.get("transformer_options", {}), args["img"]
        patches = options.get("patches", {})
        # Other nodes may keep the tensors that they were given, or that they returned.
        may_be_kept = self.outer or patches.get("double_block") or patches.get("attn2_patch")
        overwrite = self.state.may_overwrite and self.state.own_forward and not may_be_kept
        x = x.contiguous() if overwrite else x.clone(memory_format=torch.contiguous_format)
        self.state.may_overwrite = True
        lean = LeanBlock(self.block, self.state.plan, self.state.image_tokens, options)
        return {"img": lean(x, args["vec"], args["pe"], args["txt"])}
