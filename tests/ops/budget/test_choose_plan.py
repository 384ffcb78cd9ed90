"""The chosen plan is the fastest within a budget, and the README's budgets for the published models hold."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from wanquant.bench.memory import CASES, MODELS, SMALL, rows
from wanquant.ops import host
from wanquant.ops.budget.automatic import AUTOMATIC
from wanquant.ops.budget.choose_plan import MOST_EXTRA_ARITHMETIC, budget_bytes, choose_plan, closest_plan, memory_plans
from wanquant.ops.budget.published import sampling, simulator
from wanquant.ops.budget.sampling_job import SamplingJob
from wanquant.quant import QuantError
from wanquant.quant.plan.recipe import RECIPES
from wanquant.quant.plan.wan_shapes import SIZES
from wanquant.quant.units import GIB

TINY = SIZES["1.3B"]._replace(layers=1)
LATENT = SamplingJob((1, 16, 5, 60, 104))


@pytest.fixture(scope="module")
def small():
    return simulator(SIZES["1.3B"]._replace(layers=2), "Q8_0")


@pytest.mark.parametrize(
    ("model", "video", "gib"), [("14B-T2V", 0, 2.0), ("14B-T2V", 1, 3.5), ("1.3B-T2V", 0, 1.2)], ids=str
)
def test_budgets_of_published_models(model, video, gib):
    """Models in Q4_K_M, at most 3 % of extra arithmetic; the budgets include CUDA's context."""
    wanted = sampling(MODELS[model], CASES[model][video][0])
    choice = choose_plan(simulator(MODELS[model], "Q4_K_M"), wanted, round(gib * GIB))
    assert choice.name == "lean"
    assert choice.peak.total_bytes <= gib * GIB
    assert choice.slowdown <= 1 + MOST_EXTRA_ARITHMETIC


@pytest.mark.parametrize("heads", [1, 12, 24, 40])
def test_memory_plans_are_sorted_from_coarse_to_fine(heads):
    plans = memory_plans(heads)
    for plan in plans:
        plan.check(heads)
    assert [plan.token_chunk for plan in plans] == sorted((plan.token_chunk for plan in plans), reverse=True)


def test_the_fastest_plan_within_the_budget_is_chosen(small):
    plans = [None, *memory_plans(small.heads)]
    totals = [small.peak(LATENT, plan).total_bytes for plan in plans]
    assert totals[1:] == sorted(totals[1:], reverse=True)
    assert totals[-1] < 0.85 * totals[0]
    assert choose_plan(small, LATENT, totals[0]).plan is None
    for total in totals:
        first = plans[next(i for i, t in enumerate(totals) if t <= total)]
        chosen = choose_plan(small, LATENT, total)
        assert chosen.peak.total_bytes <= total
        assert (chosen.plan and chosen.plan.head_groups) == (first and first.head_groups)


def test_no_plan_is_simulated_that_cannot_be_chosen(small, monkeypatch):
    """Finer plans take long, and one whose chunks are all of one length is not another one."""
    plans, asked, own = memory_plans(small.heads), [], small.peak
    totals = [own(LATENT, plan).total_bytes for plan in plans]
    first = next(i for i, total in enumerate(totals) if total < own(LATENT, None).total_bytes)
    monkeypatch.setattr(small, "peak", lambda job, plan: asked.append(plan) or own(job, plan))
    assert closest_plan(small, LATENT, totals[first]).plan
    assert {None, *plans[: first + 1]} <= set(asked) and not set(asked) & set(plans[first + 1 :])
    lean = {plan for plan in asked if plan}
    assert len({replace(plan, wide_chunk=plan.chunk_without_keys) for plan in lean}) == len(lean)


def test_the_rest_of_a_budget_makes_chunks_longer():
    """A large GPU is busy only with long chunks, and its attention with all queries of some heads."""
    large, job = simulator(SIZES["14B"], "Q4_K_M"), SamplingJob.for_video(1280, 720, 81)
    chosen = choose_plan(large, job, round(3.5 * GIB))
    assert chosen.plan.wide_chunk == 8192 and chosen.traffic < 1.75
    assert chosen.plan.head_groups * chosen.plan.token_chunk * 4 >= 75600


def test_where_all_plans_cost_much_one_is_left(small, monkeypatch):
    monkeypatch.setattr("wanquant.ops.budget.choose_plan.MOST_EXTRA_ARITHMETIC", -0.5)
    assert closest_plan(small, LATENT, 0).plan in (None, memory_plans(small.heads)[0])


def test_where_none_fits_the_least_is_named(small, monkeypatch):
    """What the allocator holds may be less for a coarser plan than for the finest."""
    plans = memory_plans(small.heads)
    least, own = plans[-2], small.peak

    def peak(job, plan):
        found = own(job, plan)
        return found if plan == least else replace(found, held_bytes=found.held_bytes + (1 << 20))

    monkeypatch.setattr(small, "peak", peak)
    assert closest_plan(small, LATENT, 0).plan == least


