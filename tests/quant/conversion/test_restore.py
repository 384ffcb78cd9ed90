"""Restoration of a GGUF as safetensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from wanquant.quant import QTYPES, QuantError, convert, open_gguf
from wanquant.quant.__main__ import main
from wanquant.quant.conversion.restore import restore
from wanquant.quant.files.sentencepiece import SPIECE_KEY, parse_vocabulary
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.sources.t5 import encoder_names
from wanquant.testing.text_encoder_files import NAMINGS, TEXTS, trained_tokenizer, write_as_others, write_packed
from wanquant.testing.tiny_wan import write_tiny_wan


@pytest.fixture
def gguf(tmp_path):
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, metadata={"config": '{"transformer": {}}'})
    return convert(source, tmp_path / "wan.gguf", "Q4_K_M", effort="fast").path


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_tensors_and_metadata_are_those_of_the_gguf(gguf, tmp_path, dtype):
    path = restore(gguf, tmp_path / "a.safetensors", dtype).path
    restored, tensors = load_file(path), open_gguf(gguf).tensors
    assert restored.keys() == tensors.keys()
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for name, tensor in tensors.items():
        expected = tensor.dequantize(kinds.get(tensor.qtype.name, kinds[dtype]))
        assert restored[name].dtype == expected.dtype
        assert torch.equal(restored[name], expected)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "config": '{"transformer": {}}'}


def test_converting_a_restored_file_again_is_exact(gguf, tmp_path):
    restore(gguf, tmp_path / "a.safetensors", "F32")
    again = open_gguf(convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", "F16").path).tensors
    for name, tensor in open_gguf(gguf).tensors.items():
        assert torch.allclose(again[name].dequantize(), tensor.dequantize(), rtol=1e-3, atol=1e-6)


def test_slices_are_concatenated(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr("wanquant.quant.conversion.restore._SLICE_ELEMENTS", 1000)
    calls = []
    path = restore(gguf, tmp_path / "a.safetensors", progress=lambda *call: calls.append(call)).path
    for name, tensor in open_gguf(gguf).tensors.items():
        assert torch.equal(load_file(path)[name].float(), tensor.dequantize().to(load_file(path)[name].dtype).float())
    assert calls[-1][0] == calls[-1][1] == path.stat().st_size


def as_ggml(tensor):
    """Return a tensor as ggml's tools store it: with 4 dimensions at most, and without leading ones of 1."""
    shape = tensor.shape if tensor.ndim < 5 else (tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return tensor.reshape(shape)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_wan_of_other_tools_gets_comfyuis_names_and_shapes(tmp_path, prefix):
    state = load_file(write_tiny_wan(tmp_path / "wan.safetensors", layers=1))
    theirs = {prefix + name: as_ggml(tensor) for name, tensor in state.items()}
    specs = [TensorSpec(name, QTYPES["BF16"], tuple(tensor.shape)) for name, tensor in theirs.items()]
    with GGUFWriter(tmp_path / "a.gguf", {"general.architecture": "wan"}, specs) as writer:
        for name, tensor in theirs.items():
            writer.write(name, tensor.bfloat16().contiguous().view(torch.uint8))
    restored = load_file(restore(tmp_path / "a.gguf", tmp_path / "a.safetensors").path)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], tensor.bfloat16()) for name, tensor in state.items())


ENCODER = {
    "shared.weight": (200, 64),
    "encoder.final_layer_norm.weight": (64,),
    **{f"encoder.block.0.layer.{i}.layer_norm.weight": (64,) for i in (0, 1)},
    **{f"encoder.block.0.layer.0.SelfAttention.{part}.weight": (64, 64) for part in "qkvo"},
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2),
    **{f"encoder.block.0.layer.1.DenseReluDense.{part}.weight": (128, 64) for part in ("wi_0", "wi_1")},
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": (64, 128),
}


@pytest.mark.parametrize("naming", ["the host's", *NAMINGS])
@pytest.mark.parametrize("dtype", ["F32", "F16", None])
def test_encoders_of_other_tools_get_comfyuis_names_and_tokenizer(tmp_path, naming, dtype):
    spiece = trained_tokenizer(TEXTS * 20, 200)
    rename = NAMINGS.get(naming, str)
    weights = {name: torch.randn(shape).half() for name, shape in ENCODER.items()}
    theirs = {rename(name): weight for name, weight in weights.items()}
    (tmp_path / "spiece.model").write_bytes(spiece)
    path = write_as_others(tmp_path / "a.gguf", theirs, *((spiece, dtype) if dtype else (None,)))
    restored = load_file(restore(path, tmp_path / "a.safetensors").path)
    assert restored.pop("spiece_model").numpy().tobytes() == spiece
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name].half(), weight) for name, weight in weights.items())


def test_the_tokenizer_of_llama_cpp_becomes_a_sentencepiece_model(tmp_path):
    spiece = trained_tokenizer(TEXTS * 20, 200)
    metadata = {key: value for key, value in parse_vocabulary(spiece, 200).items() if key != SPIECE_KEY}
    llama = encoder_names(ENCODER)
    weights = {host: (name, torch.randn(ENCODER[host])) for name, host in llama.items()}
    path = write_packed(tmp_path / "a.gguf", weights, metadata, by_llama=True)
    restored = load_file(restore(path, tmp_path / "a.safetensors").path)
    model = SentencePieceProcessor(model_proto=restored.pop("spiece_model").numpy().tobytes())
    expected = SentencePieceProcessor(model_proto=spiece)
    assert [model.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    assert restored.keys() == ENCODER.keys()


def test_interruption_leaves_no_file(gguf, tmp_path):
    class StopError(Exception):
        pass

    def progress(done, total, name):
        raise StopError

    with pytest.raises(StopError):
        restore(gguf, tmp_path / "a.safetensors", progress=progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wan.gguf", "wan.safetensors"]


def test_unusable_input_is_refused(gguf, tmp_path):
    with pytest.raises(QuantError, match=r"not a \.safetensors name"):
        restore(gguf, tmp_path / "a.gguf")
    with pytest.raises(QuantError, match=r"wan\.safetensors: exists already"):
        restore(gguf, tmp_path / "wan.safetensors")
    with pytest.raises(QuantError, match=r"wan\.safetensors: not a GGUF"):
        restore(tmp_path / "wan.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match="dtype Q8_0: unknown"):
        restore(gguf, tmp_path / "a.safetensors", "Q8_0")


def test_values_beyond_f16_are_refused_for_f16(tmp_path):
    spec = TensorSpec("a.weight", QTYPES["Q8_0"], (1, 32))
    with GGUFWriter(tmp_path / "a.gguf", {"general.architecture": "wan"}, [spec]) as writer:
        writer.write("a.weight", QTYPES["Q8_0"].quantize(torch.full((1, 32), 1e6), effort="fast"))
    with pytest.raises(QuantError, match=r"tensor a\.weight: has values beyond the range of F16; choose BF16"):
        restore(tmp_path / "a.gguf", tmp_path / "a.safetensors", "F16")
    assert restore(tmp_path / "a.gguf", tmp_path / "a.safetensors").tensors == 1


def test_command_line(gguf, tmp_path, capsys):
    assert main(["restore", str(gguf), str(tmp_path / "a.safetensors"), "--dtype", "f16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nbytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert main(["restore", str(gguf), str(tmp_path / "a.safetensors")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["restore", str(gguf), str(tmp_path / "a.safetensors"), "--overwrite"]) == 0
    assert "quantized ones as BF16" in capsys.readouterr().out
