"""Prompts are encoded once: which changes make a new encoding, and that a known prompt loads no encoder."""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.cli_args import args
from safetensors.torch import save_file

from wanquant.ops import encode_prompts as module
from wanquant.ops.conditioning_cache import ConditioningCache
from wanquant.ops.encode_prompts import TextEncoder, encode_prompts
from wanquant.ops.loading.native_text_encoder import load_any_text_encoder
from wanquant.ops.loading.text_encoder import load_text_encoder
from wanquant.quant import QuantError
from wanquant.testing.text_encoder_files import HEADS, WIDTH
from wanquant.tests.ops.loading.conftest import llama_file, processor, spiece, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("short_prompts")

TEXTS = ("a red ball moves right", "")


@pytest.fixture
def encoder(llama_file, tmp_path):  # noqa: F811
    path = Path(shutil.copy(llama_file, tmp_path / "umt5.gguf"))
    return TextEncoder(str(path), (path, tmp_path / "spiece.model"), "WAN", embeddings=(str(tmp_path / "embeddings"),))


@pytest.fixture
def cache(tmp_path):
    return ConditioningCache(tmp_path / "prompts")


@pytest.fixture
def loads(monkeypatch):
    """The encoders that were loaded, as weak references to their patchers."""
    loaded = []

    def load(*arguments, **options):
        clip = load_any_text_encoder(*arguments, **options)
        loaded.append(weakref.ref(clip.patcher))
        return clip

    monkeypatch.setattr(module, "load_any_text_encoder", load)
    return loaded


def encoded(encoder, texts, cache):
    with torch.inference_mode():
        return encode_prompts(encoder, texts, cache)


def test_prompts_are_encoded_as_by_the_host_and_only_once(encoder, cache, loads, caplog):
    clip = load_text_encoder(encoder.path, comfy.sd.CLIPType.WAN)
    with torch.inference_mode():
        expected = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in TEXTS]
    caplog.set_level(logging.INFO)
    for n_loads in (1, 1):
        found = encoded(encoder, TEXTS, cache)
        assert len(loads) == n_loads
        for ((tensor, fields),), ((expected_tensor, expected_fields),) in zip(found, expected, strict=True):
            assert torch.equal(tensor, expected_tensor) and tensor.dtype == expected_tensor.dtype
            assert fields.keys() == expected_fields.keys()
    assert "umt5.gguf was not loaded" in caplog.text
    encoded(encoder, (TEXTS[0], "another"), cache)
    assert len(loads) == 2
    assert len(list(cache.folder.iterdir())) == 3


def test_the_encoder_is_released(encoder, cache, loads):
    encoded(encoder, TEXTS, cache)
    assert [patcher() for patcher in loads] == [None]
    assert not any(model.model is None for model in comfy.model_management.current_loaded_models)


def test_one_text_twice_is_one_encoding(encoder, cache, loads):
    first, second = encoded(encoder, ("same", "same"), cache)
    assert torch.equal(first[0][0], second[0][0])
    assert len(list(cache.folder.iterdir())) == 1


def changed(encoder, what):
    path = Path(encoder.path)
    if what == "time":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif what == "size":
        with path.open("ab") as file:
            file.write(b"\0")
    elif what == "tokenizer":
        (path.parent / "spiece.model").write_bytes(b"1")
    elif what == "embedding":
        (path.parent / "embeddings").mkdir()
        (path.parent / "embeddings" / "style.safetensors").touch()
    elif what == "path":
        moved = path.rename(path.with_stem("moved"))
        return replace(encoder, path=str(moved), files=(moved, *encoder.files[1:]))
    return replace(encoder, **{"type": {"clip_type": "SD3"}, "dtype": {"dtype": torch.bfloat16}}.get(what, {}))


@pytest.mark.parametrize("what", ["time", "size", "tokenizer", "path", "type", "dtype"])
def test_change_makes_another_key(encoder, what):
    before = encoder.key("a")
    assert encoder.key("a") == before
    assert changed(encoder, what).key("a") != before


