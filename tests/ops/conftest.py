"""What the tests of ops/ share. It makes ComfyUI importable and runs it on the CPU, before a test imports it."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest

from wanquant.testing.host_shims import install
from wanquant.testing.hosts import ROOT

HOST = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI")

if (HOST / "comfy").is_dir():
    install()
    sys.path.insert(0, str(HOST))
    from comfy.cli_args import args

    args.cpu = True
    # ComfyUI imports its `utils` first too: its nodes then add a folder with another `utils` to sys.path.
    import utils.extra_config  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def quick_int8_products():
    """Multiply 8-bit integers by way of float32: the same integers, without torch's plain loops on many CPUs."""
    import torch

    def int_mm(a, b):
        # 1024 products of two int8 add up to at most 2**24, which float32 still holds exactly.
        parts = zip(a.split(1024, 1), b.split(1024), strict=True)
        return sum((x.float() @ y.float()).int() for x, y in parts)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl("_int_mm", int_mm, "CPU")
    yield
    library._destroy()


def pytest_configure(config: pytest.Config) -> None:
    if form := config.getoption("--call-form"):
        from wanquant.tests import newer_host

        newer_host.install(form)


def pytest_pycollect_makemodule():  # runs for this folder's files only
    if not (HOST / "comfy").is_dir():
        pytest.skip(f"no ComfyUI at {HOST}: run `python3 dev.py setup` or set COMFYUI_PATH", allow_module_level=True)


@pytest.fixture(scope="session")
def tiny_wan():
    """Return the functions of testing/tiny_wan.py by name."""
    from wanquant.testing import tiny_wan

    return vars(tiny_wan)


@pytest.fixture(scope="session")
def variant_file(tiny_wan, tmp_path_factory):
    """Return the function that writes the checkpoint of a variant, once, and returns its path."""
    from wanquant.tests.ops.test_variants import write_variant

    folder = tmp_path_factory.mktemp("variants")
    return cache(lambda name: write_variant(name, folder, tiny_wan))


@pytest.fixture(scope="session")
def t2v(tiny_wan, tmp_path_factory):
    """Return the paths of a two-layer Wan 2.1 T2V, as safetensors and as Q8_0 GGUF."""
    from wanquant.quant.conversion.convert import convert

    folder = tmp_path_factory.mktemp("t2v")
    source = tiny_wan["write_tiny_wan"](folder / "t2v.safetensors", layers=2, ffn_dim=512)
    return source, convert(source, folder / "t2v.gguf", "Q8_0", effort="fast").path


@pytest.fixture(scope="session")
def state(t2v):
    """Return the tensors of the checkpoint that `t2v` was converted from."""
    from safetensors.torch import load_file

    return load_file(t2v[0])


@pytest.fixture
def model(t2v):
    """Return the patcher of `t2v`, which computes in float32."""
    import torch

    from wanquant.ops.loading.diffusion_model import load_diffusion_model

    return load_diffusion_model(t2v[1], dtype=torch.float32)


@pytest.fixture
def decoded(t2v, model):
    """Return ComfyUI's own dense model with the values of the packed one, so that only the patching differs."""
    import comfy.sd
    import torch

    from wanquant.ops.packed.layout import is_packed

    sd = {
        name.removeprefix("diffusion_model."): t.dequantize() if is_packed(t) else t
        for name, t in model.model.state_dict().items()
        if name.startswith("diffusion_model.")
    }
    return comfy.sd.load_diffusion_model_state_dict(sd, {"dtype": torch.float32})


@pytest.fixture(scope="module")
def short_prompts():
    """Pad prompts for umT5 to 16 tokens instead of 512, which are encoded soon."""
    from comfy.sd1_clip import SDTokenizer

    init = SDTokenizer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SDTokenizer, "__init__", lambda self, *a, **k: init(self, *a, **k | {"min_length": 16}))
        yield


@pytest.fixture(scope="session")
def sqnr():
    def sqnr(reference, value):
        """Return the signal-to-quantization-noise ratio in dB."""
        return (10 * (reference.square().mean() / (value - reference).square().mean()).log10()).item()

    return sqnr


@pytest.fixture(scope="session")
def write_gguf():
    from wanquant.quant import QTYPES
    from wanquant.quant.gguf.layout import TensorSpec
    from wanquant.quant.gguf.writer import GGUFWriter

    def write_gguf(path, state, types, *, prefix="", metadata=None, five_d=False):
        """Write a GGUF and return its path; `types(name, tensor)` is the name of the type of a tensor."""
        specs = [TensorSpec(prefix + n, QTYPES[types(n, t)], tuple(t.shape)) for n, t in state.items()]
        with GGUFWriter(path, {"general.architecture": "wan"} | (metadata or {}), specs, five_d=five_d) as writer:
            for spec, tensor in zip(specs, state.values(), strict=True):
                writer.write(spec.name, spec.qtype.quantize(tensor.float(), effort="fast"))
        return path

    return write_gguf
