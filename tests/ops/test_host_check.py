"""An incompatible ComfyUI: found at start and before the first load, and reported in one sentence."""

from __future__ import annotations

import sys

import comfy.ops
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from wanquant.ops import host_check
from wanquant.ops.host_check import check_host, incompatibilities
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError, convert


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Restore the state of a process that has loaded nothing yet, in a host of version 9.9.0."""
    monkeypatch.setattr(host_check, "host_version", lambda: "9.9.0")
    check_host.cache_clear()
    yield
    check_host.cache_clear()


def test_this_host_is_compatible():
    assert incompatibilities() == []
    check_host()


def without_compute_dtype(s, input=None, offloadable=False):
    raise AssertionError("never called")


CHANGES = {
    "gone": ("uncast_bias_weight", None, r"there is no comfy\.ops\.uncast_bias_weight"),
    "argument": (
        "cast_bias_weight",
        without_compute_dtype,
        r"cast_bias_weight takes other arguments \(.*compute_dtype",
    ),
    "more arguments": ("run_every_op", lambda options: None, "run_every_op takes other arguments"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_call_is_found_without_a_call(change, monkeypatch, t2v, tmp_path):
    name, changed, problem = CHANGES[change]
    if changed is None:
        monkeypatch.delattr(comfy.ops, name)
    else:
        monkeypatch.setattr(comfy.ops, name, changed)
    assert len(incompatibilities()) == 1
    refusal = (
        rf"^ComfyUI 9\.9\.0 is not compatible with this WanQuant: .*{problem}.*;"
        " GGUF models do not load, but Convert.*update"
    )
    with pytest.raises(QuantError, match=refusal):
        load_diffusion_model(t2v[1])
    assert convert(t2v[0], tmp_path / "a.gguf", "Q8_0", effort="fast").nbytes


def test_changed_result_is_found_by_a_tiny_layer(monkeypatch, t2v):
    cast = comfy.ops.cast_bias_weight

    def transposed(*args, **kwargs):
        weight, bias, handle = cast(*args, **kwargs)
        return weight.dequantize().t().contiguous(), bias, handle

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", transposed)
    assert incompatibilities() == []
    with pytest.raises(QuantError, match="the products with a packed weight differ from those of the same dense"):
        load_diffusion_model(t2v[1])


def test_failing_layer_is_told_with_its_error(monkeypatch, t2v):
    def fail(*args, **kwargs):
        raise TypeError("unexpected keyword argument 'input_act'\nand more")

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", fail)
    with pytest.raises(
        QuantError, match=r"a packed layer fails \(TypeError: unexpected keyword argument 'input_act'\);"
    ):
        load_diffusion_model(t2v[1])


def test_checked_once_a_process(monkeypatch, t2v):
    load_diffusion_model(t2v[1])
    monkeypatch.setattr(host_check, "_failures", lambda: ["again"])
    load_diffusion_model(t2v[1])


def test_start_reads_signatures_only(monkeypatch):
    """The check at start neither imports nor computes anything."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    before = set(sys.modules)
    with Refuse():
        assert incompatibilities() == []
    assert set(sys.modules) == before
