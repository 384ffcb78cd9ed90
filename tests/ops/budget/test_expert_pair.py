"""Two experts are a pair: of one architecture, and not the same expert."""

from __future__ import annotations

import shutil

import pytest
import torch

from wanquant.ops.budget.expert_pair import load_expert_pair
from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert

OTHERS = {
    "image to video": ({"variant": "i2v"}, "model_type", "t2v", "i2v"),
    "width": ({"dim": 384}, "dim", 256, 384),
    "feed-forward width": ({"ffn_dim": 512}, "ffn_dim", 1024, 512),
    "blocks": ({"layers": 3}, "num_layers", 2, 3),
}


@pytest.fixture(scope="module")
def write(tiny_wan, tmp_path_factory):
    """Return a function that writes a GGUF of a tiny Wan."""
    folder = tmp_path_factory.mktemp("pair")

    def write(name, recipe="Q8_0", **options):
        options = {"layers": 2, "seed": 1, **options}
        source = tiny_wan["write_tiny_wan"](folder / f"{name}.safetensors", **options)
        return convert(source, folder / f"{name}.gguf", recipe, effort="fast").path

    return write


def test_two_experts_of_one_model_load_without_a_warning(write):
    high, low, warning = load_expert_pair(write("high"), write("low", seed=2, recipe="Q4_K_M"), torch.bfloat16)
    assert warning == ""
    assert high.model is not low.model
    assert low.model.get_dtype_inference() == torch.bfloat16


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("swapped", [False, True])
def test_another_architecture_is_refused(write, other, swapped):
    options, key, *values = OTHERS[other]
    pair = [write("high"), write(other, seed=2, **options)]
    if swapped:
        pair.reverse()
        values.reverse()
    message = f"{key} {values[0]} and {values[1]}"
    with pytest.raises(QuantError, match=rf"are not the experts of one model: .*{message}.*; choose the high-noise"):
        load_expert_pair(*pair)


def test_same_expert_is_warned_of(write, tmp_path):
    high = write("high")
    assert "high.gguf is chosen twice" in load_expert_pair(high, high)[2]
    (tmp_path / "link.gguf").symlink_to(high)
    assert "is chosen twice" in load_expert_pair(high, tmp_path / "link.gguf")[2]
    copied = shutil.copy(high, tmp_path / "low.gguf")
    assert "high.gguf and low.gguf hold the same expert" in load_expert_pair(high, copied)[2]


def test_same_expert_in_another_type_is_warned_of(write):
    assert "hold the same expert" in load_expert_pair(write("high"), write("again", recipe="Q4_0"))[2]
