"""Converted files under the rules of other loaders, each stated from its source and checked with the gguf package."""

from __future__ import annotations

import gguf
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from wanquant.quant.conversion.convert import convert
from wanquant.testing.tiny_wan import write_tiny_wan

PATCH_EMBEDDING = "patch_embedding.weight"
PLAIN = {Type.F32, Type.F16}
RECIPES = ("BF16", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS", "Q5_1")
# What ComfyUI-GGUF decodes with torch; it leaves any other type to numpy. Source: dequant.py @ 795e451.
DECODED = PLAIN | {
    Type[name]
    for name in (
        *("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
}


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def source(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "wan.safetensors"
    return write_tiny_wan(path, layers=1, ffn_dim=512, variant=request.param, prefix="model.diffusion_model.")


@pytest.fixture(scope="module")
def state(source):
    return {name.removeprefix("model.diffusion_model."): tensor for name, tensor in load_file(source).items()}


def read(path):
    reader = gguf.GGUFReader(path)
    return reader.fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture(scope="module", params=RECIPES)
def flat(request, source, tmp_path_factory):
    return read(convert(source, tmp_path_factory.mktemp("flat") / "a.gguf", request.param, effort="fast").path)


@pytest.fixture(scope="module", params=RECIPES)
def deep(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    return read(convert(source, folder / "a.gguf", request.param, effort="fast", five_d=True).path)


def test_comfyui_gguf(flat, state):
    """Known architecture as one string; bare names; shapes reversed, or as an INT32 array of their own.

    Source: city96/ComfyUI-GGUF loader.py gguf_sd_loader, get_orig_shape @ 795e451.
    """
    fields, tensors = flat
    assert fields["general.architecture"].types == [gguf.GGUFValueType.STRING]
    assert fields["general.architecture"].contents() == "wan"
    assert tensors.keys() == state.keys()
    assert {tensor.tensor_type for tensor in tensors.values()} <= DECODED
    for name, tensor in tensors.items():
        original = fields.get(f"comfy.gguf.orig_shape.{name}")
        if original is not None:
            assert original.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
            # Plain values get the shape as a view, packed ones keep their rows.
            assert tensor.tensor_type in PLAIN
        shape = original.contents() if original else tensor.shape.tolist()[::-1]
        assert shape == list(state[name].shape)


def test_comfyui_gguf_decodes_in_layers_only(flat, state):
    """A parameter that is no layer's weight or bias is used as it lies in the file, and so must be plain numbers.

    Source: city96/ComfyUI-GGUF ops.py GGMLLayer @ 795e451; loader.py decodes one-dimensional BF16 alone.
    """
    _, tensors = flat
    for name, tensor in tensors.items():
        if len(state[name].shape) != 2 or not name.endswith(".weight"):
            assert tensor.tensor_type == Type.F32, name


def test_wan_video_wrapper(deep, state):
    """Numpy's shape of the patch embedding tells width and channels; only Linear weights may be of another type than
    F32 and F16 (BF16 counts as packed); the others are copied into parameters of the model's shape.

    Source: kijai/ComfyUI-WanVideoWrapper nodes_model_loading.py loadmodel, load_weights @ ee982da; gguf/gguf.py
    load_gguf @ 523b358.
    """
    _, tensors = deep
    assert tensors[PATCH_EMBEDDING].data.shape == tuple(state[PATCH_EMBEDDING].shape)
    for name, tensor in tensors.items():
        if tensor.tensor_type in PLAIN:
            assert tensor.data.shape == tuple(state[name].shape)
        else:
            assert name.endswith(".weight") and len(state[name].shape) == 2
            assert len(tensor.data) == len(state[name])


def test_stable_diffusion_cpp(flat, state):
    """At most four dimensions, the 3-D kernels with output and input channels merged; one-dimensional ones F32.

    Source: leejet/stable-diffusion.cpp src/core/ggml_extend.hpp Conv3d, src/model_io/gguf_io.cpp read_gguf_file
    @ 97d2990; names shorter than GGML_MAX_NAME, which its build sets to 128.
    """
    _, tensors = flat
    out_channels, in_channels, *kernel = state[PATCH_EMBEDDING].shape
    assert tensors[PATCH_EMBEDDING].shape.tolist() == [*reversed(kernel), in_channels * out_channels]
    for name, tensor in tensors.items():
        assert len(tensor.shape) <= 4 and len(name.encode()) < 128
        assert len(tensor.shape) > 1 or tensor.tensor_type == Type.F32


def test_module_beside_its_base(source, state, tmp_path):
    """KJNodes and WanVideoWrapper read a module from a GGUF of its own and add its tensors to the base's: the file
    needs a known architecture and names that the base has not.

    Source: kijai/ComfyUI-KJNodes nodes/model_optimization_nodes.py GGUFLoaderKJ @ 3f20054; WanVideoWrapper as above.
    """
    block = {f"vace_{name}": tensor.clone() for name, tensor in state.items() if name.startswith("blocks.0.")}
    more = {"vace_patch_embedding.weight": state[PATCH_EMBEDDING].clone()}
    save_file(block | more, tmp_path / "vace.safetensors")
    path = convert(tmp_path / "vace.safetensors", tmp_path / "vace.gguf", "Q4_0", effort="fast", five_d=True).path
    fields, tensors = read(path)
    assert fields["general.architecture"].contents() == "wan"
    assert tensors.keys() == block.keys() | more.keys() and tensors.keys().isdisjoint(state)
    assert tensors["vace_patch_embedding.weight"].data.shape == tuple(state[PATCH_EMBEDDING].shape)
