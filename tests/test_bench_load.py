"""The pack must not slow down ComfyUI's start; `dev.py bench load` measures its time there, and whole files."""

from __future__ import annotations

import pytest

from wanquant.bench.load import late_modules, start_up, write_model
from wanquant.quant import open_gguf
from wanquant.quant.plan.recipe import RECIPES
from wanquant.quant.plan.wan_files import tensor_specs
from wanquant.quant.plan.wan_shapes import WanSize
from wanquant.testing.hosts import checkout

FEW = 8
"""Limit of the modules besides the pack's own that ComfyUI has not imported itself."""


def test_start_loads_nothing_large_and_little_else() -> None:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    modules = start_up()["modules"]
    assert not late_modules(modules)
    assert len([name for name in modules if name.partition(".")[0] != "pack"]) <= FEW


def test_writes_a_file_of_the_predicted_size_in_any_recipe(tmp_path) -> None:
    specs = tensor_specs(WanSize(256, 512, 1), RECIPES["IQ1_M"])
    file = write_model(tmp_path / "a.gguf", specs)
    tensors = open_gguf(file).tensors
    assert {name: (tensor.qtype, tensor.shape) for name, tensor in tensors.items()} == {
        spec.name: (spec.qtype, spec.shape) for spec in specs
    }
    assert sum(tensor.data.numel() for tensor in tensors.values()) == sum(spec.nbytes for spec in specs)
    assert tensors["blocks.0.ffn.0.weight"].dequantize().unique(dim=0).shape == (1, 256)
