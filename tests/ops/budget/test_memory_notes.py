"""What a sampling runs besides the lean path, in words, and what its attention needs in predictions."""

from __future__ import annotations

import pytest
import torch

from wanquant.ops import host_products
from wanquant.ops.budget.choose_plan import memory_plans
from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.budget.memory_notes import attention_of, memory_notes
from wanquant.ops.budget.simulator import Simulator
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.tests.ops.budget.test_sampling import JOB


@pytest.fixture(scope="module")
def model(t2v):
    return load_diffusion_model(t2v[1], dtype=torch.float32)


def attend(*_, **__):
    raise AssertionError("not called")


def test_attention_that_is_not_the_usual_one_is_counted_and_named(model, monkeypatch):
    assert memory_notes(model) == []
    plan = memory_plans(2)[-1]
    usual = Simulator.from_patcher(model).peak(JOB, plan)
    other = model.clone()
    other.model_options["transformer_options"] = {"optimized_attention_override": attend}
    assert "another node (attend): it gets the queries all at once" in memory_notes(other)[0]
    assert Simulator.from_patcher(other)._attention.accepts_query_chunks is False
    monkeypatch.setattr(host_products, "attends_in_8_bits", lambda: True)
    assert "in 8 bits" in memory_notes(model)[0]
    assert Simulator.from_patcher(model).peak(JOB, plan).total_bytes >= usual.total_bytes
    q = torch.empty(1, 1024, 256, device="meta", dtype=torch.float16)
    with LiveMemory("meta") as memory, torch.no_grad():
        attention_of(model)(None, q, q, q, 2)
    assert memory.peak.nbytes >= 3 * q.numel() + q.nbytes, "copies of q, k and v in 8 bits, and the output"


def test_blocks_that_run_as_in_comfyui_are_named(model, monkeypatch):
    block = model.model.diffusion_model.blocks[0]
    monkeypatch.setattr(block, "forward", lambda *_, **__: None)
    assert "runs 1 of 2 blocks," in memory_notes(model)[0]


def test_patches_that_get_all_tokens_are_named(model):
    other = model.clone()
    other.set_model_attn2_patch(attend)
    (note,) = memory_notes(other)
    assert note.startswith("attend of another node gets all tokens in each block")
    assert memory_notes(model) == []
