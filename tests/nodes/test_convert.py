"""Convert to GGUF: every kind of source, add-ons, and the shape of the patch embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import folder_paths
import pytest
from safetensors.torch import load_file, save_file

from wanquant.nodes.convert import WanQuantConvert
from wanquant.quant import QuantError
from wanquant.quant.gguf.reader import open_gguf


def convert(source, **inputs):
    defaults = {"folder": "diffusion_models", "output_name": "", "overwrite": False, "effort": "fast", "device": "cpu"}
    return WanQuantConvert.execute(source, "Q4_0", **{**defaults, **inputs}).args


@pytest.fixture
def folder(models, t2v):
    folder = models / "diffusion_models"
    shutil.copy(t2v[0], folder / "wan.safetensors")
    shutil.copy(t2v[1], folder / "wan-Q8_0.gguf")
    return folder


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


def test_add_on_becomes_part_of_the_file(folder):
    state = load_file(folder / "wan.safetensors")
    block = {name: tensor for name, tensor in state.items() if name.startswith("blocks.0.")}
    save_file({f"vace_{name}": tensor.clone() for name, tensor in block.items()}, folder / "vace.safetensors")
    path, _, _ = convert("wan.safetensors", module="vace.safetensors")
    assert path.endswith("wan-vace-Q4_0.gguf")
    assert "vace_blocks.0.ffn.0.weight" in open_gguf(path).tensors
    refusal = WanQuantConvert.validate_inputs(source="wan.safetensors", module="vaze.safetensors")
    assert "vace.safetensors" in refusal


def test_several_add_ons(folder):
    state = load_file(folder / "wan.safetensors")
    save_file({"vace_blocks.0.ffn.0.weight": state["blocks.0.ffn.0.weight"]}, folder / "vace.safetensors")
    save_file({"ref_conv.weight": state["patch_embedding.weight"][:, :, 0].clone()}, folder / "reference.safetensors")
    more = ["reference.safetensors"]
    assert WanQuantConvert.validate_inputs("wan.safetensors", module="vace.safetensors", more_modules=more) is True
    refusal = WanQuantConvert.validate_inputs("wan.safetensors", more_modules=[*more, "vaze.safetensors"])
    assert "vace.safetensors" in refusal
    path, _, _ = convert("wan.safetensors", module="vace.safetensors", more_modules=more)
    assert path.endswith("wan-vace-reference-Q4_0.gguf")
    added = open_gguf(path).tensors.keys() - state.keys()
    assert added == {"vace_blocks.0.ffn.0.weight", "ref_conv.weight"}
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
