"""Advice follows the simulator and the predicted sizes, for any machine."""

from __future__ import annotations

import json
import os
import re

import pytest

from wanquant.ops.budget.advise import OTHERS_GIB, RAM_BESIDE_GIB, advise, largest_recipe
from wanquant.ops.budget.choose_plan import choose_plan
from wanquant.ops.budget.published import PUBLISHED, PublishedModel, sampling, simulator
from wanquant.ops.budget.simulator import Simulator
from wanquant.quant import QuantError
from wanquant.quant.__main__ import main
from wanquant.quant.plan.advice import AdviceReport
from wanquant.quant.plan.recipe import find_recipe
from wanquant.quant.plan.wan_files import tensor_bytes
from wanquant.quant.plan.wan_shapes import SIZES
from wanquant.quant.units import GIB
from wanquant.testing.hosts import ROOT, checkout

VIDEO = (832, 480, 81)
SMALL = PublishedModel("small", SIZES["1.3B"]._replace(layers=2), (VIDEO,))


def one(vram, ram, model=SMALL):
    (advice,) = advise(vram, ram, [model]).advice
    return advice


def test_readme_has_the_files_that_are_advised_today():
    """The peaks take long to simulate; `dev.py bench fits --update` makes them anew too."""
    table = json.loads((ROOT / "bench" / "results" / "fits-simulated.json").read_text())
    sizes = {model.name: model.size for model in PUBLISHED}
    for row in table["rows"]:
        recipe = largest_recipe(sizes[row["model"]], table["ram_gib"])
        file = tensor_bytes(sizes[row["model"]], recipe) / GIB
        assert (row["recipe"], row["file_gib"]) == (recipe.name, round(file, 2))
        assert row["ram_gib"] == round(file + RAM_BESIDE_GIB, 1)


@pytest.mark.parametrize("vram", [1.6, 8])
def test_peak_is_that_of_the_chosen_plan(vram):
    advice, budget = one(vram, 32), round((vram - OTHERS_GIB) * GIB)
    choice = choose_plan(simulator(SMALL.size, advice.recipe), sampling(SMALL.size, VIDEO), budget)
    assert advice.vram_gib == round(choice.peak.total_bytes / GIB, 2) <= vram - OTHERS_GIB
    assert (advice.budget_gib > 0) == (choice.plan is not None)
    assert advice.how == ("Wan Low VRAM, budget 1.1" if choice.plan else "loader alone")


def test_more_main_memory_gives_more_bits():
    rooms = (0.075, 0.1, 32)
    recipes = [one(8, RAM_BESIDE_GIB + gib).recipe for gib in rooms]
    sizes = [tensor_bytes(SMALL.size, find_recipe(recipe)) for recipe in recipes]
    assert sizes == sorted(set(sizes)) and recipes[-1] == "Q8_0"
    for gib, nbytes in zip(rooms, sizes, strict=True):
        assert nbytes <= gib * GIB


def test_experts_need_the_main_memory_of_one():
    pair = SMALL._replace(files=2)
    both, alone = one(8, 16, pair), one(8, 16)
    assert (both.recipe, both.ram_gib, both.files) == (alone.recipe, alone.ram_gib, 2)


def test_models_of_one_size_are_simulated_once(monkeypatch):
    runs, run = [], Simulator.run
    monkeypatch.setattr(Simulator, "run", lambda *args, **kwargs: runs.append(args[1:]) or run(*args, **kwargs))
    base = SMALL._replace(size=SMALL.size._replace(layers=3))
    for vram in (8, 12):
        first, second = advise(vram, 32, [base, base._replace(name="tuned", files=2)]).advice
        assert first.vram_gib == second.vram_gib
    assert len(runs) == 1


def test_what_does_not_fit_says_what_would():
    assert "needs a GPU of" in one(1, 32).reason
    advice = one(8, 6.01)
    assert advice.reason == f"needs {advice.ram_gib:g} GiB of main memory"
    both = one(1, 6.01).reason
    ram, vram = map(float, re.fullmatch(r"needs (\S+) GiB of main memory and a GPU of (\S+) GiB, or .*", both).groups())
    assert not one(vram, ram).reason, "the advice can be followed"


def test_large_machines_are_named_in_plain_numbers():
    assert "For 7.6 GiB of video memory (other programs hold 0.5), and 65536 of main" in advise(7.62, 65536, []).text()


@pytest.mark.parametrize(("vram", "ram"), [(-1, 8), (8, -1), (float("nan"), 8), (8, float("inf"))])
def test_memory_that_is_none(vram, ram):
    with pytest.raises(QuantError, match="expected GiB, or 0 for this machine's"):
        advise(vram, ram, [])


def test_without_a_gpu_one_must_be_given():
    with pytest.raises(QuantError, match="has no GPU that PyTorch finds; give the GiB of one"):
        advise(0, 8, [])


def test_report_survives_json():
    report = advise(8, 32, [SMALL])
    assert AdviceReport.from_json(json.loads(json.dumps(report.json()))) == report
    assert "| small | 832x480x81 | Q8_0" in report.text()


def test_published_models_are_those_of_the_sizes():
    assert {model.size for model in PUBLISHED} >= set(SIZES.values())


def test_command_refuses_without_a_gpu(tmp_path, monkeypatch, capsys):
    site = f"import runpy\nrunpy.run_path({str(ROOT / 'testing' / 'host_shims.py')!r})['install']()\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    monkeypatch.setenv("COMFYUI_PATH", str(checkout()))
    assert main(["advise"]) == 1
    assert "give the GiB of one" in capsys.readouterr().err


def test_command_needs_comfyui(monkeypatch, capsys):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("wanquant.quant.host_process.PACK", ROOT / "nowhere")
    assert main(["advise", "--vram", "8"]) == 1
    assert "set COMFYUI_PATH" in capsys.readouterr().err
