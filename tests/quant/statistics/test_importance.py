"""Importance matrices: collecting them, checking them against a model, and conversions that use them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.reader import open_gguf
from wanquant.quant.plan import target_size as budget
from wanquant.quant.plan.recipe import required_precision
from wanquant.quant.plan.target_size import relative_error
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.importance import Collector, Importance, sum_up
from wanquant.testing.tiny_wan import write_tiny_wan

NAME = "blocks.0.ffn.0.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("source") / "wan.safetensors", layers=1, ffn_dim=512)


@pytest.fixture(scope="module")
def importance(source):
    """An importance matrix of the model, a hundred times larger for the first 16 input channels."""
    generator = torch.Generator().manual_seed(0)
    sums = {}
    with open_checkpoint(source) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if required_precision(name, tensor) != "exact":
                sums[name] = torch.rand(tensor.shape[-1], generator=generator) + 0.1
                sums[name][:16] *= 100
    return Importance(sums, dict.fromkeys(sums, 8.0), 2, "wan-importance.gguf", ("a red ball",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 700, 1024), (1024,), (2, 5)])
def test_squares_are_summed_over_all_rows_in_float32(dtype, shape):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = inputs.clone()
    expected = inputs.double().square().reshape(-1, shape[-1]).sum(0).float()
    torch.testing.assert_close(sum_up(inputs)[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(inputs, before)


def test_result_holds_mean_squares_of_all_inputs():
    collector = Collector()
    first, second = torch.randn(2, 3, 8), torch.randn(5, 8)
    collector.add(NAME, first)
    collector.add(NAME, second, weight=0.5)
    collector.samples = 2
    collected = collector.result()
    total = first.square().sum((0, 1)) + 0.5 * second.square().sum(0)
    torch.testing.assert_close(collected[NAME], total / 8.5)
    assert collected.samples == 2
    collector.add(NAME, first)
    torch.testing.assert_close(collected[NAME], total / 8.5), "a result is a copy"


def test_nothing_collected_is_refused():
    with pytest.raises(QuantError, match="nothing collected yet"):
        Collector().result()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_with_their_name(value):
    collector = Collector()
    collector.add("a.weight", torch.ones(2, 4))
    collector.add("b.weight", torch.full((2, 4), value))
    with pytest.raises(QuantError, match=r"b\.weight: its inputs hold NaN or infinity"):
        collector.result()


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("blocks.7.ffn.0.weight", torch.ones(256), r"blocks\.7\.ffn\.0\.weight: not in this model"),
        (NAME, torch.ones(512), r"blocks\.0\.ffn\.0\.weight: has shape \(512,\), expected \(256,\)"),
        (NAME, torch.full((256,), torch.nan), r"blocks\.0\.ffn\.0\.weight: holds NaN"),
        (NAME, torch.full((256,), -1.0), r"blocks\.0\.ffn\.0\.weight: holds .* negative"),
    ],
    ids=["name", "width", "nan", "negative"],
)
def test_importance_of_another_model_is_refused(tmp_path, source, name, values, problem):
    with pytest.raises(QuantError, match=problem):
        convert(source, tmp_path / "a.gguf", "Q4_0", importance={name: values})
    assert list(tmp_path.iterdir()) == []


def test_missing_matrices_are_a_warning(tmp_path, source, importance):
    some = {name: values for name, values in importance.items() if name != NAME}
    report = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast", importance=some)
    assert report.warnings == (f"the importance matrix lacks 1 matrix, the first is {NAME}",)


def weighted_error(path, source, importance):
    state = load_file(source)
    total = 0.0
    for name, tensor in open_gguf(path).tensors.items():
        if name in importance:
            error = (tensor.dequantize() - state[name].float()).square()
            total += (error * importance[name]).sum().item()
    return total


@pytest.mark.parametrize("settings", [{"recipe": "Q4_K_M"}, {"target_size": 0.0035}], ids=["recipe", "size"])
def test_error_moves_to_input_channels_that_matter_less(tmp_path, source, importance, settings, monkeypatch):
    monkeypatch.setattr(budget, "_SAMPLED_ELEMENTS", 1 << 13)
    plain = convert(source, tmp_path / "plain.gguf", **settings)
    weighted = convert(source, tmp_path / "weighted.gguf", **settings, importance=importance)
    assert weighted.nbytes <= plain.nbytes + 1024, "the metadata may be longer"
    errors = [weighted_error(report.path, source, importance) for report in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


def test_metadata_names_the_importance_matrix(tmp_path, source, importance):
    report = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast", importance=importance)
    assert report.metadata["quantize.imatrix.file"] == "wan-importance.gguf"
    assert report.metadata["quantize.imatrix.dataset"] == "a red ball"
    assert report.metadata["quantize.imatrix.entries_count"] == len(importance)
    assert report.metadata["quantize.imatrix.chunks_count"] == 2
    assert convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast", importance=importance).reused
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast")


@pytest.mark.parametrize("effort", ["best", "fast"])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_input_channels_that_are_always_zero_do_not_increase_the_error(name, effort):
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(512)
    importance[:300] = 0
    assert relative_error(QTYPES[name], weight, importance, effort) < 0.1
    assert QTYPES[name].dequantize(QTYPES[name].quantize(weight, importance, effort)).isfinite().all()
