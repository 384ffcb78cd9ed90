"""Converted files meet the rules of other loaders, which are taken from their sources and checked with gguf."""

from __future__ import annotations

import gguf
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from wanquant.quant.conversion.convert import convert
from wanquant.testing.tiny_wan import vace_add_on, write_tiny_wan

PATCH_EMBEDDING = "patch_embedding.weight"
PLAIN = {Type.F32, Type.F16}
RECIPES = ("BF16", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS", "Q5_1")
# The types that ComfyUI-GGUF dequantizes with torch; it leaves all others to numpy. Source: dequant.py @ 795e451.
DEQUANTIZED = PLAIN | {
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


def test_comfyui_gguf_can_read_it(flat, state):
    """ComfyUI-GGUF needs a known architecture as one string, names without a prefix, and shapes.

    A shape is the reversed one of the tensor, or a separate INT32 array.

    Source: city96/ComfyUI-GGUF loader.py gguf_sd_loader, get_orig_shape @ 795e451.
    """
    fields, tensors = flat
    assert fields["general.architecture"].types == [gguf.GGUFValueType.STRING]
    assert fields["general.architecture"].contents() == "wan"
    assert tensors.keys() == state.keys()
    assert {tensor.tensor_type for tensor in tensors.values()} <= DEQUANTIZED
    for name, tensor in tensors.items():
        original = fields.get(f"comfy.gguf.orig_shape.{name}")
        if original is not None:
            assert original.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
            # The loader applies this shape as a view, which only plain values allow: packed ones keep their rows.
            assert tensor.tensor_type in PLAIN
        shape = original.contents() if original else tensor.shape.tolist()[::-1]
        assert shape == list(state[name].shape)


def test_parameters_outside_of_layers_are_plain_for_comfyui_gguf(flat, state):
    """ComfyUI-GGUF uses parameters other than the weight or bias of a layer as they are stored: as plain numbers.

    Source: city96/ComfyUI-GGUF ops.py GGMLLayer @ 795e451. Its loader.py dequantizes only one-dimensional BF16.
    """
    _, tensors = flat
    for name, tensor in tensors.items():
        if len(state[name].shape) != 2 or not name.endswith(".weight"):
            assert tensor.tensor_type == Type.F32, name


def test_wan_video_wrapper_can_read_it(deep, state):
    """WanVideoWrapper takes the model's width and channels from numpy's shape of the patch embedding.

    Only Linear weights may have another type than F32 and F16; BF16 counts as packed. The others are copied into
    parameters of the model's shape.

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


def test_stable_diffusion_cpp_can_read_it(flat, state):
    """stable-diffusion.cpp reads at most four dimensions: 3-D kernels have output and input channels merged.

    One-dimensional tensors must be F32.

    Source: leejet/stable-diffusion.cpp src/core/ggml_extend.hpp Conv3d, src/model_io/gguf_io.cpp read_gguf_file
    @ 97d2990; names shorter than GGML_MAX_NAME, which its build sets to 128.
    """
    _, tensors = flat
    out_channels, in_channels, *kernel = state[PATCH_EMBEDDING].shape
    assert tensors[PATCH_EMBEDDING].shape.tolist() == [*reversed(kernel), in_channels * out_channels]
    for name, tensor in tensors.items():
        assert len(tensor.shape) <= 4 and len(name.encode()) < 128
        assert len(tensor.shape) > 1 or tensor.tensor_type == Type.F32


def test_an_add_on_file_can_be_loaded_beside_its_base(source, state, tmp_path):
    """KJNodes and WanVideoWrapper read an add-on from its own GGUF and add its tensors to those of the base.

    The file needs a known architecture and names that the base does not have.

    Source: kijai/ComfyUI-KJNodes nodes/model_optimization_nodes.py GGUFLoaderKJ @ 3f20054; WanVideoWrapper as above.
    """
    add_on = vace_add_on(state)
    save_file(add_on, tmp_path / "vace.safetensors")
    path = convert(tmp_path / "vace.safetensors", tmp_path / "vace.gguf", "Q4_0", effort="fast", five_d=True).path
    fields, tensors = read(path)
    assert fields["general.architecture"].contents() == "wan"
    assert tensors.keys() == add_on.keys() and tensors.keys().isdisjoint(state)
    assert tensors["vace_patch_embedding.weight"].data.shape == tuple(add_on["vace_patch_embedding.weight"].shape)
