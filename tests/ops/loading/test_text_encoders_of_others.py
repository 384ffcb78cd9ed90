"""umT5 in the files of other tools: their names of tensors, and where they keep the tokenizer."""

from __future__ import annotations

import comfy.sd
import pytest
import torch

from wanquant.ops.loading.text_encoder import load_text_encoder
from wanquant.quant import QuantError
from wanquant.testing.text_encoder_files import NAMINGS, TEXTS, tokens, write_as_others


@pytest.fixture(scope="module")
def stored(weights):
    """Return the weights in float16 by the host's names."""
    return {name: weight.half() for name, (_, weight) in weights.items()}


@pytest.mark.parametrize(("dtype", "architecture"), [("F32", "pig"), ("F16", "cow"), ("BF16", "pig")])
def test_tokenizer_as_a_tensor(tmp_path, stored, spiece, processor, dtype, architecture):
    path = write_as_others(tmp_path / "a.gguf", stored, spiece, dtype, architecture)
    clip = load_text_encoder(path, comfy.sd.CLIPType.WAN)
    expected = processor.encode(TEXTS[2])
    assert tokens(clip, TEXTS[2])[: len(expected)] == expected
    weight = clip.cond_stage_model.umt5xxl.transformer.encoder.block[3].layer[0].SelfAttention.k.weight
    assert torch.equal(weight.float(), stored["encoder.block.3.layer.0.SelfAttention.k.weight"].float())


def test_tokenizer_beside_the_file(tmp_path, stored, spiece, processor):
    path = write_as_others(tmp_path / "a.gguf", stored, None)
    with pytest.raises(QuantError, match="has no tokenizer"):
        load_text_encoder(path, comfy.sd.CLIPType.WAN)
    (tmp_path / "spiece.model").write_bytes(spiece)
    clip = load_text_encoder(path, comfy.sd.CLIPType.WAN)
    assert tokens(clip, TEXTS[0])[:4] == processor.encode(TEXTS[0])[:4]
    (tmp_path / "spiece.model").write_bytes(b"something else")
    with pytest.raises(QuantError, match=r"a\.gguf: tokenizer: 14 bytes of something else"):
        load_text_encoder(path, comfy.sd.CLIPType.WAN)


@pytest.mark.parametrize("naming", NAMINGS)
def test_names_that_other_tools_write(tmp_path, stored, spiece, naming):
    renamed = {NAMINGS[naming](name): weight for name, weight in stored.items()}
    renamed["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(2, 2).half()
    path = write_as_others(tmp_path / "a.gguf", renamed, spiece, "F16")
    state = load_text_encoder(path, comfy.sd.CLIPType.WAN).cond_stage_model.umt5xxl.transformer.state_dict()
    for name, weight in stored.items():
        assert torch.equal(state[name].float(), weight.float()), name


def test_an_incomplete_encoder_is_refused(tmp_path, stored, spiece):
    partial = {n: w for n, w in stored.items() if n != "encoder.block.7.layer.1.DenseReluDense.wo.weight"}
    path = write_as_others(tmp_path / "a.gguf", partial, spiece, "F16")
    with pytest.raises(QuantError, match=r"tensor enc\.blk\.7\.ffn_down\.weight is missing"):
        load_text_encoder(path, comfy.sd.CLIPType.WAN)
