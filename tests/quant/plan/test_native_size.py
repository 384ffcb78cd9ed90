"""A size of a file in ComfyUI's own formats: the types that are mixed, and the errors that choose them."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.conversion.batch import list_targets
from wanquant.quant.conversion.convert import convert, convert_all
from wanquant.quant.conversion.settings import Settings, Target
from wanquant.quant.inspection.verify import verify
from wanquant.quant.native.inputs import rounded_inputs
from wanquant.quant.native.layer_type import LayerType
from wanquant.quant.native.registry import FIRST_HOST, NATIVE, companions
from wanquant.quant.plan.container import NativeContainer
from wanquant.quant.plan.layer_error import input_error, relative_error
from wanquant.quant.plan.recipe import RECIPES, plan_types
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.testing.tiny_wan import write_tiny_wan

GIB = 1 << 30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("source") / "wan.safetensors", layers=7, dim=256, ffn_dim=256)


def sized(source, folder, recipe, nbytes, **settings):
    settings = {"effort": "fast", "overwrite": True, **settings}
    return convert(source, folder / "sized.safetensors", recipe, target_size=nbytes / GIB, **settings)


def size_of(source, recipe):
    """Return the bytes of a file in this recipe, nearly."""
    with open_checkpoint(source) as checkpoint:
        tensors = checkpoint.tensors
        types = plan_types(RECIPES[recipe], tensors).types
        container = NativeContainer("W6A8")
        return 6000 + sum(container.nbytes(name, stored, tensors[name]) for name, stored in types.items())


def between(source, low, high, share=0.5):
    """Return a size between those of two recipes."""
    sizes = size_of(source, low), size_of(source, high)
    return int(sizes[0] + share * (sizes[1] - sizes[0]))


def mixed(report):
    return {tensor.qtype for tensor in report.tensors if tensor.name.startswith("blocks.") and len(tensor.shape) == 2}


def test_one_file_holds_several_formats(source, tmp_path):
    nbytes = between(source, "W4A8", "INT8")
    report = sized(source, tmp_path, "W4A8", nbytes)
    assert 0.97 * nbytes <= report.nbytes == os.path.getsize(report.path) <= nbytes
    assert {"W4A8", "INT8"} <= mixed(report) <= {"INT4", "W4A8_G32", "W4A8", "INT8", "BF16"}
    assert report.metadata["wanquant.recipe"] == "W4A8"
    assert report.metadata["wanquant.target_size"] == nbytes
    found = verify(report.path, source)
    assert not found.missing and not found.unknown
    recorded = {tensor.name: tensor.relative_error for tensor in report.tensors}
    for tensor in found.tensors:
        assert tensor.relative_error == pytest.approx(recorded[tensor.name], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_size_is_never_exceeded(source, tmp_path, share):
    nbytes = between(source, "INT4", "INT8", share)
    report = sized(source, tmp_path, "W6A8", nbytes)
    assert 0.97 * nbytes <= report.nbytes <= nbytes
    assert len(mixed(report)) > 1


@pytest.mark.parametrize("recipe", NATIVE)
def test_a_mix_loads_wherever_its_recipe_does(source, recipe, tmp_path):
    """Every size has formats of the recipe's hosts only, as the layers' markers say."""
    low = min(size_of(source, other) for other in companions(recipe))
    report = sized(source, tmp_path, recipe, int(1.15 * low))
    names = {name.removesuffix(" (ComfyUI)") for name in mixed(report)} - {"BF16"}
    assert names and all(FIRST_HOST[name] <= FIRST_HOST[recipe] for name in names)
    assert "MXFP8" not in names or recipe == "MXFP8"


def test_formats_that_hosts_load():
    assert set(companions("INT8")) == {"FP8", "NVFP4", "INT8"}
    assert set(companions("W4A8")) == {"FP8", "NVFP4", "INT8", "INT4", "W4A8", "W4A8_G32"}
    assert "W6A8" in companions("W6A8") and "W6A8" not in companions("W4A8")
    assert FIRST_HOST.keys() == NATIVE.keys()


def test_sizes_that_cannot_be_reached_are_refused(source, tmp_path):
    for recipe in ("FP8", "W4A8"):
        with pytest.raises(QuantError, match=r"target size .* cannot be reached .* choose a size from"):
            sized(source, tmp_path, recipe, 1 << 20)
    assert not list(tmp_path.iterdir())


def test_the_recipe_is_part_of_what_is_reused(source, tmp_path):
    nbytes = between(source, "NVFP4", "INT8")
    sized(source, tmp_path, "W4A8", nbytes)
    assert sized(source, tmp_path, "W4A8", nbytes, overwrite=False).reused
    for settings in ({"recipe": "INT8", "target_size": nbytes / GIB}, {"recipe": "W4A8"}):
        with pytest.raises(QuantError, match="is not this conversion"):
            convert(source, tmp_path / "sized.safetensors", effort="fast", **settings)


def test_one_pass_makes_both_containers(source, tmp_path):
    nbytes = between(source, "W4A8", "INT8")
    recipes = {"INT8": "a.safetensors", "W4A8": "b.safetensors", "Q4_K_M": "c.gguf"}
    targets = [Target(tmp_path / name, recipe, nbytes / GIB) for recipe, name in recipes.items()]
    together = convert_all(source, targets, Settings(effort="fast"))
    for target, report in zip(targets, together, strict=True):
        alone = convert(source, tmp_path / f"alone{target.suffix}", target.recipe, target_size=nbytes / GIB,
                        effort="fast", overwrite=True)  # fmt: skip
        assert alone.path.read_bytes() == report.path.read_bytes()
        assert report.nbytes <= nbytes


def test_names_in_a_folder(source, tmp_path):
    targets = list_targets(source, tmp_path, ["Q4_K_M", "Q8_0", "W4A8", "INT8"], 1.5)[source]
    names = [target.destination.name for target in targets]
    assert names == ["wan-1.5GiB.gguf", "wan-W4A8-1.5GiB.safetensors", "wan-INT8-1.5GiB.safetensors"]


def test_values_that_are_not_finite_are_refused(source, tmp_path):
    state = load_file(source)
    state["blocks.3.ffn.0.weight"][5, 5] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    nbytes = between(source, "W4A8", "INT8")
    with pytest.raises(QuantError, match=r"blocks\.3\.ffn\.0\.weight: holds NaN"):
        sized(tmp_path / "nan.safetensors", tmp_path, "W4A8", nbytes)
    assert not (tmp_path / "sized.safetensors").exists()


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Relative errors per token that were measured with kitchen's own code.
OF_INPUTS = {"FP8": 0.0265, "MXFP8": 0.0265, "NVFP4": 0.095, "INT4": 0.160}
OF_INPUTS |= dict.fromkeys(("INT8", "W4A8", "W4A8_G32", "W6A8"), 0.0088)


@pytest.mark.parametrize("name", OF_INPUTS)
def test_errors_of_inputs(name):
    inputs = normal(64, 2048)
    error = (rounded_inputs(NATIVE[name], inputs) - inputs).norm() / inputs.norm()
    assert error == pytest.approx(OF_INPUTS[name], rel=0.06)
    found = input_error(LayerType(NATIVE[name], (16, 2048)), normal(16, 2048), None)
    assert found**0.5 == pytest.approx(OF_INPUTS[name], rel=0.1)


def test_the_error_is_that_of_a_product_with_rounded_inputs():
    """The sum of both errors predicts the measured error of the product."""
    weight, inputs = normal(64, 1024), normal(512, 1024, seed=2)
    for name, native in NATIVE.items():
        layer = LayerType(native, (64, 1024))
        decoded = layer.dequantize(layer.quantize(weight))
        outputs = inputs @ weight.T
        error = rounded_inputs(native, inputs) @ decoded.T - outputs
        measured = float(error.square().sum() / outputs.square().sum())
        predicted = relative_error(layer, weight, None, "best") + input_error(layer, weight, None)
        assert predicted == pytest.approx(measured, rel=0.1), name


def test_types_of_gguf_take_inputs_as_they_are():
    assert input_error(QTYPES["Q4_K"], normal(16, 256), None) == 0


def test_four_bit_inputs_cost_more_than_eight_bit_ones():
    """INT4 would be little worse than W4A8 of groups of 32 by its weights alone."""
    weight = normal(16, 1024)
    of_int4, of_w4a8 = (input_error(LayerType(NATIVE[name], (16, 1024)), weight, None) for name in ("INT4", "W4A8"))
    assert of_int4 > 100 * of_w4a8


def test_importance_weights_the_inputs():
    """Channels without inputs cost nothing, and one large channel costs NVFP4 the precision of the others."""
    weight, importance = normal(16, 1024), torch.ones(1024)
    importance[0] = 1e6
    layer = LayerType(NATIVE["INT8"], (16, 1024))
    assert input_error(layer, weight, importance) != input_error(layer, weight, None)
    scaled = input_error(layer, weight, importance * 1e-8)
    assert scaled == pytest.approx(input_error(layer, weight, importance), rel=1e-3)
    assert input_error(layer, weight, torch.zeros(1024)) == 0
    assert input_error(layer, torch.zeros(16, 1024), None) == 0
