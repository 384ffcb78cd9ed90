"""umT5 from GGUF: names, tokenizer, and the embedding of a prompt against the host's own dense encoder."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path

import comfy.sd
import numpy as np
import pytest
import torch
from comfy.cli_args import args

from wanquant.ops.loading.text_encoder import load_text_encoder
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QTYPES, QuantError
from wanquant.quant.files.sentencepiece import SPIECE_KEY, parse_vocabulary, sentencepiece_model
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.testing.text_encoder_files import HEADS, TEXTS, WIDTH, tokens, write_packed

pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.fixture(scope="module")
def own_file(tmp_path_factory, weights, spiece):
    path = tmp_path_factory.mktemp("own") / "umt5.gguf"
    return write_packed(path, weights, {SPIECE_KEY: np.frombuffer(spiece, np.uint8)}, by_llama=False)


@pytest.mark.parametrize("file", ["own_file", "llama_file"], ids=["embedded", "rebuilt"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_sentencepiece(file, text, request, processor):
    clip = load_text_encoder(request.getfixturevalue(file), comfy.sd.CLIPType.WAN)
    expected = processor.encode(text)
    assert tokens(clip, text)[: len(expected)] == expected


def test_vocabulary_survives_both_ways(spiece, processor):
    size = processor.get_piece_size()
    vocabulary = parse_vocabulary(spiece, size)
    assert vocabulary["tokenizer.ggml.tokens"] == [processor.id_to_piece(i) for i in range(size)]
    again = parse_vocabulary(sentencepiece_model(vocabulary), size)
    assert again.keys() == vocabulary.keys()
    assert all(np.array_equal(again[key], value) for key, value in vocabulary.items())


def test_prompt_is_encoded_as_by_the_dense_encoder(llama_file, own_file, weights, spiece, sqnr):
    dense = {host: weight for host, (_, weight) in weights.items()}
    dense["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    rows = dense["shared.weight"].shape[0]
    options = {"vocab_size": rows, "d_model": WIDTH, "num_heads": HEADS, "d_kv": WIDTH // HEADS}
    reference = comfy.sd.load_text_encoder_state_dicts(
        [dense], clip_type=comfy.sd.CLIPType.WAN, model_options={"umt5xxl_model_config": options}
    )
    expected = reference.encode(TEXTS[0])
    outputs = [load_text_encoder(path, comfy.sd.CLIPType.WAN).encode(TEXTS[0]) for path in (llama_file, own_file)]
    assert torch.equal(*outputs)
    assert sqnr(expected, outputs[0]) > 30


def test_embedding_and_layers_stay_packed(llama_file):
    clip = load_text_encoder(llama_file, comfy.sd.CLIPType.WAN)
    transformer = clip.cond_stage_model.umt5xxl.transformer
    assert is_packed(transformer.shared.weight)
    assert is_packed(transformer.encoder.block[3].layer[1].DenseReluDense.wo.weight)
    assert clip.patcher.model_size() < 1.2 * llama_file.stat().st_size
    clone = clip.clone(disable_dynamic=True)
    assert torch.equal(clone.encode("x"), clip.encode("x"))


def test_products_in_bfloat16(llama_file, sqnr):
    """Inputs, outputs, residuals and norms stay float32, as in the host."""
    clip = load_text_encoder(llama_file, comfy.sd.CLIPType.WAN, dtype=torch.bfloat16)
    exact = load_text_encoder(llama_file, comfy.sd.CLIPType.WAN)
    hidden = torch.randn(1, 4, WIDTH)
    rounded, expected = (
        layer.cond_stage_model.umt5xxl.transformer.encoder.block[3].layer[1].DenseReluDense.wi_0(hidden)
        for layer in (clip, exact)
    )
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 40 < sqnr(expected, rounded) < 70
    again = clip.patcher.clone(disable_dynamic=True).model.umt5xxl.transformer.encoder.block[3].layer[1].DenseReluDense
    assert torch.equal(again.wi_0(hidden), rounded)


def test_embedding_of_true_size_is_never_dense(tmp_path, spiece, monkeypatch):
    """Test one block of the true width: 256384 rows of 4096 have 4.2 GB in float32 and 2.1 GB in bfloat16."""
    monkeypatch.setattr(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.T5_XXL)  # It would require 24 blocks.
    shapes = {"shared.weight": (256384, 4096), "encoder.final_layer_norm.weight": (4096,)}
    block = "encoder.block.0.layer"
    shapes |= {f"{block}.0.SelfAttention.{part}.weight": (64, 4096) for part in "qkv"}
    shapes |= {f"{block}.0.SelfAttention.o.weight": (4096, 64), f"{block}.0.layer_norm.weight": (4096,)}
    shapes |= {f"{block}.0.SelfAttention.relative_attention_bias.weight": (32, 1)}
    shapes |= {f"{block}.1.DenseReluDense.wi_{i}.weight": (256, 4096) for i in (0, 1)}
    shapes |= {f"{block}.1.DenseReluDense.wo.weight": (4096, 256), f"{block}.1.layer_norm.weight": (4096,)}
    types = {name: "Q4_0" if shape[-1] % 32 == 0 and len(shape) == 2 else "F32" for name, shape in shapes.items()}
    specs = [TensorSpec(name, QTYPES[types[name]], shape) for name, shape in shapes.items()]
    metadata = {"general.architecture": "t5encoder", SPIECE_KEY: np.frombuffer(spiece, np.uint8)}
    with GGUFWriter(tmp_path / "true.gguf", metadata, specs) as writer:
        for spec in specs:
            row = spec.qtype.quantize(torch.linspace(-0.1, 0.1, spec.shape[-1]), effort="fast")
            writer.write(spec.name, row.expand(spec.qtype.packed_shape(spec.shape)).contiguous())
    with peak_growth() as growth:
        clip = load_text_encoder(tmp_path / "true.gguf", comfy.sd.CLIPType.WAN)
        clip.set_tokenizer_option("umt5xxl_min_length", 512)
        encoded = clip.encode("a red ball")
    assert encoded.shape == (1, 512, 4096)
    assert encoded.isfinite().all()
    # The table stays mapped. Memory is needed for 512 tokens of 4096, some copies of them, and 6 small matrices.
    assert growth.nbytes < 300 << 20, f"{growth.nbytes >> 20} MiB"


class peak_growth:  # noqa: N801
    """The peak growth of anonymous memory of the process in bytes, sampled every 2 ms."""

    def __enter__(self):
        # Free memory that glibc keeps would be taken without growth.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        self.nbytes, self._stop = 0, threading.Event()
        self._start = self._anonymous()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._watcher.join()

    def _watch(self):
        while not self._stop.wait(0.002):
            self.nbytes = max(self.nbytes, self._anonymous() - self._start)

    def _anonymous(self):
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024


def test_memory_watch_sees_a_table():
    with peak_growth() as growth:
        table = torch.ones(200 << 20, dtype=torch.uint8)
        time.sleep(0.05)
    assert growth.nbytes > 0.9 * table.nbytes


def first_blocks(weights, count):
    return {n: v for n, v in weights.items() if "block." not in n or int(n.split(".")[2]) < count}


def test_other_files_are_refused(tmp_path, weights, t2v, spiece, write_gguf):
    with pytest.raises(QuantError, match=r"not a T5 text encoder.*load it with Load Diffusion Model \(Quantized\)"):
        load_text_encoder(t2v[1], comfy.sd.CLIPType.WAN)
    language = {"token_embd.weight": torch.zeros(8, 32), "blk.0.attn_q.weight": torch.zeros(32, 32)}
    language = write_gguf(tmp_path / "llm.gguf", language, lambda *_: "F32", metadata={"general.architecture": "qwen2"})
    with pytest.raises(QuantError, match=r"general\.architecture qwen2\); choose umt5-xxl for Wan"):
        load_text_encoder(language, comfy.sd.CLIPType.WAN)
    metadata = {SPIECE_KEY: np.frombuffer(spiece, np.uint8)}
    small = write_packed(tmp_path / "small.gguf", first_blocks(weights, 1), metadata, by_llama=True)
    with pytest.raises(QuantError, match=r"small\.gguf: a T5 text encoder of another size, expected XXL"):
        load_text_encoder(small, comfy.sd.CLIPType.WAN)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("shared.weight", (32,)),
        ("shared.weight", (2, 2, 32)),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32,)),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", (1,)),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", (4,)),
    ],
)
def test_matrices_with_other_dimensions(tmp_path, weights, spiece, name, shape):
    changed = {n: (llama, torch.ones(shape) if n == name else w) for n, (llama, w) in first_blocks(weights, 1).items()}
    metadata = {SPIECE_KEY: np.frombuffer(spiece, np.uint8)}
    path = write_packed(tmp_path / "a.gguf", changed, metadata, by_llama=False)
    with pytest.raises(QuantError, match=rf"tensor {name}: shape .*, expected 2 dimensions"):
        load_text_encoder(path, comfy.sd.CLIPType.WAN)


def test_file_without_a_tokenizer(tmp_path, weights):
    bare = write_packed(tmp_path / "bare.gguf", first_blocks(weights, 1), {}, by_llama=True)
    with pytest.raises(QuantError, match=r"bare\.gguf: has no tokenizer .*put spiece\.model into the same folder"):
        load_text_encoder(bare, comfy.sd.CLIPType.WAN)


def test_type_of_another_model_family(tmp_path, own_file, weights):
    with pytest.raises(QuantError, match="umT5, the text encoder of Wan; choose type wan"):
        load_text_encoder(own_file, comfy.sd.CLIPType.SD3)
    shared_bias = {n: v for n, v in first_blocks(weights, 2).items() if "relative" not in n or ".block.0." in n}
    t5 = write_packed(tmp_path / "t5.gguf", shared_bias, {}, by_llama=False)
    with pytest.raises(QuantError, match="T5, but Wan's text encoder is umT5; choose umt5-xxl"):
        load_text_encoder(t5, comfy.sd.CLIPType.WAN)


@pytest.fixture(scope="module")
def with_norms(tmp_path_factory, weights, spiece):
    """Return a file with random norms, these norms by name, and a prompt as it is encoded without a flag."""
    generator = torch.Generator().manual_seed(1)
    norms = {n: (o, torch.rand(w.shape, generator=generator)) for n, (o, w) in weights.items() if w.ndim == 1}
    metadata = {SPIECE_KEY: np.frombuffer(spiece, np.uint8)}
    path = write_packed(tmp_path_factory.mktemp("norms") / "umt5.gguf", weights | norms, metadata, by_llama=False)
    return path, norms, load_text_encoder(path, comfy.sd.CLIPType.WAN).encode(TEXTS[0])


@pytest.mark.parametrize("flag", ["fp8_e5m2", "fp16", "bf16"])
def test_flags_of_the_host_round_no_unquantized_tensor(with_norms, sqnr, monkeypatch, flag):
    path, norms, expected = with_norms
    monkeypatch.setattr(args, f"{flag}_text_enc", True)
    clip = load_text_encoder(path, comfy.sd.CLIPType.WAN)
    assert sqnr(expected, clip.encode(TEXTS[0])) > 60
    loaded = clip.cond_stage_model.umt5xxl.transformer.state_dict()
    assert all(torch.equal(loaded[name].float(), weight) for name, (_, weight) in norms.items())
