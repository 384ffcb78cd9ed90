"""Lean blocks return what ComfyUI's blocks return, for every Wan variant."""

from __future__ import annotations

import importlib
import pkgutil
import re

import comfy.ldm.wan
import comfy.ldm.wan.model as wan
import comfy.ops
import pytest
import torch
from comfy.ldm.wan.ar_model import CausalWanModel
from comfy.model_patcher import ModelPatcher

from wanquant.ops.lean import MemoryPlan, apply_lean
from wanquant.ops.lean.variants import VARIANTS
from wanquant.quant import QuantError
from wanquant.testing.hosts import ROOT
from wanquant.tests.ops import test_variants

CPU = torch.device("cpu")
PLANS = [MemoryPlan(1, 1000), MemoryPlan(4, 7), MemoryPlan(4, 16, 1), MemoryPlan(2, 5, 1), MemoryPlan(4, 7, 2, 20)]
FINE = MemoryPlan(4, 7, 3)

# Inputs of a forward that test_variants.INPUTS lacks or has otherwise.
INPUTS = test_variants.INPUTS | {
    "vace": {"vace_context": (1, 2, 96, 2, 8, 8), "vace_strength": [1.0, 0.5]},
    "t2v-14B-i2v": {},
    "fun-control-ref": {"clip_fea": (1, 257, 1280), "reference_latent": (1, 16, 8, 8)},
}


def build(name="t2v", dtype=torch.float32, **arguments):
    """Return a tiny model with random weights, in ComfyUI's patcher."""
    cls, variant, _ = test_variants.VARIANTS[name]
    if cls is None:
        pytest.skip(f"this host has no {name}")
    sizes = test_variants.TINY | {"num_heads": 4} | variant | arguments
    generator = torch.Generator().manual_seed(0)
    model = cls(**sizes, dtype=dtype, operations=comfy.ops.manual_cast)
    for key, parameter in model.named_parameters():
        # Norms near one and strong modulation make the attention's effect visible in the output.
        mean, deviation = (
            (1, 0.1) if parameter.ndim == 1 and key.endswith("weight") else (0, parameter[0].numel() ** -0.5)
        )
        deviation = 0.5 if key.endswith("modulation") else deviation
        parameter.requires_grad_(False).copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
    root = torch.nn.Module()
    root.diffusion_model = model
    return ModelPatcher(root, CPU, CPU)


def forward(patcher, name="t2v", *, batch=1, dtype=torch.float32, timestep=None, **options):
    model = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(1)

    def noise(shape):
        return torch.randn(shape, generator=generator).to(dtype)

    extra = {key: noise(v).expand(batch, *v[1:]) if isinstance(v, tuple) else v for key, v in INPUTS[name].items()}
    x, text = noise((batch, model.in_dim, *test_variants.VIDEO[2:])), noise((batch, *test_variants.TEXT[1:]))
    timestep = torch.full((batch,), 500.0) if timestep is None else timestep
    options |= {"wrappers": patcher.wrappers}
    with torch.no_grad():
        return model(x, timestep, text, transformer_options=options, **extra)


def error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def t2v_model():
    return build()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_hosts_forward(plan, batch, t2v_model, lean_blocks):
    expected = forward(t2v_model, batch=batch)
    assert error(forward(apply_lean(t2v_model, plan), batch=batch), expected) < 1e-5
    assert lean_blocks == list(t2v_model.model.diffusion_model.blocks)


@pytest.mark.parametrize("name", INPUTS)
def test_variant(name, lean_blocks):
    model = build(name)
    expected = forward(model, name)
    assert error(forward(apply_lean(model, FINE), name), expected) < 1e-5
    transformer = model.model.diffusion_model
    blocks = list(transformer.blocks)
    entry = VARIANTS[type(transformer).__name__]
    calls = (2 if name == "animate2" else 1) * entry.lean_blocks  # for the poses and for the video
    assert [block for block in lean_blocks if block in blocks] == [block for block in blocks for _ in range(calls)]
    assert len(lean_blocks) - len(blocks) * calls == 2 * len(getattr(transformer, "vace_blocks", ()))
    assert not any("forward" in vars(module) for module in transformer.modules()), "every replaced forward is restored"


def subclasses(cls):
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def test_every_class_of_the_host_is_in_the_table():
    for module in pkgutil.iter_modules(comfy.ldm.wan.__path__):
        importlib.import_module(f"comfy.ldm.wan.{module.name}")
    own = [cls for cls in subclasses(wan.WanModel) if cls.__module__.startswith("comfy.")]
    assert {CausalWanModel, wan.WanModel} <= {*own}
    assert {cls.__name__ for cls in own} <= VARIANTS.keys()


def test_the_table_is_in_the_documentation():
    rows = re.findall(r"^\| (.*) \| `(\w+)` \| (\w+) \| (.*?) \|", (ROOT / "docs/memory.md").read_text(), re.MULTILINE)
    assert rows == [(v.models, name, v.level, v.stock) for name, v in VARIANTS.items()]
    page = (ROOT / "web/docs/WanQuantLowVRAM.md").read_text()
    for variant in VARIANTS.values():
        assert all(name in page for name in variant.models.split(", ") if variant.stock)


def test_refuses_groups_that_do_not_divide_the_heads(t2v_model):
    with pytest.raises(QuantError, match="4 heads cannot be split into 3"):
        forward(apply_lean(t2v_model, MemoryPlan(3, 8)))


@pytest.mark.parametrize("plan", [(0, 1), (1, 0), (2, 8, 2), (2, 8, -1), (2, 8, 0, -1)], ids=str)
def test_refuses_impossible_plans(plan):
    with pytest.raises(QuantError, match="expected head_groups >= 1"):
        MemoryPlan(*plan)
