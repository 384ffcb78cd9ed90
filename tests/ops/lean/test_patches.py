"""Patches and replacements of other nodes have the same effect on lean blocks as on ComfyUI's."""

from __future__ import annotations

import math
import types

import comfy.ldm.wan.model as wan
import pytest
import torch
from comfy.ldm.modules.attention import attention_basic
from comfy.patcher_extension import WrappersMP

from wanquant.ops.lean import MemoryPlan, apply_lean
from wanquant.tests.ops.lean.test_blocks import FINE, build, error, forward


@pytest.fixture(scope="module")
def model():
    return build()


def test_nothing_runs_lean_when_the_chooser_declines(model, lean_blocks):
    shapes = []
    patched = apply_lean(model, lambda shape: shapes.append(tuple(shape)))
    assert torch.equal(forward(patched), forward(model))
    assert shapes == [(1, 16, 2, 8, 8)]
    assert not lean_blocks


def test_a_second_plan_replaces_the_first(model, lean_blocks):
    twice = apply_lean(apply_lean(model, MemoryPlan(1, 1)), FINE)
    forward(twice)
    assert [len(twice.get_all_wrappers(kind)) for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.CALC_COND_BATCH)] == [
        1,
        1,
    ]
    assert len(lean_blocks) == 2


def test_the_loaders_prefetch_leaves_lean_blocks_alone(model):
    seen = []

    def loader(executor, x, timestep, context, clip_fea, time_dim_concat, options, **kwargs):
        seen.append(options.get("patches_replace", {}).get("dit", {}).keys())
        return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    loaded = model.clone()
    loaded.add_wrapper(WrappersMP.DIFFUSION_MODEL, loader)
    forward(apply_lean(loaded, FINE))
    assert seen == [{("double_block", 0), ("double_block", 1)}]


def test_training_runs_stock(model, lean_blocks):
    options = {"wrappers": apply_lean(model, FINE).wrappers}
    latent, text = torch.randn(1, 16, 1, 4, 4, requires_grad=True), torch.randn(1, 3, 4096)
    model.model.diffusion_model(latent, torch.ones(1), text, transformer_options=options)
    assert not lean_blocks


# Patches: functions that ComfyUI calls inside or between blocks.


PATCHES = {
    "attn1_patch": lambda kwargs: kwargs["x"] + 0.1 * kwargs["q"].flatten(2) + 0.2 * kwargs["k"].flatten(2),
    "attn2_patch": lambda kwargs: kwargs["x"] * 1.5,
    "double_block": lambda kwargs: {"img": kwargs["img"] + kwargs["block_index"] + 1},
}


@pytest.mark.parametrize("kind", PATCHES)
def test_patch(kind, model, lean_blocks):
    options = {"patches": {kind: [PATCHES[kind]]}}
    expected = forward(model, **options)
    if torch.equal(expected, forward(model)):
        pytest.skip(f"this host does not call {kind} for Wan")
    assert error(forward(apply_lean(model, FINE), **options), expected) < 1e-5
    assert len(lean_blocks) == 2


@pytest.mark.parametrize("kind", ["attn2_patch", "double_block"])
def test_what_a_patch_keeps_is_not_written_to(kind, model):
    kept = []

    def keep(kwargs):
        image = kwargs["x" if kind == "attn2_patch" else "img"]
        kept.append((image, image.clone()))
        return image if kind == "attn2_patch" else {"img": image}

    forward(apply_lean(model, FINE), patches={kind: [keep]})
    assert all(torch.equal(image, copy) for image, copy in kept)


# Replacements: functions that ComfyUI calls instead of a block.


def blend(args, extra):
    out = extra["original_block"](args)
    return {"img": 0.5 * args["img"] + out["img"]}


def skip(args, extra):
    return args


@pytest.mark.parametrize("replacement", [blend, skip])
@pytest.mark.parametrize("index", [0, 1])
def test_replaced_block(index, replacement, model):
    options = {"patches_replace": {"dit": {("double_block", index): replacement}}}
    expected = forward(model, **options)
    assert error(forward(apply_lean(model, FINE), **options), expected) < 1e-5


def test_what_a_replacement_returns_and_keeps_is_not_written_to(model):
    kept = []

    def keep(args, extra):
        out = extra["original_block"](args)
        kept.append((out["img"], out["img"].clone()))
        return out

    forward(apply_lean(model, FINE), patches_replace={"dit": {("double_block", 0): keep}})
    assert all(torch.equal(image, copy) for image, copy in kept)


def caching_forward(self, x, t, context, clip_fea=None, freqs=None, transformer_options=None, **_):
    """Keep the tokens before the blocks as TeaCache does, which also passes no options to them."""
    x = self.patch_embedding(x.float()).to(x.dtype)
    sizes, x, replaced = x.shape[2:], x.flatten(2).transpose(1, 2), transformer_options.get("patches_replace", {})
    e = self.time_embedding(wan.sinusoidal_embedding_1d(self.freq_dim, t).to(x.dtype))
    args = {
        "vec": self.time_projection(e).unflatten(1, (6, self.dim)),
        "pe": freqs,
        "txt": self.text_embedding(context),
    }
    before = x
    for index, block in enumerate(self.blocks):
        if replacement := replaced.get("dit", {}).get(("double_block", index)):
            x = replacement({"img": x} | args, {"original_block": None})["img"]
        else:
            x = block(x, e=args["vec"], freqs=freqs, context=args["txt"], context_img_len=None)
    return self.unpatchify(self.head(x - before, e), sizes)


def test_a_forward_that_keeps_tokens(model, lean_blocks, monkeypatch):
    transformer = model.model.diffusion_model
    monkeypatch.setattr(transformer, "forward_orig", types.MethodType(caching_forward, transformer))
    assert error(forward(apply_lean(model, FINE)), forward(model)) < 1e-5
    assert len(lean_blocks) == 2


