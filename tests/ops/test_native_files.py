"""Files in ComfyUI's own formats, through the host's own loader and forward."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanquant.ops.loading.native_model import load_native_model
from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.native.registry import NATIVE

# What this host knows; the others need ComfyUI 0.31 or newer.
try:
    from comfy.quant_ops import QUANT_ALGOS

    KNOWN = set(QUANT_ALGOS)
except ImportError:
    KNOWN = set()


def loadable(name):
    return str(NATIVE[name].config["format"]) in KNOWN


@pytest.fixture(scope="module")
def native(t2v, tmp_path_factory):
    """Return the function that converts the checkpoint to a native recipe, and returns the path."""
    folder = tmp_path_factory.mktemp("native")

    def native(name):
        return convert(t2v[0], folder / f"{name}.safetensors", name).path

    return native


def velocity(path):
    model = comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 7, 4096, generator=generator)
    with torch.no_grad():
        return model, model.model.apply_model(x, torch.tensor([500.0]), c_crossattn=context)


# Relative errors of the velocity. The weights are random, so that errors do not average out as in a trained model.
LARGEST = {
    "FP8": 0.03,
    "MXFP8": 0.03,
    "INT8": 0.01,
    "W4A8": 0.08,
    "W4A8_G32": 0.08,
    "W6A8": 0.03,
    "NVFP4": 0.1,
    "INT4": 0.15,
}


@pytest.mark.parametrize("name", NATIVE)
def test_the_host_loads_and_runs_what_is_written(name, native, t2v):
    if not loadable(name):
        pytest.skip(f"this host does not know {NATIVE[name].config['format']}")
    path = native(name)
    model, ours = velocity(path)
    _, expected = velocity(t2v[0])
    assert (ours - expected).norm() / expected.norm() < LARGEST[name]
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    assert type(weight).__name__ == "QuantizedTensor"


@pytest.mark.parametrize("name", NATIVE)
def test_the_host_saves_the_same_bytes(name, native):
    if not loadable(name):
        pytest.skip(f"this host does not know {NATIVE[name].config['format']}")
    path = native(name)
    model, _ = velocity(path)
    written, saved = load_file(path), model.model.diffusion_model.state_dict()
    assert saved.keys() == written.keys()
    layers = [key.removesuffix("comfy_quant") for key in written if key.endswith(".comfy_quant")]
    parts = [
        key for key in written if key.startswith(tuple(layers)) and key.split(".")[-1] not in ("bias", "comfy_quant")
    ]
    assert len(parts) >= 2 * len(layers) == 40
    for key in parts:
        ours, host = (state[key].cpu().reshape(-1).view(torch.uint8) for state in (written, saved))
        assert torch.equal(ours, host), key


def with_marker(path, target, metadata=None, **changes):
    """Write the file with other values in every marker; None removes a key."""
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(".comfy_quant")]:
        config = {**json.loads(bytes(tensors[key].tolist())), **changes}
        text = json.dumps({name: value for name, value in config.items() if value is not None}).encode()
        tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, target, metadata)
    return target


def declared(path, **config):
    """Return the metadata that declares one format for all layers."""
    layers = [key.removesuffix(".comfy_quant") for key in load_file(path) if key.endswith(".comfy_quant")]
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": dict.fromkeys(layers, config)})}


@pytest.mark.parametrize("mistake", ["forgotten rotation", "wrong group", "header against marker"])
def test_the_host_is_silent_about_mistakes_that_these_tests_would_see(mistake, native, t2v, tmp_path):
    """The host loads such files without a word, and the velocity is wrong; files of this pack are free of them."""
    if not loadable("INT8"):
        pytest.skip("this host does not know int8_tensorwise")
    path = native("INT8")
    wrong = {
        "forgotten rotation": lambda target: with_marker(path, target, convrot=None),
        "wrong group": lambda target: with_marker(path, target, convrot_groupsize=64),
        "header against marker": lambda target: with_marker(path, target, declared(path, format="int8_tensorwise")),
    }[mistake](tmp_path / "wrong.safetensors")
    _, expected = velocity(t2v[0])
    _, ours = velocity(path)
    _, theirs = velocity(wrong)
    errors = [float((one - expected).norm() / expected.norm()) for one in (ours, theirs)]
    assert errors[0] < LARGEST["INT8"] and errors[1] > 0.1
    with safe_open(path, "pt") as file:
        assert "_quantization_metadata" not in file.metadata()


@pytest.mark.parametrize("text", [b"{", b"{}", b'{"format": 8}'])
def test_a_marker_that_names_no_format_is_refused(text, native, tmp_path):
    """The host stops at it with an error of its own."""
    tensors, marker = load_file(native("FP8")), "blocks.0.ffn.0.comfy_quant"
    save_file(tensors | {marker: torch.tensor(list(text), dtype=torch.uint8)}, tmp_path / "a.safetensors")
    with pytest.raises(QuantError, match=rf"a\.safetensors: tensor {marker}: got no JSON object with a format, which"):
        load_native_model(tmp_path / "a.safetensors")
    with pytest.raises(Exception):  # noqa: B017 (whatever the host raises)
        comfy.sd.load_diffusion_model(str(tmp_path / "a.safetensors"))


def test_codes_without_a_marker_are_refused(native, tmp_path):
    """The host takes them for weights."""
    if not loadable("INT8"):
        pytest.skip("this host does not know int8_tensorwise")
    path, layer = native("INT8"), "blocks.0.ffn.0"
    tensors = load_file(path)
    config = json.loads(bytes(tensors.pop(f"{layer}.comfy_quant").tolist()))
    for marker in ({}, {f"{layer}.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)}):
        save_file(tensors | marker, tmp_path / "a.safetensors")
        with pytest.raises(QuantError, match=rf"tensor {layer}\.weight: I8 without a readable comfy_quant, which"):
            load_native_model(tmp_path / "a.safetensors")
    text = json.dumps({"layers": {layer: config}})
    for prefix in ("", "model.diffusion_model."):  # also without the prefix of the tensors, the metadata counts
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        save_file(named, tmp_path / "b.safetensors", {"_quantization_metadata": text})
        load_native_model(tmp_path / "b.safetensors")
