"""Families of files: plans, worker processes, what fails, and what is written about it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, convert, write_calibration
from wanquant.quant.__main__ import main
from wanquant.quant.files.atomic_file import AtomicFile
from wanquant.quant.plan.recipe import RECIPES
from wanquant.quant.publish.job import Options
from wanquant.quant.publish.plan import PlannedFile, PlannedModel, Target, make_plan, split
from wanquant.quant.publish.request import ALL, Request
from wanquant.quant.publish.run import publish
from wanquant.quant.publish.worker import COMMAND
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.conftest import ROOT

RECIPE_NAMES = ["Q8_0", "Q4_K_M", "INT8"]
FAST = Options("fast")


@pytest.fixture(scope="module")
def published(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("published")
    return publish(Request(sources, out, RECIPE_NAMES, options=FAST), workers=2)


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def files_in(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.[gs]*") if path.is_file()}


def test_files_are_those_of_a_conversion(published, sources, tmp_path):
    assert published.ok and len(published.results) == 6
    for source in sources:
        for result in published.results:
            if result.destination.parent.name == source.stem:
                recipe = result.destination.stem.removeprefix(f"{source.stem}-")
                path = convert(source, tmp_path / result.destination.name, recipe, effort="fast").path
                assert result.destination.read_bytes() == path.read_bytes()


def test_manifest_sums_and_cards_describe_the_files(published):
    out = published.folder
    content = manifest_of(out)
    assert content["complete"] and content["missing"] == []
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {entry["path"] for entry in content["files"]}
    for entry in content["files"]:
        data = (out / entry["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert sums[entry["path"]] == entry["sha256"]
    card = (out / "wan-0" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "pipeline_tag: text-to-video" in card
    assert "| `wan-0-INT8.safetensors` |" in card and "| 0.27 | RTX 20" in card
    assert "publish wan-0.safetensors OUT --recipe Q8_0,Q4_K_M,INT8 --effort fast" in card
    assert str(out) not in card


def test_nothing_is_made_again(published, sources, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in published.folder.rglob("wan*.*") if path.is_file()}
    monkeypatch.setattr(subprocess, "Popen", None)
    again = publish(Request(sources, published.folder, RECIPE_NAMES, options=FAST))
    assert again.ok and all(result.reused for result in again.results)
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 6
    assert "6 reused" in again.text()


def test_plan_predicts_every_byte_and_writes_nothing(published, sources, tmp_path, capsys):
    arguments = ["publish", *map(str, sources), str(tmp_path / "out"), "--recipe", ",".join(RECIPE_NAMES)]
    assert main([*arguments, "--effort", "fast", "--plan", "--json"]) == 0
    assert not (tmp_path / "out").exists()
    planned = json.loads(capsys.readouterr().out)
    sizes = {os.path.basename(file["path"]): file["bytes"] for file in planned["files"]}
    assert sizes == {result.destination.name: result.entry["bytes"] for result in published.results}
    assert planned["needed_bytes"] == sum(sizes.values())
    plan = make_plan(Request(sources, published.folder, RECIPE_NAMES, options=FAST))
    assert all(file.exists for file in plan.files) and plan.needed_bytes == 0 and "exists already" in plan.text()


@pytest.mark.usefixtures("in_this_process")
def test_later_recipes_join_the_manifest(sources, tmp_path):
    for recipe in ("Q8_0", "Q4_0"):
        assert publish(Request(sources[:1], tmp_path, [recipe], options=FAST), workers=1).ok
    assert [entry["recipe"] for entry in manifest_of(tmp_path)["files"]] == ["Q4_0", "Q8_0"]
    (tmp_path / "wan-0" / "wan-0-Q4_0.gguf").unlink()
    publish(Request(sources[:1], tmp_path, ["Q8_0"], options=FAST), workers=1)
    assert [entry["recipe"] for entry in manifest_of(tmp_path)["files"]] == ["Q8_0"]
    assert "Q4_0" not in (tmp_path / "wan-0" / "README.md").read_text()


def test_all_is_every_recipe_that_is_not_experimental():
    assert set(ALL) == {name for name, recipe in RECIPES.items() if not recipe.experimental}


@pytest.mark.usefixtures("in_this_process")
def test_what_fails_is_named_and_the_rest_goes_on(sources, tmp_path, capsys):
    state = load_file(sources[1])
    state["head.head.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    out, missing = tmp_path / "out", tmp_path / "none.safetensors"
    (out / "wan-0").mkdir(parents=True)
    (out / "wan-0" / "wan-0-Q4_0.gguf").write_bytes(b"another file")
    arguments = ["publish", str(sources[0]), str(missing), str(tmp_path / "nan.safetensors"), str(out)]
    assert main([*arguments, "--recipe", "Q8_0,Q4_0,IQ2_XXS", "--effort", "fast"]) == 1
    said = capsys.readouterr()
    assert "1 file made" in said.out and "8 missing" in said.out
    reasons = {gone["path"]: gone["why"] for gone in manifest_of(out)["missing"]}
    assert len(reasons) == 8 and not manifest_of(out)["complete"]
    assert "is not this conversion" in reasons["wan-0/wan-0-Q4_0.gguf"]
    assert "requires" in reasons["wan-0/wan-0-IQ2_XXS.gguf"]
    assert "no such file" in reasons["none/none-Q8_0.gguf"]
    assert "NaN" in reasons["nan/nan-Q8_0.gguf"]
    assert all("\n" not in why for why in reasons.values())
    assert not list(out.rglob("*.tmp")) and (out / "wan-0" / "wan-0-Q4_0.gguf").read_bytes() == b"another file"


@pytest.mark.usefixtures("in_this_process")
def test_a_source_that_vanishes_after_the_plan(sources, tmp_path):
    gone = write_tiny_wan(tmp_path / "gone.safetensors", layers=1, ffn_dim=512)
    request = Request([gone, sources[0]], tmp_path / "out", ["Q8_0"], options=FAST)
    made = publish(request, workers=1, on_plan=lambda plan: gone.unlink())
    assert [bool(result.entry) for result in made.results] == [False, True] and not made.ok
    (missing,) = manifest_of(tmp_path / "out")["missing"]
    assert missing["path"] == "gone/gone-Q8_0.gguf" and "no such file" in missing["why"]


@pytest.mark.usefixtures("in_this_process")
def test_a_disk_that_is_full_for_one_model(sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage

    def full(path):
        return usage(path)._replace(free=100) if "wan-0" in str(path) else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    made = publish(Request(sources, tmp_path, ["Q8_0", "INT8"], options=FAST), workers=1)
    assert [bool(result.entry) for result in made.results] == [False, False, True, True]
    missing = manifest_of(tmp_path)["missing"]
    assert len(missing) == 2 and all("free some space" in gone["why"] for gone in missing)
    assert not list((tmp_path / "wan-0").glob("*wan*"))
    monkeypatch.undo()
    assert publish(Request(sources, tmp_path, ["Q8_0", "INT8"], options=FAST), workers=1).ok
    assert manifest_of(tmp_path)["complete"]


@pytest.mark.usefixtures("in_this_process")
def test_calibrations_are_found_by_the_stem(sources, tmp_path):
    collector = CalibrationCollector()
    collector.add("blocks.0.ffn.0.weight", torch.randn(300, 256))
    write_calibration(tmp_path / "wan-0.safetensors", collector.result())
    request = Request(sources, tmp_path / "out", ["Q4_0"], calibrations=tmp_path, options=FAST)
    good, bad = publish(request, workers=1).results
    assert good.entry["calibration_sha256"] and "No such file" in bad.why
    assert "for more error of the weights themselves" in (tmp_path / "out/wan-0/README.md").read_text()
    other = CalibrationCollector()
    other.add("blocks.0.ffn.0.weight", torch.randn(300, 512))
    write_calibration(tmp_path / "wan-1.safetensors", other.result())
    good, bad = publish(request, workers=1).results
    assert good.reused and "expected (256,) for the input channels in this model; choose" in bad.why


@pytest.mark.usefixtures("in_this_process")
def test_sizes_and_loras(sources, tmp_path):
    lora = tmp_path / "speed.safetensors"
    layer = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{layer}.lora_down.weight": torch.randn(4, 256), f"{layer}.lora_up.weight": torch.randn(256, 4)}, lora)
    arguments = ["publish", str(sources[0]), str(tmp_path / "out"), "--recipe", "Q4_0,Q8_0", "--effort", "fast"]
    assert main([*arguments, "--target-size", "0.0038,0.004", "--lora", f"{lora}:0.5", "--workers", "1"]) == 0
    entries = manifest_of(tmp_path / "out")["files"]
    assert [entry["target_gib"] for entry in entries] == [0.0038, 0.004]
    assert all(entry["loras"] == ["speed.safetensors:0.5"] for entry in entries)
    assert all(entry["bytes"] <= entry["target_gib"] * 2**30 for entry in entries)


def test_two_publishers_do_not_share_a_folder(sources, tmp_path):
    with (
        AtomicFile(tmp_path / "manifest.json", 0),
        pytest.raises(QuantError, match=r"manifest\.json: another process is writing it"),
    ):
        publish(Request(sources, tmp_path, ["Q8_0"]))


def test_same_names_of_two_sources(sources, tmp_path):
    (tmp_path / "wan-0.safetensors").symlink_to(sources[1])
    plan = make_plan(Request([sources[0], tmp_path / "wan-0.safetensors"], tmp_path / "out", ["Q8_0"], options=FAST))
    assert [bool(file.why) for file in plan.files] == [False, True]
    assert "would have the names" in plan.text()


def test_a_worker_that_dies_is_replaced(sources, tmp_path, published):
    killed = []

    def kill(worker, done, total, name):
        if not killed:
            (child,) = (each for each in psutil.Process().children() if COMMAND[2] in each.cmdline())
            killed.append(child.pid)
            child.kill()

    again = publish(Request(sources[:1], tmp_path, RECIPE_NAMES, options=FAST), workers=1, on_progress=kill)
    assert killed and again.ok
    made = files_in(published.folder)
    assert {name: made[name] for name in files_in(tmp_path)} == files_in(tmp_path)


def test_a_progress_that_fails_ends_the_publication(sources, tmp_path):
    """Both workers are at work then, and a job waits for one of them."""
    third = write_tiny_wan(tmp_path / "wan-2.safetensors", layers=1, ffn_dim=512, seed=2)

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish(Request([*sources, third], tmp_path / "out", ["Q8_0"], options=FAST), workers=2, on_progress=fail)


@pytest.mark.usefixtures("in_this_process")
def test_a_killed_publisher_is_resumed(tmp_path):
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=2)
    whole = convert(source, tmp_path / "wan-Q4_K_M.gguf", "Q4_K_M").path.read_bytes()
    command = [sys.executable, str(ROOT / "wanquant.py"), "publish", str(source), str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--recipe", "Q4_K_M"], start_new_session=True, stderr=subprocess.DEVNULL)
    made, journal = (tmp_path / "out" / "wan" / name for name in ("wan-Q4_K_M.gguf", ".wan-Q4_K_M.gguf.journal"))
    while process.poll() is None and not journal.exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert journal.exists() and not made.exists()
    assert main([*command[2:], "--recipe", "Q4_K_M"]) == 0
    assert made.read_bytes() == whole and not journal.exists()


def test_jobs_are_halved_only_where_workers_would_wait():
    def model(stem, *costs):
        files = [PlannedFile(Target(stem / f"{n}.gguf"), seconds=cost) for n, cost in enumerate(costs)]
        return PlannedModel(stem, stem.name, files, FAST)

    def sizes(models, workers):
        return [len(job.targets) for job in split(models, workers)]

    a, b = (model(ROOT / name, 1, 1, 1, 1) for name in "ab")
    assert sizes([a, b], 1) == sizes([a, b], 2) == [4, 4]
    assert sizes([a], 2) == [2, 2]
    assert sorted(sizes([a, b], 8)) == [1] * 8
    assert sum(sizes([a, model(ROOT / "c", 9)], 2)) == 5