def test_long_chunks_of_keys_do_not_need_long_chunks_elsewhere():
    """The FFN needs most of the 5B, so that nothing but the projections of the attention gets longer chunks."""
    large, job = simulator(SIZES["5B"], "Q4_K_M"), SamplingJob.for_video(832, 480, 81, channels=48)
    plan = choose_plan(large, job, round(1.2 * GIB)).plan
    assert plan.wide_chunk < plan.token_chunk


def test_a_refusal_names_a_budget_and_a_number_of_frames(small):
    least = small.peak(LATENT, memory_plans(small.heads)[-1]).total_bytes
    with pytest.raises(
        QuantError, match=r"832x480, 17 frames needs at least 0\.\d\d GiB \(weights .*at most \d+ frames .*keep within"
    ) as refusal:
        choose_plan(small, LATENT, least - (8 << 20))
    frames = int(str(refusal.value).split(" frames of this size")[0].rsplit(" ", 1)[1])
    assert frames in (1, 5, 9, 13)
    choose_plan(small, SamplingJob.for_video(832, 480, frames), least - (8 << 20))
    width, height = map(int, re.search(r"choose (\d+)x(\d+)", str(refusal.value)).groups())
    assert 400 < width < 832 and abs(width / height - 832 / 480) < 0.2
    choose_plan(small, SamplingJob.for_video(width, height, 17), least - (8 << 20))
    assert str(refusal.value).endswith("or choose a smaller size or fewer frames")


def test_a_refusal_advises_nothing_that_cannot_be_done(small):
    advice = r"not even one frame .*; free another 0\.\d+ GiB of video memory, .*or choose a smaller size$"
    with pytest.raises(QuantError, match=advice):
        choose_plan(small, LATENT, GIB // 4, is_all=True)


def test_a_refusal_names_a_recipe_that_would_fit():
    large = simulator(TINY, "Q8_0")
    least = large.peak(LATENT, memory_plans(large.heads)[-1]).total_bytes
    with pytest.raises(QuantError) as refusal:
        choose_plan(large, LATENT, least - (4 << 20))
    recipe = re.search(r"load a file in (\w+) or smaller", str(refusal.value))[1]
    assert recipe in RECIPES and recipe != "Q8_0"
    choose_plan(simulator(TINY, recipe), LATENT, least - (4 << 20))


def test_a_plan_tells_the_bytes_of_a_step(small):
    lean = choose_plan(small, LATENT, small.peak(LATENT, memory_plans(small.heads)[-1]).total_bytes)
    assert 0.5 < lean.traffic < 3
    assert f"{lean.traffic:.2f}x the bytes of a step" in str(lean)


@pytest.mark.parametrize("gib", [-1, math.nan, math.inf, 8000])
def test_refuses_impossible_budgets(gib):
    with pytest.raises(QuantError, match="budget_gib"):
        budget_bytes(gib)
    assert budget_bytes(3.5) == 3.5 * GIB
    assert budget_bytes(0) == AUTOMATIC


def test_loras_of_every_layer_are_counted():
    plain, patched = (simulator(TINY, "Q8_0", loras).peak(LATENT, None) for loras in (0, 2))
    layers = 8 * 1536 * 1536 + 2 * 1536 * 8960
    flops_per_element = 2 * 64 * 2
    assert patched.flops - plain.flops >= flops_per_element * layers


@pytest.mark.skipif(not host.has_int8(), reason="this ComfyUI has no 8-bit products")
def test_rows_of_the_benchmark(monkeypatch):
    monkeypatch.setattr("wanquant.bench.memory.MODELS", {"1.3B-T2V": TINY})
    monkeypatch.setattr("wanquant.bench.memory.CASES", {"1.3B-T2V": ((SMALL, 1.2),)})
    *exact, stock, lean = rows("Q8_0")
    assert [(row["precision"], row["plan"]) for row in exact] == [("exact", "stock"), ("exact", "lean")]
    assert lean["precision"] == "int8" and lean["parts"]["scratch"] != exact[1]["parts"]["scratch"]
    for row, name in ((stock, "stock"), (lean, "lean")):
        assert (row["model"], row["recipe"], row["plan"]) == ("1.3B-T2V", "Q8_0", name)
        assert (row["width"], row["height"], row["frames"]) == (832, 480, 81)
        assert row["parts"].keys() == {"weights", "scratch", "activations", "fragmentation", "context"}
        assert sum(row["parts"].values()) == pytest.approx(row["peak_gib"], abs=0.003)
        assert row["peak_gib"] <= row["budget_gib"]
        assert row["slowdown"] >= 1
