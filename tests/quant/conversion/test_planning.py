"""Fallbacks to types that differ from the recipe, also in the report of a reused file."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from wanquant.quant import QTYPES
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.reader import open_gguf
from wanquant.testing.tiny_wan import completed


def test_values_beyond_f16_become_bf16(tmp_path):
    weight = torch.randn(64, 256)
    weight[3, 3] = 1e6
    save_file(completed({"head.head.weight": weight}), tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "F16")
    assert [(f.name, f.got, f.reason) for f in report.fallbacks] == [
        ("head.head.weight", "BF16", "values beyond the range of F16")
    ]
    assert open_gguf(tmp_path / "a.gguf").tensors["head.head.weight"].qtype is QTYPES["BF16"]
    again = convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", "F16")
    assert again.reused and again.fallbacks == report.fallbacks


def test_report_of_a_reused_file_lists_the_fallbacks(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(completed({"blocks.0.ffn.0.weight": torch.randn(64, 96)}), source)
    first, again = (convert(source, tmp_path / "a.gguf", "Q4_K_M", effort="fast") for _ in range(2))
    assert again.reused and [f.name for f in again.fallbacks] == ["blocks.0.ffn.0.weight"]
    assert again.fallbacks == first.fallbacks
