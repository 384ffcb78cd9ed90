"""Recovery LoRAs: the approximation against the exact one, the choice of ranks, and the file."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.__main__ import main
from wanquant.quant.recovery.low_rank import LowRankCorrection, choose_ranks, low_rank_approximation
from wanquant.quant.recovery.recovery_lora import recover
from wanquant.quant.statistics.importance import Importance
from wanquant.quant.statistics.importance_file import write_importance
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.quant.renamed_gguf import renamed_gguf

SIZE = 1e-4
NAME = "blocks.0.ffn.0.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("recovery") / "wan.safetensors", layers=1, ffn_dim=512)


@pytest.fixture(scope="module")
def gguf(source):
    return convert(source, source.with_suffix(".gguf"), "Q2_K", effort="fast").path


@pytest.fixture(scope="module")
def importance(source):
    """An importance matrix that is a hundred times larger for the first 16 input channels."""
    sums = {name: torch.ones(t.shape[1]) for name, t in load_file(source).items() if t.ndim == 2 and "blocks" in name}
    for values in sums.values():
        values[:16] = 100
    return Importance(sums, dict.fromkeys(sums, 1.0), 1, "i.gguf")


def test_a_gguf_under_other_names_gets_the_same_lora(source, gguf, tmp_path):
    prefixed = renamed_gguf(tmp_path / "a.gguf", gguf, lambda name: f"model.diffusion_model.{name}")
    loras = [recover(path, source, tmp_path / f"{path.stem}.safetensors", SIZE) for path in (gguf, prefixed)]
    ours, theirs = (load_file(lora.path) for lora in loras)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_approximation_is_almost_as_good_as_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(96, 160, generator=generator)
    importance = torch.rand(160, generator=generator)
    up, down, removed = low_rank_approximation(error, importance, 12)
    exact = torch.linalg.svdvals(error * importance.sqrt())[:12].square().sum()
    left = ((error - up @ down).square() * importance).sum()
    total = (error.square() * importance).sum()
    torch.testing.assert_close(total - left, removed.sum(), rtol=1e-4, atol=0)
    assert 0.97 * exact < removed.sum() <= 1.0001 * exact
    assert removed.tolist() == sorted(removed.tolist(), reverse=True)


def test_error_of_low_rank_is_found_exactly_where_the_importance_is_not_zero():
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(64, 3, generator=generator) @ torch.randn(3, 80, generator=generator)
    importance = torch.ones(80)
    importance[:20] = 0
    up, down, _ = low_rank_approximation(error, importance, 3)
    assert down.isfinite().all()
    torch.testing.assert_close((up @ down)[:, 20:], error[:, 20:], rtol=1e-3, atol=1e-4)


def test_ranks_remove_the_most_error_within_the_bytes():
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 24), (16, 16), (40, 8))
    errors = [torch.randn(shape, generator=generator) * (1 + index) for index, shape in enumerate(shapes)]
    corrections = [LowRankCorrection.of(str(i), error, torch.ones(error.shape[1]), 8) for i, error in enumerate(errors)]
    nbytes = 10 * 2 * 32  # all ranks of the first two have the same size, so that the greedy choice is optimal
    chosen = choose_ranks(corrections[:2], nbytes)
    best = max(
        sum(each.removed[:rank].sum().item() for each, rank in zip(corrections, ranks, strict=False))
        for ranks in itertools.product(range(9), repeat=2)
        if sum(ranks) <= 10
    )
    assert sum(each.removed.sum().item() for each in chosen) == pytest.approx(best)
    assert sum(each.rank * each.rank_bytes for each in choose_ranks(corrections, 999)) <= 999
    streamed = []
    for correction in corrections:
        streamed = choose_ranks([*streamed, correction], 999)
    assert [each.rank for each in streamed] == [each.rank for each in choose_ranks(corrections, 999)]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_file_removes_the_error_that_the_report_says(source, gguf, importance, tmp_path, weighted):
    chosen = importance if weighted else None
    recovery = recover(gguf, source, tmp_path / "a.safetensors", SIZE, importance=chosen)
    assert recovery.path.stat().st_size == recovery.nbytes <= SIZE * 2**30
    assert recovery.nbytes > 0.9 * SIZE * 2**30
    assert 0.05 < recovery.share < 0.9
    lora, state = load_file(recovery.path), load_file(source)
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    for layer in recovery.layers:
        key = f"diffusion_model.{layer.name.removesuffix('.weight')}"
        error = state[layer.name].float() - open_gguf(gguf).tensors[layer.name].dequantize()
        if layer.rank:
            error -= lora[f"{key}.lora_B.weight"].float() @ lora[f"{key}.lora_A.weight"].float()
        weights = chosen[layer.name] if chosen else torch.ones(error.shape[1])
        assert (error.square() * weights).sum().item() == pytest.approx(layer.remaining, rel=1e-2)
    assert len(lora) == 2 * sum(layer.rank > 0 for layer in recovery.layers)
    with safe_open(recovery.path, "pt") as file:
        assert file.metadata()["wanquant.recovers"] == "wan.gguf"


def test_important_layers_get_more_ranks(source, gguf, importance, tmp_path):
    scaled = {NAME: importance[NAME] * 1000}
    recovery = recover(gguf, source, tmp_path / "a.safetensors", SIZE, importance=scaled)
    ranks = {layer.name: layer.rank for layer in recovery.layers}
    assert ranks[NAME] == max(ranks.values())
    assert recovery.warnings == ("the importance matrix lacks 9 matrices, the first is blocks.0.self_attn.q.weight",)


def test_interruption_leaves_no_file(source, gguf, tmp_path):
    def progress(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(gguf, source, tmp_path / "a.safetensors", SIZE, progress=progress)
    assert list(tmp_path.iterdir()) == []


def other(source, tmp_path, change):
    path = tmp_path / "other.safetensors"
    save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(source).items()}, path)
    return path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _, t: t[:, :128] if t.ndim == 2 else t, r"tensor blocks\.0.*: shape .*, expected .* as in the source"),
        (lambda _, t: t.roll(7, 0), r"tensor blocks\.0.*: does not resemble the source's tensor"),
        (lambda n, t: t * torch.nan if n == NAME else t, r"tensor blocks\.0\.ffn\.0\.weight: does not resemble .* NaN"),
    ],
    ids=["shape", "weights", "nan"],
)
def test_another_model_is_refused(source, gguf, tmp_path, change, problem):
    with pytest.raises(QuantError, match=problem):
        recover(gguf, other(source, tmp_path, change), tmp_path / "a.safetensors", SIZE)
    assert not (tmp_path / "a.safetensors").exists()


def test_unusable_input_is_refused(source, gguf, importance, tmp_path):
    destination = tmp_path / "a.safetensors"
    dense = convert(source, tmp_path / "bf16.gguf", "BF16").path
    with pytest.raises(QuantError, match="not a quantized Wan model"):
        recover(dense, source, destination, SIZE)
    with pytest.raises(QuantError, match="too small for rank 1"):
        recover(gguf, source, destination, 1e-6)
    with pytest.raises(QuantError, match=r"not a \.safetensors name"):
        recover(gguf, source, tmp_path / "a.gguf", SIZE)
    with pytest.raises(QuantError, match="exists already"):
        recover(gguf, source, source, SIZE)
    with pytest.raises(QuantError, match="not in this model"):
        recover(gguf, source, destination, SIZE, importance={"a.weight": torch.ones(4)})
    assert not destination.exists()


def test_command_line(source, gguf, importance, tmp_path, capsys):
    matrix = write_importance(tmp_path / "i.gguf", importance)
    arguments = ["recover", str(gguf), str(source), str(tmp_path / "a.safetensors"), "--size", str(SIZE)]
    assert main(arguments) == 0
    assert "of the squared error of their outputs" in capsys.readouterr().out
    assert main([*arguments, "--imatrix", str(matrix), "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nbytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
