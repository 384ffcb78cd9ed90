"""umT5 in ComfyUI's own formats, by the host's own loader, with the tokenizer in the file."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import open_gguf
from wanquant.quant.conversion.convert import convert
from wanquant.quant.inspection.report import inspect
from wanquant.quant.inspection.verify import verify
from wanquant.testing.text_encoder_files import HEADS, TEXTS, WIDTH, random_weights, tokens, trained_tokenizer
from wanquant.tests.ops.test_native_files import loadable

FFN = "encoder.block.3.layer.1.DenseReluDense.wo"


pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    """Return the path of a umT5 of 24 narrow blocks with a tokenizer."""
    spiece = trained_tokenizer(TEXTS * 20, 200)
    tensors = {name: weight.bfloat16() for name, (_, weight) in random_weights(256).items()}
    path = tmp_path_factory.mktemp("t5") / "umt5.safetensors"
    save_file(tensors | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, path)
    return path


def load(path):
    sizes = {"vocab_size": 256, "d_model": WIDTH, "num_heads": HEADS, "d_kv": WIDTH // HEADS}
    options = {"umt5xxl_model_config": sizes}
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.WAN, model_options=options)


@pytest.fixture(scope="module")
def expected(umt5):
    """Return the tokens and the encoding of a text by the unquantized encoder."""
    clip = load(umt5)
    return tokens(clip, TEXTS[0]), clip.encode(TEXTS[0])


# Relative errors of the encoding. The weights are random, so that 24 blocks multiply the errors.
@pytest.mark.parametrize(("name", "bar"), [("FP8", 0.25), ("INT8", 0.25), ("W4A8", 0.5)])
def test_the_host_loads_what_is_written(name, bar, umt5, expected, tmp_path):
    report = convert(umt5, tmp_path / "a.safetensors", name, effort="fast")
    state = load_file(report.path)
    assert {key for key in state if "." not in key} == {"spiece_model"}
    assert torch.equal(state["spiece_model"], load_file(umt5)["spiece_model"])
    assert state["shared.weight"].dtype == torch.bfloat16, "most formats are not for embeddings"
    assert f"{FFN}.comfy_quant" in state
    if not loadable(name):
        pytest.skip(f"this host does not know {name}")
    clip = load(report.path)
    assert type(clip.cond_stage_model.umt5xxl.transformer.get_submodule(FFN).weight).__name__ == "QuantizedTensor"
    assert tokens(clip, TEXTS[0]) == expected[0]
    assert 0 < (clip.encode(TEXTS[0]) - expected[1]).norm() / expected[1].norm() < bar


def test_it_is_reported_verified_reused_and_converted_back(umt5, tmp_path):
    report = convert(umt5, tmp_path / "a.safetensors", "INT8", effort="fast")
    assert report.kind == "T5 text encoder"
    assert all(f.got == "FP8" and "multiple of 256" in f.reason for f in report.fallbacks)
    recorded = {tensor.name: tensor.relative_error for tensor in inspect(report.path).tensors}
    assert recorded[f"{FFN}.weight"] == pytest.approx(0.009, rel=0.1)
    found = verify(report.path, umt5)
    assert not found.missing and not found.unknown
    (row,) = (tensor for tensor in found.tensors if tensor.name == "enc.blk.3.ffn_down.weight")
    assert row.qtype == "INT8" and row.relative_error == pytest.approx(recorded[f"{FFN}.weight"], rel=1e-3)
    assert convert(umt5, report.path, "INT8", effort="fast").reused
    packed = open_gguf(convert(report.path, tmp_path / "a.gguf", "Q8_0", effort="fast").path)
    assert packed.metadata["tokenizer.ggml.model"] == "t5"
    again = convert(packed.path, tmp_path / "b.safetensors", "FP8", effort="fast")
    assert torch.equal(load_file(again.path)["spiece_model"], load_file(umt5)["spiece_model"])


def test_a_size_mixes_formats_there_too(umt5, tmp_path):
    ends = [convert(umt5, tmp_path / f"{name}.safetensors", name, effort="fast").nbytes for name in ("NVFP4", "FP8")]
    report = convert(umt5, tmp_path / "a.safetensors", "NVFP4", target_size=sum(ends) / 2**31, effort="fast")
    assert report.nbytes <= sum(ends) / 2
    assert {"NVFP4 (ComfyUI)", "FP8"} <= {total.qtype for total in report.by_type}
