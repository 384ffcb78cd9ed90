"""A small umT5 that the host takes for umt5-xxl, and its tokenizer."""

from __future__ import annotations

import pytest
import sentencepiece

from wanquant.quant.files.sentencepiece import parse_vocabulary
from wanquant.testing.text_encoder_files import TEXTS, random_weights, trained_tokenizer, write_packed


@pytest.fixture(scope="module")
def spiece():
    return trained_tokenizer(TEXTS * 20, vocabulary=110)


@pytest.fixture(scope="module")
def processor(spiece):
    return sentencepiece.SentencePieceProcessor(model_proto=spiece, add_eos=True)


@pytest.fixture(scope="module")
def weights(processor):
    """Return (name in llama.cpp, weight) by the host's tensor name."""
    return random_weights(processor.get_piece_size())


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory, weights, spiece, processor):
    path = tmp_path_factory.mktemp("llama") / "umt5.gguf"
    return write_packed(path, weights, parse_vocabulary(spiece, processor.get_piece_size()), by_llama=True)
