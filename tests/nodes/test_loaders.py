"""The loader nodes without a server: which inputs they accept, and when the host must run them again."""

from __future__ import annotations

import os
import shutil

import folder_paths
import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from wanquant.nodes import load_text_encoder
from wanquant.nodes.folders import model_path
from wanquant.nodes.inspect import WanQuantInspect
from wanquant.nodes.load_conditioning import WanQuantLoadConditioning
from wanquant.nodes.load_diffusion_model import WanQuantLoader
from wanquant.nodes.load_expert_pair import WanQuantExpertPairLoader
from wanquant.nodes.load_lora import WanQuantLoraLoader
from wanquant.nodes.load_text_encoder import WanQuantTextEncoderLoader
from wanquant.ops import host
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError, open_gguf


def test_linked_path_makes_the_name_irrelevant(models):
    assert WanQuantLoader.validate_inputs(model_name="stale.gguf", path=None) is True
    assert "press R to refresh" in WanQuantLoader.validate_inputs(model_name="stale.gguf")
    (models / "diffusion_models" / "a.gguf").touch()
    assert WanQuantLoader.validate_inputs(model_name="a.gguf") is True


def test_changed_file_is_loaded_again(models):
    path = models / "diffusion_models" / "a.gguf"
    path.write_bytes(b"1")
    before = WanQuantLoader.fingerprint_inputs(model_name="a.gguf", compute_dtype="default")
    path.write_bytes(b"22")
    assert WanQuantLoader.fingerprint_inputs(model_name="a.gguf", compute_dtype="default") != before


def test_changed_tokenizer_beside_the_file_is_loaded_again(models):
    (folder := models / "text_encoders").mkdir()
    (folder / "a.gguf").touch()
    before = WanQuantTextEncoderLoader.fingerprint_inputs(encoder_name="a.gguf", type="wan")
    (folder / "spiece.model").write_bytes(b"1")
    added = WanQuantTextEncoderLoader.fingerprint_inputs(encoder_name="a.gguf", type="wan")
    (folder / "spiece.model").write_bytes(b"22")
    assert len({before, added, WanQuantTextEncoderLoader.fingerprint_inputs(encoder_name="a.gguf", type="wan")}) == 3


def test_pair_keeps_its_order_and_dtype(models, t2v):
    for name in ("high.gguf", "low.gguf"):
        shutil.copy(t2v[1], models / "diffusion_models" / name)
    loaded = WanQuantExpertPairLoader.execute("high.gguf", "low.gguf", "bfloat16").args
    assert [patcher.model.get_dtype_inference() for patcher in loaded] == [torch.bfloat16] * 2
    assert loaded[0].model is not loaded[1].model
    inits = [patcher.cached_patcher_init[0].args[0] for patcher in loaded]
    assert [str(path).rsplit("/", 1)[-1] for path in inits] == ["high.gguf", "low.gguf"]


def test_add_on_is_found_by_its_suffix_and_checked(models):
    folder = models / "diffusion_models"
    for name in ("base.gguf", "vace.gguf", "vace.safetensors"):
        (folder / name).touch()
    for add_on in ("none", "vace.gguf", "vace.safetensors"):
        assert WanQuantLoader.validate_inputs(model_name="base.gguf", module_name=add_on) is True
    assert "nearest name" in WanQuantLoader.validate_inputs(model_name="base.gguf", module_name="vce.safetensors")
    assert "nearest name" in WanQuantLoader.validate_inputs(path=None, module_name="vce.gguf")
    before = WanQuantLoader.fingerprint_inputs(model_name="base.gguf", module_name="vace.safetensors")
    (folder / "vace.safetensors").write_bytes(b"1")
    assert WanQuantLoader.fingerprint_inputs(model_name="base.gguf", module_name="vace.safetensors") != before


