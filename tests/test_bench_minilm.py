"""The benchmark of a pretrained sentence encoder, on a tiny random one, which needs no package."""

from __future__ import annotations

import torch

from wanquant.bench.bert import HEAD_SIZE, Bert
from wanquant.bench.minilm import METHODS, docstrings, language_reference, measure, paragraphs, text

DIM, WORDS = 2 * HEAD_SIZE, 50
# PyTorch's names, and those of BertModel.
NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}


def tiny() -> tuple[Bert, torch.nn.Module]:
    """Return a random BERT of one layer, and its layer as PyTorch's."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(DIM, 2, 4 * DIM, activation="gelu", layer_norm_eps=1e-12).eval()
    state = {name: torch.randn_like(tensor) * tensor.shape[-1] ** -0.5 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    kinds = ("word", "position", "token_type")
    weights = {f"embeddings.{kind}_embeddings.weight": torch.randn(WORDS, DIM) for kind in kinds}
    weights |= {"embeddings.LayerNorm.weight": torch.ones(DIM), "embeddings.LayerNorm.bias": torch.zeros(DIM)}
    prefix = "encoder.layer.0"
    for kind in ("weight", "bias"):
        weights |= {f"{prefix}.{ours}.{kind}": state[f"{theirs}.{kind}"] for theirs, ours in NAMES.items()}
        parts = zip(("query", "key", "value"), state[f"self_attn.in_proj_{kind}"].chunk(3), strict=True)
        weights |= {f"{prefix}.attention.self.{name}.{kind}": part for name, part in parts}
    return Bert(weights), layer


def test_embedding_is_that_of_pytorchs_layer():
    network, layer = tiny()
    tokens = torch.arange(7)
    kinds = ("word", "position", "token_type")
    word, position, token_type = (network.weights[f"embeddings.{kind}_embeddings.weight"] for kind in kinds)
    x = torch.nn.functional.layer_norm(word[tokens] + position[:7] + token_type[0], (DIM,), eps=1e-12)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(layer(x).mean(0), dim=0)
    seen = []
    assert torch.allclose(network.embed(tokens, lambda name, _: seen.append(name)), expected, atol=1e-6)
    assert sorted(seen) == sorted(network.linears)


def test_measures_every_method_where_the_rows_allow_the_type():
    network, _ = tiny()
    texts = torch.randint(WORDS, (48, 24)).unbind()
    rows = measure(network, texts[:40], texts[40:], ["Q3_K", "Q4_0", "IQ2_XXS"])
    assert [row.method for row in rows] == [*METHODS, *METHODS, *(name for name in METHODS if name != "ggml")]
    assert {(row.type, row.layers) for row in rows} == {("Q3_K", 1), ("Q4_0", 6), ("IQ2_XXS", 1)}
    (q4_0,) = (row for row in rows if (row.type, row.method) == ("Q4_0", "thorough"))
    assert q4_0.layer_gain.mean > 0
    assert "| Q4_0 | thorough | ggml + importance |" in text(rows)


def test_texts_are_sentences_and_differ():
    collected, judged = paragraphs(docstrings(), 40), paragraphs(language_reference(), 40)
    assert len(collected) == len(judged) == 40
    assert not set(collected) & set(judged)
