"""The files that a command makes of each source."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QuantError
from wanquant.quant.conversion.batch import list_targets
from wanquant.quant.conversion.settings import Target
from wanquant.testing.tiny_wan import completed


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "Wan2.1-T2V.safetensors"
    save_file(completed({"head.head.weight": torch.ones(4, 8)}), path)
    return path


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_one_source_and_one_file(source, tmp_path):
    assert list_targets(source, tmp_path / "a.gguf", ["Q8_0"]) == {source: [Target(tmp_path / "a.gguf", "Q8_0")]}
    sized = list_targets(source, tmp_path / "a.gguf", ["Q8_0"], 1.5)
    assert sized == {source: [Target(tmp_path / "a.gguf", target_size=1.5)]}


def test_repeated_recipe_counts_once(source, out):
    (targets,) = list_targets(source, out, ["Q8_0", "Q4_0", "Q8_0"]).values()
    assert [target.destination.name for target in targets] == ["Wan2.1-T2V-Q8_0.gguf", "Wan2.1-T2V-Q4_0.gguf"]


def test_name_in_a_folder_contains_source_and_size(source, out):
    (target,) = list_targets(source, out, ["Q8_0"], 1.25)[source]
    assert target == Target(out / "Wan2.1-T2V-1.25GiB.gguf", target_size=1.25)


def test_name_contains_the_add_ons(source, tmp_path, out):
    add_on = tmp_path / "vace.safetensors"
    save_file({"ref_conv.weight": torch.ones(8, 4, 2, 2), "ref_conv.bias": torch.ones(8)}, add_on)
    (target,) = list_targets(source, out, ["Q8_0"], add_ons=[add_on])[source]
    assert target.destination.name == "Wan2.1-T2V-vace-Q8_0.gguf"


def test_shards_are_one_source(tmp_path, out):
    folder = tmp_path / "Wan2.1-I2V"
    folder.mkdir()
    tensors = completed({})
    parts = {name: tensors.pop(name) for name in ("head.modulation", "head.head.weight")}, tensors
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, part in zip(shards, parts, strict=True):
        save_file(part, shard)
    assert list_targets(folder, out, ["Q8_0"]) == {folder: [Target(out / "Wan2.1-I2V-Q8_0.gguf", "Q8_0")]}
    of_pattern = list_targets(folder / "*.safetensors", out, ["Q8_0"])
    assert of_pattern == {shards[0]: [Target(out / "model-Q8_0.gguf", "Q8_0")]}
    assert list(list_targets(folder / "*-00002-*", out, ["Q8_0"])) == [shards[1]]


def test_sources_with_the_same_name_are_refused(source, tmp_path, out):
    (tmp_path / "more").mkdir()
    shutil.copy(source, tmp_path / "more")
    with pytest.raises(QuantError, match=r"out/Wan2\.1-T2V: would be the name for both .*more/Wan.*; convert these"):
        list_targets(tmp_path / "**/*.safetensors", out, ["Q8_0"])


def test_every_source_is_opened_before_any_is_converted(source, tmp_path, out):
    save_file({"blocks.0.lora_A.weight": torch.ones(2, 2)}, tmp_path / "z.safetensors")
    with pytest.raises(QuantError, match=r"z\.safetensors: not a Wan model"):
        list_targets(tmp_path / "*.safetensors", out, ["Q8_0"])
