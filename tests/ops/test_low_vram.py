"""Lean blocks give what the host's give, for every Wan variant and whatever other nodes chain."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from wanquant.ops.loader import load_diffusion_model
from wanquant.ops.low_vram import LeanPlan, apply_lean
from wanquant.quant import QuantError

CPU = torch.device("cpu")
PLANS = [LeanPlan(1, 1000), LeanPlan(2, 7), LeanPlan(2, 16, recomputed_groups=1)]


def forward(patcher):
    loaded = patcher.model.diffusion_model
    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in [(1, 16, 2, 8, 8), (1, 7, 4096)])
    options = {"wrappers": patcher.wrappers}
    with torch.no_grad():
        return loaded(x, torch.tensor([500.0]), text, transformer_options=options)


@pytest.fixture(scope="module")
def model(t2v):
    return load_diffusion_model(t2v[1], dtype=torch.float32)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_equals_the_hosts_forward(plan, model):
    expected = forward(model)
    torch.testing.assert_close(forward(apply_lean(model, plan)), expected, rtol=1e-5, atol=1e-5)


def test_refuses_groups_that_heads_cannot_form(model):
    with pytest.raises(QuantError, match="2 heads cannot be split into 3"):
        forward(apply_lean(model, LeanPlan(3, 8)))
