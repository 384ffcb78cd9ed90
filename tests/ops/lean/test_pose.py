"""Animate 2's blocks in pieces: equal to ComfyUI's from 0.33 on, and to one that is written from a description."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.wan.model as wan
import comfy.ops
import pytest
import torch
from comfy.ldm.flux.math import apply_rope1

from wanquant.ops import host
from wanquant.ops.budget.memory_notes import stock_notes
from wanquant.ops.lean import MemoryPlan
from wanquant.ops.lean.pose import pose_methods
from wanquant.tests.ops.lean.test_blocks import error

HEADS, SIZE, FRAMES, OF_A_FRAME = 4, 64, 3, 6
DIM, TOKENS = HEADS * SIZE, FRAMES * OF_A_FRAME
METHODS = ("forward_pose", "kv_from_input", "forward_gen")


class StandInAttention(wan.WanSelfAttention):
    def of_video(self, x, freqs, pose, of_a_frame, strength, options):
        """Return the output with which each frame attends to all frames and to its own frame of the poses."""
        k, v = keys_and_values(self, x, freqs)
        v = torch.cat([v[:, :of_a_frame] * strength, v[:, of_a_frame:]], 1)
        q = apply_rope1(self.norm_q(self.q(x)).unflatten(2, (HEADS, SIZE)), freqs).split(of_a_frame, 1)
        poses = [(k[:, :0], v[:, :0])] * len(q)  # the first frame is a picture, without a pose
        if pose is not None:
            poses[1:] = zip(*(part.split(of_a_frame, 1) for part in pose), strict=True)
        outs = []
        for query, (key, value) in zip(q, poses, strict=True):
            whole = (query, torch.cat([k, key], 1), torch.cat([v, value], 1))
            flat = (part.flatten(2) for part in whole)
            outs.append(wan.optimized_attention(*flat, heads=HEADS, transformer_options=options))
        out = torch.cat(outs, 1)
        for patch in options.get("patches", {}).get("attn1_patch", ()):
            out = patch({"x": out, "q": torch.cat(q, 1), "k": k, "transformer_options": options})
        return self.o(out)


def keys_and_values(attention, x, freqs):
    k = apply_rope1(attention.norm_k(attention.k(x)).unflatten(2, (HEADS, SIZE)), freqs)
    return k, attention.v(x).unflatten(2, (HEADS, SIZE))


class StandInBlock(wan.WanAttentionBlock):
    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.self_attn = StandInAttention(DIM, HEADS, operation_settings=settings["operation_settings"])

    def modulated(self, norm, x, e, index):
        shift, scale, _ = (self.modulation + e.squeeze(1)).chunk(6, 1)[index : index + 3]
        return norm(x) * (1 + scale) + shift

    def forward_pose(self, x, e, freqs, context, context_img_len=257, transformer_options={}):  # noqa: B006 (as ComfyUI)
        out = self.forward(x, e.squeeze(1), freqs, context, context_img_len, transformer_options)
        return (out, *StandInBlock.kv_from_input(self, x, e, freqs))

    def kv_from_input(self, x_pose, e, freqs, transformer_options={}):  # noqa: B006
        return keys_and_values(self.self_attn, self.modulated(self.norm1, x_pose, e, 0), freqs)

    def forward_gen(
        self,
        x,
        e,
        freqs,
        context,
        k_pose,
        v_pose,
        f_gen,
        hw,
        buffers,
        ref_strength=1.0,
        context_img_len=257,
        transformer_options={},  # noqa: B006
    ):
        gates, pose = (self.modulation + e.squeeze(1)).chunk(6, 1)[2::3], None if k_pose is None else (k_pose, v_pose)
        inside = self.modulated(self.norm1, x, e, 0)
        x = x + gates[0] * self.self_attn.of_video(inside, freqs, pose, hw, ref_strength, transformer_options)
        x = x + self.cross_attn(self.norm3(x), context, context_img_len=context_img_len)
        return x + gates[1] * self.ffn(self.modulated(self.norm2, x, e, 3))


for stand_in, name in ((StandInAttention, "WanAnimate2SelfAttention"), (StandInBlock, "WanAnimate2Block")):
    stand_in.__module__, stand_in.__qualname__ = "comfy.ldm.wan.model_animate2", name
try:
    from comfy.ldm.wan.model_animate2 import WanAnimate2Block
except ImportError:  # before 0.33
    WanAnimate2Block = StandInBlock


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params={StandInBlock, WanAnimate2Block}, ids=lambda cls: cls.__name__)
def block(request):
    settings = {"operations": comfy.ops.manual_cast, "dtype": torch.float32}
    made = request.param(
        "i2v_cross_attn", DIM, 512, HEADS, qk_norm=True, cross_attn_norm=True, operation_settings=settings
    )
    for parameter in made.requires_grad_(False).parameters():
        parameter.copy_(noise(*parameter.shape) * 0.3)
    return made


def run(block, plan=None, *, batch=1, poses=True, cached=False, options=None, **arguments):
    """Return the tokens of the video and of the poses after the block, in pieces if there is a plan."""
    e, context, pose_tokens = noise(batch, 1, 6, DIM) / 3, noise(batch, 9, DIM), TOKENS - OF_A_FRAME
    freqs = noise(1, TOKENS, 1, SIZE // 2, 2, 2)
    more = {"context_img_len": 2, "transformer_options": options or {}}
    tail, keys, buffers = noise(batch, pose_tokens, DIM), (None, None), None
    methods = {} if plan is None else pose_methods(SimpleNamespace(blocks=[block]), plan)
    with torch.no_grad(), host.in_place({}, methods):
        if poses and cached:
            keys = block.kv_from_input(tail, e, freqs[:, :pose_tokens])
        elif poses:
            tail, *keys = block.forward_pose(tail, e, freqs[:, :pose_tokens], context, **more)
        if poses:
            rooms = [torch.full((batch, TOKENS + OF_A_FRAME, HEADS, SIZE), torch.nan) for _ in range(2)]
            buffers = (*rooms, torch.full((batch, TOKENS, DIM), torch.nan))
        x = noise(batch, TOKENS, DIM)
        out = block.forward_gen(x, e, freqs, context, *keys, FRAMES, OF_A_FRAME, buffers, **arguments, **more)
    assert not vars(block).keys() & {*METHODS}
    return out, tail


@pytest.mark.parametrize("plan", [MemoryPlan(1, 1000), MemoryPlan(4, 7, 3)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"batch": 2}, {"ref_strength": 0.5}, {"poses": False, "ref_strength": 2.0}, {"cached": True, "batch": 2}],
    ids=str,
)
def test_equals_the_hosts_block(arguments, plan, block, lean_blocks):
    expected, found = run(block, **arguments), run(block, plan, **arguments)
    assert all(error(*pair) < 1e-5 for pair in zip(found, expected, strict=True))
    assert len(lean_blocks) == 1 + (arguments.get("poses", True) and not arguments.get("cached", False))


def test_a_patch_gets_the_attention_of_all_tokens(block, lean_blocks):
    seen = []
    patches = {"attn1_patch": [lambda args: seen.append(args["q"].shape[1]) or args["x"] * 2]}
    expected, found = (run(block, plan, options={"patches": patches}) for plan in (None, MemoryPlan(4, 7)))
    assert all(map(torch.equal, found, expected))
    assert not lean_blocks
    assert seen[len(seen) // 2 :] == seen[: len(seen) // 2] != []


@pytest.mark.parametrize("options", [{"patches": {"double_block": [1]}}, {"patches_replace": {"dit": {1: 1}}}], ids=str)
def test_what_other_nodes_may_have_kept_stays(options, block):
    x, e, freqs = noise(1, TOKENS, DIM), noise(1, 1, 6, DIM), noise(1, TOKENS, 1, SIZE // 2, 2, 2)
    before = x.clone()
    method = pose_methods(SimpleNamespace(blocks=[block]), MemoryPlan(4, 7))[block]["forward_gen"]
    with torch.no_grad():
        method(x, e, freqs, noise(1, 9, DIM), None, None, FRAMES, OF_A_FRAME, None, transformer_options=options)
    assert torch.equal(x, before)


def test_methods_that_are_not_known_are_left_alone(block, monkeypatch):
    model = SimpleNamespace(blocks=[block])
    assert pose_methods(model, MemoryPlan(4, 7))[block].keys() == {*METHODS}
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=model), model_options={})
    assert stock_notes(patcher) == []
    with monkeypatch.context() as newer:
        newer.setattr(type(block), "kv_from_input", lambda self, x_pose, e, freqs, more: None)
        assert not pose_methods(model, MemoryPlan(4, 7))
        assert "runs 1 of 1 block," in stock_notes(patcher)[0]
    for part in (block, block.self_attn):
        with host.in_place({}, {part: {"forward_gen": lambda *_: None}}):
            assert not pose_methods(model, MemoryPlan(4, 7)), "another node's"
