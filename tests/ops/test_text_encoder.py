"""umT5 from GGUF: names, tokenizer, and the embedding of a prompt against the host's own dense encoder."""

from __future__ import annotations

import io

import comfy.sd
import numpy as np
import pytest
import sentencepiece
import torch

from wanquant.ops.layout import is_packed
from wanquant.ops.text_encoder import load_text_encoder
from wanquant.quant import QTYPES, QuantError
from wanquant.quant.gguf_writer import GGUFWriter, TensorSpec
from wanquant.quant.sentencepiece import SPIECE_KEY, parse_vocabulary, sentencepiece_model

WIDTH, HEADS, BLOCKS, FFN = 64, 2, 24, 10240  # the host knows umt5-xxl by its 24 blocks and its FFN
TEXTS = [
    "a red ball moves right",
    "  two   spaces, CAPITALS and ﬁne ligatures!  ",
    "一个红色的球向右移动",
    "Ein grüner Würfel dreht sich; 3,5 Sekunden 🎬",
    "",
]


@pytest.fixture(scope="module")
def spiece():
    """A small unigram model with umT5's special tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=110,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def weights(spiece):
    """The host's tensor names -> (llama.cpp's, weight)."""
    generator = torch.Generator().manual_seed(0)
    rows = sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size()

    def normal(*shape, std=None):
        return torch.randn(shape, generator=generator) * (std or shape[-1] ** -0.5)

    tensors = {"shared.weight": ("token_embd.weight", normal(rows, WIDTH, std=1.0))}
    tensors["encoder.final_layer_norm.weight"] = ("enc.output_norm.weight", torch.ones(WIDTH))
    for i in range(BLOCKS):
        host, llama = f"encoder.block.{i}.layer", f"enc.blk.{i}"
        for part in "qkvo":
            # T5 does not scale its scores: the queries are initialised small instead.
            std = (WIDTH * WIDTH / HEADS) ** -0.5 if part == "q" else None
            weight = normal(WIDTH, WIDTH, std=std)
            tensors[f"{host}.0.SelfAttention.{part}.weight"] = (f"{llama}.attn_{part}.weight", weight)
        bias = normal(32, HEADS, std=1.0)
        tensors[f"{host}.0.SelfAttention.relative_attention_bias.weight"] = (f"{llama}.attn_rel_b.weight", bias)
        for name, other, shape in (
            ("wi_0", "ffn_gate", (FFN, WIDTH)),
            ("wi_1", "ffn_up", (FFN, WIDTH)),
            ("wo", "ffn_down", (WIDTH, FFN)),
        ):
            tensors[f"{host}.1.DenseReluDense.{name}.weight"] = (f"{llama}.{other}.weight", normal(*shape))
        for layer, other in ((0, "attn_norm"), (1, "ffn_norm")):
            tensors[f"{host}.{layer}.layer_norm.weight"] = (f"{llama}.{other}.weight", torch.ones(WIDTH))
    return tensors


def write(path, weights, metadata, names, qtype="Q8_0"):
    tensors = {names(host, llama): weight for host, (llama, weight) in weights.items()}
    types = {n: QTYPES[qtype if w.ndim == 2 and w.shape[1] % 32 == 0 else "F32"] for n, w in tensors.items()}
    specs = [TensorSpec(name, types[name], tuple(weight.shape)) for name, weight in tensors.items()]
    with GGUFWriter(path, {"general.architecture": "t5encoder", **metadata}, specs) as writer:
        for spec in specs:
            writer.write(spec.name, spec.qtype.quantize(tensors[spec.name], effort="fast"))
    return path


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory, weights, spiece):
    path = tmp_path_factory.mktemp("llama") / "umt5.gguf"
    return write(path, weights, parse_vocabulary(spiece, processor(spiece).get_piece_size()), lambda host, llama: llama)


@pytest.fixture(scope="module")
def own_file(tmp_path_factory, weights, spiece):
    path = tmp_path_factory.mktemp("own") / "umt5.gguf"
    return write(path, weights, {SPIECE_KEY: np.frombuffer(spiece, np.uint8)}, lambda host, llama: host)


def tokens(clip, text):
    ((row,),) = clip.tokenize(text).values()
    return [token for token, _ in row]


def processor(spiece):
    return sentencepiece.SentencePieceProcessor(model_proto=spiece, add_eos=True)


@pytest.mark.parametrize("file", ["own_file", "llama_file"], ids=["embedded", "rebuilt"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_sentencepiece(file, text, request, spiece):
    clip = load_text_encoder(request.getfixturevalue(file), comfy.sd.CLIPType.WAN)
    expected = processor(spiece).encode(text)
    assert tokens(clip, text)[: len(expected)] == expected


def test_vocabulary_survives_both_ways(spiece):
    size = processor(spiece).get_piece_size()
    vocabulary = parse_vocabulary(spiece, size)
    assert vocabulary["tokenizer.ggml.tokens"] == [processor(spiece).id_to_piece(i) for i in range(size)]
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


def test_other_files_are_refused(tmp_path, weights, t2v, spiece):
    with pytest.raises(QuantError, match="not a T5 text encoder"):
        load_text_encoder(t2v[1], comfy.sd.CLIPType.WAN)
    few = {name: value for name, value in weights.items() if "block" not in name or ".0." in name}
    bare = write(tmp_path / "bare.gguf", few, {}, lambda host, llama: llama)
    with pytest.raises(QuantError, match=r"bare\.gguf: tokenizer\.ggml\.model is not given"):
        load_text_encoder(bare, comfy.sd.CLIPType.WAN)
