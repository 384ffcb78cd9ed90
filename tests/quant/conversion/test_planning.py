"""Fallbacks to types that differ from the recipe, also in the report of a reused file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.reader import open_gguf
from wanquant.testing.tiny_wan import completed

FFN = "blocks.0.ffn.0.weight"


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


@pytest.mark.parametrize("recipe", ["IQ2_XS", "IQ1_M"])
def test_fast_files_of_the_smallest_types_need_importance(tmp_path, recipe):
    source = tmp_path / "a.safetensors"
    save_file(completed({FFN: torch.randn(64, 256)}), source)
    with pytest.raises(QuantError, match=r"IQ\d\w+: effort fast got no importance.*choose effort best"):
        convert(source, tmp_path / "a.gguf", recipe, effort="fast")
    assert list(tmp_path.iterdir()) == [source]


def test_importance_that_lacks_a_layer_is_refused_before_the_first_tensor(tmp_path):
    source, seen = tmp_path / "a.safetensors", []
    save_file(completed({FFN: torch.randn(64, 256), "blocks.0.ffn.2.weight": torch.randn(64, 256)}), source)
    with pytest.raises(QuantError, match=r"tensor blocks\.0\.ffn\.2\.weight: IQ2_XS: effort fast got no importance"):
        convert(
            source,
            tmp_path / "a.gguf",
            "IQ2_XS",
            effort="fast",
            importance={FFN: torch.ones(256)},
            progress=lambda *done: seen.append(done),
        )
    assert seen == [] and list(tmp_path.iterdir()) == [source]


def test_an_experimental_recipe_says_so(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(completed({FFN: torch.randn(64, 256), "head.head.weight": torch.randn(64, 256)}), source)
    report = convert(source, tmp_path / "a.gguf", "IQ1_M")
    assert any("IQ1_M is experimental" in warning for warning in report.warnings)
    types = {name: tensor.qtype.name for name, tensor in open_gguf(report.path).tensors.items()}
    assert types[FFN] == "IQ1_M" and types["head.head.weight"] == "Q8_0"
    assert not any("experimental" in w for w in convert(source, tmp_path / "b.gguf", "IQ2_XXS").warnings)
