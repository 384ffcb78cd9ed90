"""stable-diffusion.cpp reads our files with the same names, bytes and values.

`pip install stable-diffusion-cpp-python` compiles for ten minutes, so the set-up leaves it out. All tests passed with
version 0.4.7.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import open_gguf
from wanquant.quant.conversion.convert import convert
from wanquant.quant.plan.recipe import GGUF_RECIPES
from wanquant.testing.tiny_wan import write_tiny_wan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("stable_diffusion_cpp") is None, reason="needs stable-diffusion-cpp-python"
)

# Its SD_TYPE_F32, and SD_TYPE_COUNT, with which every tensor keeps its type. Source: include/stable-diffusion.h.
F32, KEPT = 0, 41
# Runs in its own process, because the library can abort it when it refuses a file.
_EXPORT = """
import sys
from stable_diffusion_cpp.stable_diffusion_cpp import convert
source, destination, dtype = sys.argv[1:]
sys.exit(not convert(source.encode(), b"", destination.encode(), int(dtype), b"", False))
"""


def run(source, destination, dtype):
    """Read a file with the loader of stable-diffusion.cpp, and write what it has read."""
    command = [sys.executable, "-c", _EXPORT, str(source), str(destination), str(dtype)]
    return subprocess.run(command, capture_output=True, text=True)


def exported(source, destination, dtype):
    done = run(source, destination, dtype)
    assert done.returncode == 0, done.stderr
    return destination


def check(path):
    """Compare our file with what the library writes of it: as blocks, then dequantized."""
    ours = open_gguf(path).tensors
    kept = open_gguf(exported(path, path.with_suffix(".kept.gguf"), KEPT)).tensors
    assert kept.keys() == ours.keys()
    for name, tensor in ours.items():
        assert kept[name].qtype is tensor.qtype
        assert torch.equal(kept[name].data.flatten(), tensor.data.flatten()), name
    dequantized = load_file(exported(path, path.with_suffix(".safetensors"), F32))
    assert dequantized.keys() == ours.keys()
    for name, tensor in ours.items():
        assert dequantized[name].shape == stored_shape(tensor.shape), name
        assert torch.equal(dequantized[name].float().flatten(), tensor.dequantize().flatten()), name


def stored_shape(shape):
    """Return the shape without leading dimensions of 1; of five dimensions, the first two are merged."""
    shape = (prod(shape[:2]), *shape[2:]) if len(shape) == 5 else shape
    return shape[next((n for n, size in enumerate(shape) if size > 1), 0) :]


@pytest.mark.parametrize(("variant", "recipe"), [*(("t2v", recipe) for recipe in GGUF_RECIPES), ("i2v", "Q4_K_M")])
def test_transformer_is_read(tmp_path, variant, recipe):
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=512, variant=variant)
    check(convert(source, tmp_path / "a.gguf", recipe, effort="fast").path)


def test_five_dimensions_are_refused(tmp_path):
    """It reads five dimensions only in files without arrays, whose items it takes for keys; our metadata has an array.

    Source: leejet/stable-diffusion.cpp src/model_io/gguf_reader_ext.h GGUFReader.read_metadata @ 97d2990.
    """
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=512)
    path = convert(source, tmp_path / "a.gguf", "Q4_K_M", effort="fast", five_d=True).path
    done = run(path, tmp_path / "b.gguf", KEPT)
    assert done.returncode == 1 and "read meta data failed" in done.stderr


@pytest.mark.parametrize("recipe", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_text_encoder_is_read(tmp_path, recipe):
    rows = {"attn_rel_b": (32, 4), "attn_norm": (256,), "ffn_norm": (256,), "ffn_down": (256, 512)}
    rows |= dict.fromkeys(("ffn_gate", "ffn_up"), (512, 256)) | {f"attn_{name}": (256, 256) for name in "qkvo"}
    shapes = {"token_embd.weight": (64, 256), "enc.output_norm.weight": (256,)}
    shapes |= {f"enc.blk.{block}.{name}.weight": shape for block in range(2) for name, shape in rows.items()}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    # A sentencepiece model of one piece, "a".
    state["spiece_model"] = torch.tensor(list(b"\x0a\x03\x0a\x01a"), dtype=torch.uint8)
    save_file(state, tmp_path / "t5.safetensors")
    check(convert(tmp_path / "t5.safetensors", tmp_path / "a.gguf", recipe, effort="fast").path)