@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_attention_override_sees_every_token_of_a_head(name):
    """It may depend on the position of a token, as masks of regions do."""
    model, seen = build(name), []

    def override(function, q, k, v, *args, **kwargs):
        seen.append(q.shape[1])
        positions = torch.linspace(0.5, 2, q.shape[1])[:, None]
        return attention_basic(q * positions, k, v, *args, **kwargs)

    expected = forward(model, name, optimized_attention_override=override)
    assert error(forward(apply_lean(model, FINE), name, optimized_attention_override=override), expected) < 1e-5
    assert set(seen) == {32}


class Preferred(torch.nn.Module):
    """A stand-in for the object by which newer ComfyUIs note which attention a checkpoint prefers."""

    def __init__(self, function):
        super().__init__()
        self.function = function


@pytest.fixture
def calls(monkeypatch):
    """Return a list of (queries, keys, keywords), one entry per call of ComfyUI's attention function."""
    calls, attend = [], wan.optimized_attention

    def record(q, k, v, *args, **keywords):
        calls.append((*(getattr(x, "peek", lambda x=x: x)().shape[1] for x in (q, k)), keywords))
        return attend(q, k, v, *args, **{n: value for n, value in keywords.items() if n != "preferred_attention"})

    monkeypatch.setattr(wan, "optimized_attention", record)
    return calls


def test_image_keys_get_attention_in_full_precision(calls):
    """SageAttention returns NaN for them."""
    forward(apply_lean(build("i2v"), FINE), "i2v")
    precise = {keys: keywords.get("low_precision_attention", True) for _, keys, keywords in calls}
    assert precise == {32: True, 7: True, 257: False}


def test_preferred_attention_is_called_with_all_queries(calls):
    model = build()
    for block in model.model.diffusion_model.blocks:
        block.self_attn.comfy_attention = block.cross_attn.comfy_attention = Preferred(attention_basic)
    expected = forward(model)
    calls.clear()
    assert error(forward(apply_lean(model, FINE)), expected) < 1e-5
    own = [(queries, keywords["preferred_attention"].function) for queries, keys, keywords in calls if keys == 32]
    assert own == [(32, attention_basic)] * len(own)
    assert {queries for queries, keys, _ in calls if keys == 7} == {32}, "the host's own cross-attention"


def test_no_preference_changes_nothing(calls):
    model = build()
    for block in model.model.diffusion_model.blocks:
        block.self_attn.comfy_attention = block.cross_attn.comfy_attention = Preferred(None)
    plan = MemoryPlan(2, 3)
    assert error(forward(apply_lean(model, plan)), forward(build())) < 1e-5
    assert max(queries for queries, *_ in calls[: len(calls) // 2]) == 4 * plan.token_chunk * plan.head_groups


# Forwards of modules that other nodes replace, such as sparse attention, NAG and bypassed LoRAs.


def rolled(module):
    function = type(module).forward
    return types.MethodType(lambda self, *args, **kwargs: function(self, *args, **kwargs).roll(1, -1), module)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "self_attn",
        "self_attn.q",
        "self_attn.v",
        "self_attn.norm_k",
        "self_attn.o",
        "cross_attn",
        "cross_attn.o",
        "norm1",
        "ffn",
        "ffn.2",
    ],
)
def test_replaced_forward(path, model, monkeypatch):
    base = forward(model)
    module = model.model.diffusion_model.blocks[0].get_submodule(path)
    monkeypatch.setattr(module, "forward", rolled(module))
    expected = forward(model)
    assert error(expected, base) > 1e-3
    assert error(forward(apply_lean(model, FINE)), expected) < 1e-5


def test_forward_hooks_run(model):
    base = forward(model)
    handle = model.model.diffusion_model.blocks[0].self_attn.v.register_forward_hook(lambda _, __, out: 2 * out)
    expected = forward(model)
    value = forward(apply_lean(model, FINE))
    handle.remove()
    assert error(expected, base) > 1e-3
    assert error(value, expected) < 1e-5


def test_replaced_edges(model, monkeypatch):
    transformer = model.model.diffusion_model
    for module in (transformer.head, transformer.patch_embedding):
        monkeypatch.setattr(module, "forward", rolled(module))
    assert error(forward(apply_lean(model, FINE)), forward(model)) < 1e-5


def test_a_forward_put_back_counts_as_the_modules_own(model, monkeypatch, lean_blocks):
    """ComfyUI leaves it on the instance after an object patch."""
    block = model.model.diffusion_model.blocks[0]
    monkeypatch.setattr(block, "forward", block.forward)
    forward(apply_lean(model, FINE))
    assert len(lean_blocks) == 2


# Positive and negative conditioning.


class Base(torch.nn.Module):
    def memory_required(self, shape):
        return 1


@pytest.mark.parametrize(("plan", "needed"), [(FINE, math.inf), (None, 1)])
def test_conditionings_run_separately_when_lean(plan, needed, model):
    """ComfyUI batches conditionings that need less memory than there is."""
    (wrapper,) = apply_lean(model, lambda _: plan).get_all_wrappers(WrappersMP.CALC_COND_BATCH)
    base, x, conds = Base(), torch.zeros(1, 16, 1, 2, 2), ["a", "b"]

    def executor(base, conds, *_):
        return [base.memory_required([2, *x.shape[1:]]), *conds]

    assert wrapper(executor, base, conds, x, None, {}) == [needed, *conds]
    assert base.memory_required(x.shape) == 1


def test_a_compiled_forward_is_stock(model, lean_blocks, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    forward(apply_lean(model, FINE))
    assert not lean_blocks