def test_gguf_lora_is_listed_checked_and_loaded_again(models, t2v):
    folder = models / "loras"
    folder.mkdir()
    weight = open_gguf(t2v[1]).tensors["blocks.0.self_attn.q.weight"]
    writer = GGUFWriter(folder / "style.gguf", "wan")
    for part, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
        writer.add_tensor(f"pipe.dit.blocks.0.self_attn.q.lora_{part}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert WanQuantLoraLoader.GET_SCHEMA().inputs[1].options == ["style.gguf"]
    assert WanQuantLoraLoader.validate_inputs("style.gguf") is True
    assert "nearest name" in WanQuantLoraLoader.validate_inputs("styl.gguf")
    (patched,) = WanQuantLoraLoader.execute(load_diffusion_model(t2v[1]), "style.gguf", 0.5).args
    (((strength, *_),),) = patched.patches.values()
    assert strength == 0.5
    before = WanQuantLoraLoader.fingerprint_inputs(lora_name="style.gguf", strength_model=1.0)
    os.utime(folder / "style.gguf", (1, 1))
    assert WanQuantLoraLoader.fingerprint_inputs(lora_name="style.gguf", strength_model=1.0) != before


def test_bfloat16_text_encoder_warns_where_the_host_would_not_use_it(models, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(load_text_encoder, "load_text_encoder", lambda *_, dtype: calls.append(dtype))
    monkeypatch.setattr(load_text_encoder, "model_path", lambda *_: "umt5.gguf")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [])
    for choice in ("default", "bfloat16"):
        assert "bfloat16" not in caplog.text
        load_text_encoder.WanQuantTextEncoderLoader.execute("umt5.gguf", "wan", choice)
    assert calls == [None, torch.bfloat16]
    assert "itself would not use bfloat16 on cpu: compute_dtype default may be faster" in caplog.text


def test_pair_of_one_expert_is_logged(models, t2v, caplog):
    shutil.copy(t2v[1], models / "diffusion_models" / "high.gguf")
    WanQuantExpertPairLoader.execute("high.gguf", "high.gguf", "default")
    assert "Load Wan 2.2 Experts: high.gguf is chosen twice" in caplog.text


def _touched(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_typed_path_is_read_again_after_the_file_changed(models, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"1")

    def token():
        return WanQuantLoader.fingerprint_inputs(model_name="", path=str(path))

    before = token()
    assert token() == before
    path.write_bytes(b"22")
    changed = token()
    assert changed != before
    _touched(path)
    assert token() != changed
    path.unlink()
    assert "missing" in token()


def test_linked_path_is_read_again_after_the_file_changed(models, t2v, tmp_path):
    path = shutil.copy(t2v[1], tmp_path / "a.gguf")

    def token():
        return WanQuantLoader.fingerprint_inputs(model_name="", path=None)

    before = token()
    WanQuantLoader.execute("", "default", path=str(path))
    assert token() == before, "an unchanged file stays loaded"
    _touched(path)
    changed = token()
    assert changed != before
    assert token() == changed
    WanQuantLoader.execute("", "default", path=str(path))
    assert token() == changed


@pytest.mark.parametrize(
    ("node", "linked"),
    [
        (WanQuantLoader, {"model_name": None}),
        (WanQuantLoader, {"model_name": "a.gguf", "module_name": None}),
        (WanQuantExpertPairLoader, {"high_noise_name": "a.gguf", "low_noise_name": None}),
        (load_text_encoder.WanQuantTextEncoderLoader, {"encoder_name": None}),
        (WanQuantInspect, {"model_name": None}),
        (WanQuantLoadConditioning, {"name": None}),
    ],
)
def test_linked_name_is_read_again_after_the_file_changed(models, node, linked):
    path = models / "diffusion_models" / "a.gguf"
    path.write_bytes(b"1")
    model_path("unet_gguf", "a.gguf")
    before = node.fingerprint_inputs(**linked)
    assert node.fingerprint_inputs(**linked) == before
    _touched(path)
    assert node.fingerprint_inputs(**linked) != before


def test_every_part_of_a_split_file_counts(models):
    parts = [models / "diffusion_models" / f"a-{number:05}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"1")
    before = WanQuantLoader.fingerprint_inputs(model_name=parts[0].name)
    _touched(parts[1])
    assert WanQuantLoader.fingerprint_inputs(model_name=parts[0].name) != before


def test_file_written_in_place_works_once_it_is_loaded_again(models, t2v, tmp_path):
    path = shutil.copy(t2v[1], tmp_path / "a.gguf")
    patcher = WanQuantLoader.execute("", "default", path=str(path)).args[0]
    before = WanQuantLoader.fingerprint_inputs(model_name="", path=None)
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    _touched(path)
    with pytest.raises(QuantError, match="was changed or replaced"):
        patcher.pre_run()
    assert WanQuantLoader.fingerprint_inputs(model_name="", path=None) != before, "so the host loads it again"
    WanQuantLoader.execute("", "default", path=str(path)).args[0].pre_run()


@pytest.mark.skipif(not host.has_int8(), reason="this ComfyUI has no 8-bit products")
def test_precision_and_the_older_switch(models, t2v, caplog):
    shutil.copy(t2v[1], models / "diffusion_models" / "a.gguf")
    chosen = {
        (int8, precision): kind(WanQuantLoader.execute("a.gguf", "float32", int8=int8, precision=precision).args[0])
        for int8 in (False, True)
        for precision in ("exact", "int8", "auto")
    }
    exact, int8 = chosen[False, "exact"], chosen[False, "int8"]
    assert exact is not int8
    # On a CPU, auto is exact; the switch of saved graphs decides only beside exact.
    assert chosen == {
        (False, "exact"): exact,
        (False, "int8"): int8,
        (False, "auto"): exact,
        (True, "exact"): int8,
        (True, "int8"): int8,
        (True, "auto"): exact,
    }
    pair = WanQuantExpertPairLoader.execute("a.gguf", "a.gguf", "float32", precision="int8").args
    assert [kind(patcher) for patcher in pair] == [int8, int8]


def kind(patcher):
    return patcher.model.model_config.custom_operations


def test_int8_is_for_gguf_files(models, t2v):
    shutil.copy(t2v[0], models / "diffusion_models" / "a.safetensors")
    for arguments in ({"int8": True}, {"precision": "int8"}):
        with pytest.raises(QuantError, match="add_on_name and int8 are for GGUF files"):
            WanQuantLoader.execute("a.safetensors", "float32", **arguments)
    with pytest.raises(QuantError, match="int8 are for GGUF files"):
        WanQuantExpertPairLoader.execute("a.safetensors", "a.safetensors", "float32", precision="int8")
    assert WanQuantLoader.execute("a.safetensors", "float32", precision="auto").args[0].model_size() > 0
