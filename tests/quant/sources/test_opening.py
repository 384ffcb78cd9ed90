"""Checkpoints that consist of several files."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, QuantError, convert, open_gguf
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.sources.opening import shard_of
from wanquant.testing.tiny_wan import write_tiny_wan

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def state(tmp_path):
    return load_file(write_tiny_wan(tmp_path / "whole.safetensors", layers=1))


def write_shards(folder, state, n_shards=3, **listed):
    """Write shards and their index; `listed` overrides entries of the index."""
    folder.mkdir()
    weight_map = {}
    for number in range(n_shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        shard = {key: state[key] for key in list(state)[number::n_shards]}
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map | listed}))
    return folder


SECOND = "diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("given", "indexed"), [("", True), (INDEX, True), (SECOND, True), ("", False), (SECOND, False)], ids=str
)
def test_shards_are_one_checkpoint(tmp_path, state, given, indexed):
    folder = write_shards(tmp_path / "model", state)
    if not indexed:
        (folder / INDEX).unlink()
    with open_checkpoint(folder / given) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(tensor.read().view(tensor.shape), state[name])
        shards = sorted(folder.glob("*.safetensors"))
        digests = "".join(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards)
        assert checkpoint.files.sha256() == hashlib.sha256(digests.encode()).hexdigest()
        assert checkpoint.identity.size == sum(shard.stat().st_size for shard in shards)


NEW_VARIANT, OLD_VARIANT = "m.fp16-{:05d}-of-00003.safetensors", "m-{:05d}-of-00003.fp16.safetensors"


@pytest.mark.parametrize("pattern", [NEW_VARIANT, OLD_VARIANT])
@pytest.mark.parametrize("listed", [None, "{}", "./{}"])
@pytest.mark.parametrize("given", ["", "shard", "index"])
def test_variants(tmp_path, state, pattern, given, listed):
    """Diffusers writes a variant before the last suffix, or before the number of the shard."""
    folder = write_shards(tmp_path / "model", state)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    names = {shard.name: pattern.format(i) for i, shard in enumerate(sorted(folder.glob("*.safetensors")), 1)}
    for name, new in names.items():
        (folder / name).rename(folder / new)
    (folder / INDEX).unlink()
    index = folder / "m.safetensors.index.fp16.json"
    if listed is not None or given == "index":
        new_map = {key: (listed or "{}").format(names[name]) for key, name in weight_map.items()}
        index.write_text(json.dumps({"weight_map": new_map}))
    path = {"": folder, "index": index, "shard": folder / pattern.format(2)}[given]
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
    assert shard_of(path)[0] in ("model", "m", "m.fp16")


@pytest.mark.parametrize("given", ["", "m-00002-of-00003.SAFETENSORS"])
@pytest.mark.parametrize("index", [None, "m.SAFETENSORS.index.json", "m.SAFETENSORS.INDEX.JSON"])
def test_suffixes_in_capitals(tmp_path, state, given, index):
    folder = write_shards(tmp_path / "model", state)
    for shard in list(folder.glob("*.safetensors")):
        shard.rename(folder / f"m-{shard.stem.partition('-')[2]}.SAFETENSORS")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).unlink()
    if index:
        renamed = {key: f"m-{name[:-12].partition('-')[2]}.SAFETENSORS" for key, name in weight_map.items()}
        (folder / index).write_text(json.dumps({"weight_map": renamed}))
    with open_checkpoint(folder / given) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()


def test_parts_of_a_gguf_with_suffixes_in_capitals(tmp_path, state):
    for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
        specs = [TensorSpec(name, QTYPES["BF16"], tuple(state[name].shape)) for name in names]
        with GGUFWriter(tmp_path / f"m-0000{number}-of-00002.GGUF.gguf", {}, specs) as writer:
            for name in names:
                writer.write(name, QTYPES["BF16"].quantize(state[name].float()))
        (tmp_path / f"m-0000{number}-of-00002.GGUF.gguf").rename(tmp_path / f"m-0000{number}-of-00002.GGUF")
    with open_checkpoint(tmp_path / "m-00002-of-00002.GGUF") as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()


def test_shards_convert_to_the_same_tensors_as_one_file(tmp_path, state):
    folder = write_shards(tmp_path / "model", state)
    sharded = convert(folder, tmp_path / "a.gguf", "Q8_0", effort="fast")
    convert(tmp_path / "whole.safetensors", tmp_path / "b.gguf", "Q8_0", effort="fast")
    whole = open_gguf(tmp_path / "b.gguf").tensors
    for name, tensor in open_gguf(tmp_path / "a.gguf").tensors.items():
        assert torch.equal(tensor.data, whole[name].data)
    assert convert(folder, tmp_path / "a.gguf", "Q8_0", effort="fast").reused
    assert sharded.source_bytes == sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))


@pytest.mark.parametrize("indexed", [True, False])
def test_missing_shard_is_refused(tmp_path, state, indexed):
    folder = write_shards(tmp_path / "model", state)
    (folder / SECOND).unlink()
    if not indexed:
        (folder / INDEX).unlink()
    with pytest.raises(QuantError, match=r"00002-of-00003\.safetensors: missing, expected all 3 shards"):
        open_checkpoint(folder)


def test_tensor_in_two_shards_is_refused(tmp_path, state):
    folder = write_shards(tmp_path / "model", state)
    second = sorted(folder.glob("*.safetensors"))[1]
    save_file(load_file(second) | {"head.modulation": state["head.modulation"]}, second)
    with pytest.raises(QuantError, match=r"tensor head\.modulation: is in .*0000\d-of-00003.safetensors too"):
        open_checkpoint(folder)


def test_index_that_lists_a_tensor_twice_is_refused(tmp_path, state):
    folder = write_shards(tmp_path / "model", state)
    text = (folder / INDEX).read_text()
    name = "diffusion_pytorch_model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"head.modulation": "{name}", '))
    with pytest.raises(QuantError, match=r"the name head\.modulation occurs twice"):
        open_checkpoint(folder)


def test_index_that_does_not_match_the_shards_is_refused(tmp_path, state):
    name = "diffusion_pytorch_model-00001-of-00003.safetensors"
    folder = write_shards(tmp_path / "model", state, **{"blocks.9.ffn.0.weight": name})
    with pytest.raises(QuantError, match=r"tensor blocks\.9\.ffn\.0\.weight: listed in .*, found in no shard"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(QuantError, match=r"index\.json: (the index is not JSON|no weight_map|shard None)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "a/b"])
def test_index_with_paths_outside_its_folder_is_refused(tmp_path, shard):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(QuantError, match="expected names of files beside the index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "names", [(), ("a.safetensors", "b.safetensors"), ("a-00001-of-00001.safetensors", "b.safetensors")], ids=str
)
def test_folder_that_is_not_one_checkpoint_is_refused(tmp_path, names):
    for name in names:
        save_file({"head.modulation": torch.zeros(1, 2, 2)}, tmp_path / name)
    message = rf"0 files \*\.safetensors\.index\.json and {len(names)} \*\.safetensors in it, expected one index or"
    with pytest.raises(QuantError, match=message):
        open_checkpoint(tmp_path)


def test_split_gguf_is_a_source(tmp_path, state):
    names = list(state)
    parts = [names[::2], names[1::2]]
    for number, part in enumerate(parts):
        specs = [TensorSpec(name, QTYPES["F32"], tuple(state[name].shape)) for name in part]
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        path = tmp_path / f"wan-{number + 1:05d}-of-00002.gguf"
        with GGUFWriter(path, {"general.architecture": "wan"} | split, specs) as writer:
            for spec in specs:
                writer.write(spec.name, QTYPES["F32"].quantize(state[spec.name].float()))
    with open_checkpoint(tmp_path / "wan-00001-of-00002.gguf") as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(tensor.read().view(tensor.shape), state[name].float())


def test_requantizing_a_gguf_keeps_shapes_and_warns(tmp_path, state):
    convert(tmp_path / "whole.safetensors", tmp_path / "a.gguf", "Q8_0", effort="fast")
    report = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_K_M", effort="fast")
    assert report.warnings == ("a.gguf is quantized already (Q8_0), so that the errors of both quantizations add up",)
    assert report.warnings[0] in report.text()
    tensors = open_gguf(tmp_path / "b.gguf").tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: tuple(t.shape) for n, t in state.items()}
    weight = state["blocks.0.ffn.0.weight"].float()
    assert (tensors["blocks.0.ffn.0.weight"].dequantize() - weight).norm() / weight.norm() < 0.1


def test_tensors_that_already_have_the_type_are_copied(tmp_path, state):
    first = convert(tmp_path / "whole.safetensors", tmp_path / "a.gguf", "Q4_K_M", effort="fast")
    again = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_K_M")
    tensors = open_gguf(first.path).tensors
    assert all(torch.equal(tensor.data, tensors[name].data) for name, tensor in open_gguf(again.path).tensors.items())
    assert {tensor.relative_error for tensor in again.tensors} == {0.0}
