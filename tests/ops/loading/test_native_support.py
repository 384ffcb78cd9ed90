"""What this host can use of ComfyUI's own formats, and what is said of the rest."""

from __future__ import annotations

import comfy.quant_ops
import pytest

from wanquant.ops.host_version import host_version
from wanquant.ops.loading import native_support
from wanquant.ops.loading.native_model import load_native_model
from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.native.registry import NATIVE
from wanquant.quant.safetensors.header import read_native_header

LEVELS = "asym_w4a8_int8"


@pytest.fixture(autouse=True)
def forgotten():
    """The answer of a host is remembered; these tests are several hosts."""
    native_support._has_six_bits.cache_clear()
    yield
    native_support._has_six_bits.cache_clear()


@pytest.fixture(scope="module")
def native(t2v, tmp_path_factory):
    """Return the function that converts the checkpoint to a native recipe, and returns the path."""
    folder = tmp_path_factory.mktemp("native")
    return lambda name: convert(t2v[0], folder / f"{name}.safetensors", name, effort="fast").path


def be_a_host(monkeypatch, layouts):
    """Make the host one that has these layouts, by their formats."""
    algorithms = {name: {"comfy_tensor_layout": name} for name in layouts}
    monkeypatch.setattr(comfy.quant_ops, "QUANT_ALGOS", algorithms)
    monkeypatch.setattr(comfy.quant_ops, "get_layout_class", layouts.__getitem__)


class FourBits:
    """The layout of comfy-kitchen before 0.2.36."""

    class Params:
        def __init__(self, **_):
            pass

    @staticmethod
    def dequantize(codes, params):
        raise ValueError("K=384 must be divisible by 16")


class SixBits(FourBits):
    @staticmethod
    def dequantize(codes, params):
        return codes


def test_this_host_uses_exactly_the_formats_that_it_knows():
    lacking = set(native_support.lacking())
    missing = {name for name in NATIVE if NATIVE[name].config["format"] not in comfy.quant_ops.QUANT_ALGOS}
    assert missing <= lacking <= missing | {"W6A8"}
    release = tuple(map(int, host_version().split(".")[:2]))
    # A newer comfy-kitchen may bring 6 bits to an older ComfyUI, and it alone brings MXFP8.
    for name in lacking - {"MXFP8"}:
        assert release < tuple(map(int, native_support.SINCE[name].split(".")))


def test_every_format_that_is_missing_names_the_version(native, monkeypatch):
    be_a_host(monkeypatch, {})
    assert native_support.lacking() == list(NATIVE)
    for name, since in native_support.SINCE.items():
        sentence = rf"{name} \({NATIVE[name].config['format']}\) does not load in this ComfyUI {host_version()};"
        with pytest.raises(
            QuantError, match=rf"{name}\.safetensors: {sentence} update ComfyUI to {since} or newer, or"
        ):
            load_native_model(native(name))


def test_six_bits_that_would_fail_while_sampling_are_refused(native, monkeypatch):
    be_a_host(monkeypatch, {LEVELS: FourBits})
    assert "W4A8" not in native_support.lacking() and "W6A8" in native_support.lacking()
    assert native_support.problems(read_native_header(native("W4A8"))) == []
    with pytest.raises(QuantError, match=r"W6A8 .* then fails at its first use; update ComfyUI to 0\.38 or newer, or"):
        load_native_model(native("W6A8"))


def test_six_bits_of_a_newer_kitchen_are_taken(native, monkeypatch):
    be_a_host(monkeypatch, {LEVELS: SixBits})
    assert native_support.problems(read_native_header(native("W6A8"))) == []


def test_the_layout_of_kitchen_tells_itself(monkeypatch):
    layouts = pytest.importorskip("comfy_kitchen.tensor")
    if not hasattr(layouts, "AsymW4A8Int8Layout"):
        pytest.skip("this comfy-kitchen has no W4A8")
    be_a_host(monkeypatch, {LEVELS: layouts.AsymW4A8Int8Layout})
    assert native_support.problem("W6A8") is None


def test_a_layout_whose_class_is_missing_counts_as_missing(monkeypatch):
    """Without comfy-kitchen, the host lists formats and has no classes for them."""
    monkeypatch.setattr(comfy.quant_ops, "QUANT_ALGOS", {LEVELS: {"comfy_tensor_layout": "AsymW4A8Int8Layout"}})
    monkeypatch.setattr(comfy.quant_ops, "get_layout_class", lambda name: None)
    assert "W4A8" in native_support.lacking()


def test_a_format_without_a_recipe_is_named(native, monkeypatch):
    header = read_native_header(native("FP8"))
    unknown = type(header)(**{**vars(header), "formats": header.formats | {"awq_w4a16"}})
    (problem,) = native_support.problems(unknown)
    assert problem == f"awq_w4a16 does not load in this ComfyUI {host_version()}; update ComfyUI"
