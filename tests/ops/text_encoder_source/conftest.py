"""A umT5 as the host has it, and its file with the tokenizer in it."""

from __future__ import annotations

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from wanquant.quant import convert
from wanquant.testing.text_encoder_files import TEXTS, trained_tokenizer


@pytest.fixture(scope="session")
def state():
    # Only here, as they import the host.
    import comfy.ops
    from comfy.text_encoders.t5 import T5

    from wanquant.tests.ops.text_encoder_source.umt5 import CONFIG

    torch.manual_seed(0)
    model = T5(CONFIG, torch.float32, "cpu", comfy.ops.manual_cast)
    return {name: torch.randn(value.shape).mul(0.05).bfloat16() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def spiece():
    from wanquant.tests.ops.text_encoder_source.umt5 import SPIECE

    return torch.frombuffer(bytearray(SPIECE.read_bytes()), dtype=torch.uint8)


@pytest.fixture(scope="session")
def source(state, spiece, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "umt5.safetensors"
    save_file(state | {"spiece_model": spiece}, path)
    return path


@pytest.fixture(scope="session")
def fields(state, tmp_path_factory):
    """Return a converted file's header as the package gguf reads it, which is slow: with a small tokenizer."""
    path = tmp_path_factory.mktemp("fields") / "umt5.safetensors"
    spiece = trained_tokenizer(TEXTS * 20, vocabulary=110, normalization="identity")
    small = {"shared.weight": state["shared.weight"][:256].clone()}
    save_file(state | small | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, path)
    return GGUFReader(convert(path, path.with_suffix(".gguf"), "Q8_0", effort="fast").path).fields
