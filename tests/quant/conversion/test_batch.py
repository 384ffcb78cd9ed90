"""Which files a command makes of which sources."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QuantError
from wanquant.quant.conversion.batch import plan_batch
from wanquant.quant.conversion.settings import Target


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "Wan2.1-T2V.safetensors"
    save_file({"head.modulation": torch.ones(1, 2, 8), "head.head.weight": torch.ones(4, 8)}, path)
    return path


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_one_file(source, tmp_path):
    assert plan_batch(source, tmp_path / "a.gguf", ["Q8_0"]) == {source: [Target(tmp_path / "a.gguf", "Q8_0")]}
    sized = plan_batch(source, tmp_path / "a.gguf", ["Q8_0"], 1.5)
    assert sized == {source: [Target(tmp_path / "a.gguf", target_size=1.5)]}


def test_a_recipe_given_twice_counts_once(source, out):
    (targets,) = plan_batch(source, out, ["Q8_0", "Q4_0", "Q8_0"]).values()
    assert [target.destination.name for target in targets] == ["Wan2.1-T2V-Q8_0.gguf", "Wan2.1-T2V-Q4_0.gguf"]


def test_name_in_a_folder(source, out):
    (target,) = plan_batch(source, out, ["Q8_0"], 1.25)[source]
    assert target == Target(out / "Wan2.1-T2V-1.25GiB.gguf", target_size=1.25)


def test_name_tells_the_modules(source, tmp_path, out):
    module = tmp_path / "vace.safetensors"
    save_file({"vace_blocks.0.ffn.0.weight": torch.ones(4, 8)}, module)
    (target,) = plan_batch(source, out, ["Q8_0"], add_ons=[module])[source]
    assert target.destination.name == "Wan2.1-T2V-vace-Q8_0.gguf"


def test_sharded_folder_and_pattern_of_shards(tmp_path, out):
    folder = tmp_path / "Wan2.1-I2V"
    folder.mkdir()
    parts = {"head.modulation": torch.ones(1, 2, 8)}, {"head.head.weight": torch.ones(4, 8)}
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, part in zip(shards, parts, strict=True):
        save_file(part, shard)
    assert plan_batch(folder, out, ["Q8_0"]) == {folder: [Target(out / "Wan2.1-I2V-Q8_0.gguf", "Q8_0")]}
    of_pattern = plan_batch(folder / "*.safetensors", out, ["Q8_0"])
    assert of_pattern == {shards[0]: [Target(out / "model-Q8_0.gguf", "Q8_0")]}
    assert list(plan_batch(folder / "*-00002-*", out, ["Q8_0"])) == [shards[1]]


def test_sources_of_one_name(source, tmp_path, out):
    (tmp_path / "more").mkdir()
    shutil.copy(source, tmp_path / "more")
    with pytest.raises(QuantError, match=r"out/Wan2\.1-T2V: the name for .*more/Wan.*; convert these"):
        plan_batch(tmp_path / "**/*.safetensors", out, ["Q8_0"])


def test_source_that_cannot_be_opened_is_told_before_any_is_converted(source, tmp_path, out):
    save_file({"blocks.0.lora_A.weight": torch.ones(2, 2)}, tmp_path / "z.safetensors")
    with pytest.raises(QuantError, match=r"z\.safetensors: not a Wan model"):
        plan_batch(tmp_path / "*.safetensors", out, ["Q8_0"])