def test_embedding_counts_for_texts_that_name_one(encoder):
    plain, named = encoder.key("a"), encoder.key("a embedding:style")
    after = changed(encoder, "embedding")
    assert after.key("a") == plain
    assert after.key("a embedding:style") != named


def test_host_its_flags_and_releases_count(encoder, monkeypatch):
    before = {encoder.key("a"), encoder.key("b")}
    for target, value in (("host_version", lambda: "9"), ("VERSION", "9"), ("_REVISION", 9)):
        with monkeypatch.context() as context:
            context.setattr(module, target, value)
            before.add(encoder.key("a"))
    monkeypatch.setattr(args, "bf16_text_enc", True)
    before.add(encoder.key("a"))
    assert len(before) == 6


def test_changed_file_is_loaded_again(encoder, cache, loads):
    encoded(encoder, TEXTS, cache)
    changed(encoder, "time")
    encoded(encoder, TEXTS, cache)
    assert len(loads) == 2


def test_file_that_changes_meanwhile_is_not_kept(encoder, cache, monkeypatch):
    def load(*arguments, **options):
        changed(encoder, "time")
        return load_any_text_encoder(*arguments, **options)

    monkeypatch.setattr(module, "load_any_text_encoder", load)
    assert len(encoded(encoder, TEXTS, cache)) == 2
    assert not cache.folder.exists()


def test_damaged_entry_is_encoded_anew(encoder, cache, loads):
    (whole, _) = encoded(encoder, TEXTS, cache)
    path = cache.folder / f"{encoder.key(TEXTS[0])}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (again, _) = encoded(encoder, TEXTS, cache)
    assert len(loads) == 2 and torch.equal(again[0][0], whole[0][0])
    encoded(encoder, TEXTS, cache)
    assert len(loads) == 2, "the entry is whole again"


def test_full_disk_costs_the_next_encoding_only(encoder, cache, loads, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    for _ in range(2):
        assert len(encoded(encoder, TEXTS, cache)) == 2
    assert len(loads) == 2
    assert "will be encoded again next time" in caplog.text and "free some space" in caplog.text
    assert not list(cache.folder.iterdir())


def test_encoder_in_safetensors(encoder, cache, weights, spiece, tmp_path, loads, monkeypatch, sqnr):  # noqa: F811
    path = tmp_path / "umt5.safetensors"
    tensors = {name: tensor for name, (_, tensor) in weights.items()}
    save_file({**tensors, "spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, path)
    rows = len(tensors["shared.weight"])
    sizes = {"vocab_size": rows, "d_model": WIDTH, "num_heads": HEADS, "d_kv": WIDTH // HEADS}
    load_clip = comfy.sd.load_clip  # which takes every umT5 for one of the true size
    options = {"umt5xxl_model_config": sizes}
    monkeypatch.setattr(comfy.sd, "load_clip", lambda *arguments: load_clip(*arguments[:3], arguments[3] | options))
    native = replace(encoder, path=str(path), files=(path,))
    expected = encoded(encoder, TEXTS, cache)
    for _ in range(2):
        assert sqnr(expected[0][0][0], encoded(native, TEXTS, cache)[0][0][0]) > 30
    assert len(loads) == 2


def test_other_safetensors_are_refused(tmp_path, weights):  # noqa: F811
    path = tmp_path / "clip_l.safetensors"
    save_file({"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(QuantError, match="not a T5 text encoder"):
        load_any_text_encoder(path, comfy.sd.CLIPType.WAN)
    save_file({name: tensor for name, (_, tensor) in weights.items()}, path)
    with pytest.raises(QuantError, match="choose type wan"):
        load_any_text_encoder(path, comfy.sd.CLIPType.SD3)
    with pytest.raises(QuantError, match=r"clip_l\.safetensors: ComfyUI cannot load this text encoder"):
        load_any_text_encoder(path, comfy.sd.CLIPType.WAN)  # without a tokenizer
    path.write_bytes(b"no safetensors")
    with pytest.raises(QuantError, match="clip_l"):
        load_any_text_encoder(path, comfy.sd.CLIPType.WAN)
