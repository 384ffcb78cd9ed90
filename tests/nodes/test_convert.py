"""Convert to Quantized Model: every kind of source, add-ons, and the shape of the patch embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.nodes.convert import WanQuantConvert
from wanquant.quant import QuantError
from wanquant.quant.gguf.reader import open_gguf
from wanquant.testing.tiny_wan import vace_add_on


def convert(source, **inputs):
    defaults = {"folder": "diffusion_models", "output_name": "", "overwrite": False, "effort": "fast", "device": "cpu"}
    return WanQuantConvert.execute(source, "Q4_0", **{**defaults, **inputs}).args


def write_shards(folder, state):
    """Write two shards and their index."""
    names = sorted(state)
    parts = {f"wan-{n}-of-00002.safetensors": names[i::2] for i, n in enumerate(("00001", "00002"))}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, folder / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "wan.safetensors.index.json").write_text(json.dumps(index))


def test_sources_of_every_kind(folder):
    (folder / "sharded").mkdir()
    write_shards(folder / "sharded", load_file(folder / "wan.safetensors"))
    first = "sharded/wan-00001-of-00002.safetensors"
    combo = next(i for i in WanQuantConvert.define_schema().inputs if i.id == "source")
    assert sorted(combo.options) == [first, "wan-Q8_0.gguf", "wan.safetensors"]
    assert WanQuantConvert.validate_inputs(source=first) is True
    assert WanQuantConvert.validate_inputs(source="wan-Q8_0.gguf") is True
    assert "nearest name" in WanQuantConvert.validate_inputs(source="wan-Q8_1.gguf")
    whole, shards, packed = (convert(source) for source in ("wan.safetensors", first, "wan-Q8_0.gguf"))
    assert [Path(path).relative_to(folder).as_posix() for path, *_ in (whole, shards, packed)] == [
        "wan-Q4_0.gguf",
        "sharded/wan-Q4_0.gguf",
        "wan-Q8_0-Q4_0.gguf",
    ]
    assert "quantized already (Q8_0)" in packed[2]
    tensors = [open_gguf(path).tensors for path in (whole[0], shards[0])]
    assert all(tensor.data.equal(tensors[1][name].data) for name, tensor in tensors[0].items())


def test_whole_checkpoints_are_listed_too(folder, models):
    """A name that both folders have means the file in models/diffusion_models."""
    (models / "checkpoints").mkdir()
    folder_paths.folder_names_and_paths["checkpoints"] = ([str(models / "checkpoints")], {".safetensors", ".ckpt"})
    state = load_file(folder / "wan.safetensors")
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    save_file(state | {"first_stage_model.bias": torch.zeros(2)}, models / "checkpoints" / "whole.safetensors")
    (models / "checkpoints" / "wan.safetensors").touch()
    (models / "checkpoints" / "other.ckpt").touch()
    combo = next(i for i in WanQuantConvert.define_schema().inputs if i.id == "source")
    assert sorted(combo.options) == ["wan-Q8_0.gguf", "wan.safetensors", "whole.safetensors"]
    assert WanQuantConvert.validate_inputs(source="whole.safetensors") is True
    whole, plain = convert("whole.safetensors")[0], convert("wan.safetensors")[0]
    assert whole == str(folder / "whole-Q4_0.gguf")
    tensors = [open_gguf(path).tensors for path in (plain, whole)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensor.data.equal(tensors[1][name].data) for name, tensor in tensors[0].items())


def test_suffixes_in_capitals(folder):
    shutil.copy(folder / "wan.safetensors", folder / "BIG.SAFETENSORS")
    shutil.copy(folder / "wan-Q8_0.gguf", folder / "BIG-Q8_0.GGUF")
    combo = next(i for i in WanQuantConvert.define_schema().inputs if i.id == "source")
    assert {"BIG.SAFETENSORS", "BIG-Q8_0.GGUF"} <= {*combo.options}
    assert WanQuantConvert.validate_inputs(source="BIG-Q8_0.GGUF") is True
    assert convert("BIG.SAFETENSORS")[0] == str(folder / "BIG-Q4_0.gguf")
    assert convert("BIG-Q8_0.GGUF", output_name="OUT.GGUF")[0] == str(folder / "OUT.GGUF")
    save_file(vace_add_on(load_file(folder / "wan.safetensors")), folder / "VACE.SAFETENSORS")
    assert convert("BIG.SAFETENSORS", module="VACE.SAFETENSORS")[0] == str(folder / "BIG-VACE-Q4_0.gguf")


def test_source_in_a_linked_subfolder(folder, tmp_path):
    """Its default name keeps the subfolder only if that is inside the folder that the file is written to."""
    (tmp_path / "elsewhere").mkdir()
    (folder / "inside").mkdir()
    for name, target in (("linked", tmp_path / "elsewhere"), ("near", folder / "inside")):
        (folder / name).symlink_to(target)
        shutil.copy(folder / "wan.safetensors", target)
    assert convert("linked/wan.safetensors")[0] == str(folder / "wan-Q4_0.gguf")
    assert convert("near/wan.safetensors")[0] == str(folder / "near" / "wan-Q4_0.gguf")
    with pytest.raises(QuantError, match="is outside"):
        convert("linked/wan.safetensors", output_name="linked/a.gguf")


def test_add_on_becomes_part_of_the_file(folder):
    state = load_file(folder / "wan.safetensors")
    save_file(vace_add_on(state), folder / "vace.safetensors")
    path, _, _ = convert("wan.safetensors", module="vace.safetensors")
    assert path.endswith("wan-vace-Q4_0.gguf")
    assert "vace_blocks.0.ffn.0.weight" in open_gguf(path).tensors
    refusal = WanQuantConvert.validate_inputs(source="wan.safetensors", module="vaze.safetensors")
    assert "vace.safetensors" in refusal


def test_several_add_ons(folder):
    state = load_file(folder / "wan.safetensors")
    vace = vace_add_on(state)
    kernel, bias = state["patch_embedding.weight"][:, :, 0].clone(), state["patch_embedding.bias"].clone()
    reference = {"ref_conv.weight": kernel, "ref_conv.bias": bias}
    save_file(vace, folder / "vace.safetensors")
    save_file(reference, folder / "reference.safetensors")
    more = ["reference.safetensors"]
    assert WanQuantConvert.validate_inputs("wan.safetensors", module="vace.safetensors", more_modules=more) is True
    refusal = WanQuantConvert.validate_inputs("wan.safetensors", more_modules=[*more, "vaze.safetensors"])
    assert "vace.safetensors" in refusal
    path, _, _ = convert("wan.safetensors", module="vace.safetensors", more_modules=more)
    assert path.endswith("wan-vace-reference-Q4_0.gguf")
    added = open_gguf(path).tensors.keys() - state.keys()
    assert added == {*vace, *reference}
    again, _, summary = convert("wan.safetensors", more_modules=["vace.safetensors", *more])
    assert again == path and "up to date already" in summary


def test_patch_embedding_keeps_its_dimensions_on_request(folder):
    flat = convert("wan.safetensors", output_name="flat.gguf")[0]
    deep = convert("wan.safetensors", output_name="deep.gguf", patch_embedding="5d")[0]
    shapes = [open_gguf(path).tensors["patch_embedding.weight"].stored_shape for path in (flat, deep)]
    assert [len(shape) for shape in shapes] == [4, 5]


def test_changes_of_any_file_are_noticed(folder):
    inputs = {"source": "wan.safetensors", "recipe": "Q4_0", "folder": "diffusion_models", "output_name": ""}
    before = WanQuantConvert.fingerprint_inputs(**inputs, module="wan-Q8_0.gguf")
    (folder / "wan-Q8_0.gguf").touch()
    assert WanQuantConvert.fingerprint_inputs(**inputs, module="wan-Q8_0.gguf") != before
    before = WanQuantConvert.fingerprint_inputs(**inputs, more_modules=["wan-Q8_0.gguf"])
    (folder / "wan-Q8_0.gguf").touch()
    assert WanQuantConvert.fingerprint_inputs(**inputs, more_modules=["wan-Q8_0.gguf"]) != before


def test_read_only_folder_is_reported(folder, read_only):
    folder_paths.folder_names_and_paths["diffusion_models"][0].append(str(read_only))
    with pytest.raises(QuantError, match=r"wan-Q4_0\.gguf: cannot be written: .*denied"):
        convert("wan.safetensors", folder=str(read_only))
