"""The `best` encoders have at most the error of ggml's own, and the searches they consist of find exact scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanquant.quant import QTYPES
from wanquant.quant.encoders.search import GridEncoder
from wanquant.quant.encoders.search.fit import BlockScales
from wanquant.quant.encoders.search.levels import Codebook, Integers
from wanquant.quant.encoders.search.scale import search_scale, search_scale_and_min
from wanquant.quant.encoders.search.sub_blocks import SubBlocks
from wanquant.quant.formats.iq4 import KVALUES
from wanquant.testing.libggml import LibGGML

# Upper bounds of the mean squared error on Gaussian weights without importance, relative to ggml's.
BEST = {
    **{"Q2_K": 0.785, "Q3_K": 0.91, "Q4_K": 0.96, "Q5_K": 0.905, "Q6_K": 0.89},
    **{"IQ4_NL": 0.94, "IQ4_XS": 0.935, "Q4_0": 0.895, "Q4_1": 0.81, "Q5_0": 0.885, "Q5_1": 0.79, "Q8_0": 0.82},
    **{"IQ3_S": 0.9, "IQ3_XXS": 0.95, "IQ2_S": 0.925, "IQ2_XS": 0.91, "IQ2_XXS": 0.915, "IQ1_M": 0.85, "IQ1_S": 0.85},
}
ON_GRIDS = [name for name in BEST if isinstance(QTYPES[name].best, GridEncoder)]
SHAPE = (32, 1024)


def weights(kind: str) -> NDArray[np.float32]:
    """Return weights of a kind, float32 (32, 1024)."""
    rng = np.random.default_rng(7)
    gaussian = rng.standard_normal(SHAPE, np.float32) * np.float32(0.02)
    match kind:
        case "gaussian":
            return gaussian
        case "student_t5":
            return (rng.standard_t(5, SHAPE) * 0.02).astype(np.float32)
        case "zeros":
            return np.zeros(SHAPE, np.float32)
        case "sparse":
            return np.where(rng.random(SHAPE) < 0.95, np.float32(0), gaussian)
        case "outlier columns":
            gaussian[:, ::97] *= 100
            return gaussian
        case "constant rows":
            return np.repeat(rng.standard_normal((32, 1), np.float32), SHAPE[1], 1)
        case "uniform":
            return rng.uniform(-0.05, 0.05, SHAPE).astype(np.float32)
        case "positive":
            return np.abs(gaussian)
        case "far above 0":
            return gaussian + np.float32(1)
        case "far below 0":
            return gaussian - np.float32(0.3)
        case "ramp":
            return np.tile(np.linspace(-1, 1, SHAPE[1], dtype=np.float32), (SHAPE[0], 1))
        case "subnormal scales":
            return gaussian * np.float32(1e-4)
        case "subnormal weights":
            return gaussian * np.float32(1e-38)
    raise ValueError(kind)


def error(
    restored: NDArray[np.float32], weight: NDArray[np.float32], importance: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """Return the mean squared error of each row, weighted by the importance of the input channels."""
    return ((restored.astype(np.float64) - weight) ** 2 * (1 if importance is None else importance)).mean(1)


def errors(
    name: str, weight: NDArray[np.float32], libggml: LibGGML, importance: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the error of each row with our encoder and with ggml's, both dequantized by ggml."""
    ours = QTYPES[name].quantize(torch.from_numpy(weight), None if importance is None else torch.from_numpy(importance))
    if name in ON_GRIDS and importance is None:  # some of ggml's encoders require it, and it serves the others
        importance = np.ones(weight.shape[1], np.float32)
    packed = (ours.numpy(), libggml.quantize(name, weight, importance))
    first, second = (error(libggml.dequantize(name, p), weight, importance) for p in packed)
    return first, second


@pytest.mark.parametrize("kind", ["gaussian", "student_t5"])
@pytest.mark.parametrize("name", BEST)
def test_error_is_below_that_of_ggml(name: str, kind: str, libggml: LibGGML) -> None:
    ours, theirs = (rows.mean() for rows in errors(name, weights(kind), libggml))
    assert ours <= theirs * (BEST[name] if kind == "gaussian" else 1)


@pytest.mark.parametrize("name", BEST)
def test_weighted_error_is_below_that_of_ggml_with_the_same_importance(name: str, libggml: LibGGML) -> None:
    importance = np.random.default_rng(8).chisquare(2, SHAPE[1]).astype(np.float32)
    ours, theirs = errors(name, weights("student_t5"), libggml, importance)
    assert ours.mean() <= theirs.mean()


HARD = ("outlier columns", "constant rows", "uniform", "positive", "far above 0", "far below 0", "ramp")
SPECIAL = ("zeros", "sparse", "subnormal scales", "subnormal weights")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", BEST)
def test_error_on_hard_weights_is_at_most_that_of_ggml(name: str, weighted: bool, libggml: LibGGML) -> None:
    kinds = (*HARD, *SPECIAL)
    importance = np.random.default_rng(8).chisquare(2, SHAPE[1]).astype(np.float32) if weighted else None
    weight = np.concatenate([weights(kind)[:8] for kind in kinds])
    ours, theirs = (rows.reshape(len(kinds), 8).mean(1) for rows in errors(name, weight, libggml, importance))
    assert [kind for kind, worse in zip(kinds, ours > theirs, strict=True) if worse] == []


@pytest.mark.parametrize("name", [name for name in BEST if name not in ON_GRIDS])
def test_search_tries_no_more_scales_for_mostly_zero_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    round_ = BlockScales.round
    monkeypatch.setattr(BlockScales, "round", lambda blocks, *rest: tried.append(blocks) or round_(blocks, *rest))
    counts = []
    for kind in ("gaussian", "sparse"):
        tried.clear()
        QTYPES[name].quantize(torch.from_numpy(weights(kind)))
        counts.append(sum(len(blocks.d) for blocks in tried))
    assert counts[1] <= 1.1 * counts[0]


@pytest.mark.parametrize("name", BEST)
def test_error_with_one_large_weight_among_small_ones_is_at_most_that_of_ggml(name: str, libggml: LibGGML) -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((4, 4, 256), np.float32) * np.float32(0.02)
    for rows, column in zip(weight, rng.integers(256, size=4), strict=True):
        rows[:, column] *= 100
    ours, theirs = (rows.reshape(4, 4).mean(1) for rows in errors(name, weight.reshape(16, 256), libggml))
    assert (ours <= theirs).all()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", BEST)
def test_error_on_constants_is_at_most_that_of_ggml(name: str, weighted: bool, libggml: LibGGML) -> None:
    importance = np.random.default_rng(8).chisquare(2, 256).astype(np.float32) if weighted else None
    values = np.random.default_rng(9).standard_normal((12, 1)).astype(np.float32)
    ours, theirs = errors(name, values.repeat(256, 1), libggml, importance)
    assert values[ours > theirs].tolist() == []


@pytest.mark.parametrize("name", BEST)
def test_constants_are_as_exact_as_a_float16_scale(name: str) -> None:
    values = torch.tensor([1.0, 0.37, -0.5, -3.0])[:, None]
    restored = QTYPES[name].dequantize(QTYPES[name].quantize(values.repeat(1, 256)))
    assert ((restored - values).abs() <= values.abs() * 2**-10).all()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", BEST)
def test_equal_constant_blocks_are_searched_once_and_get_the_same_bytes(
    name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    importance = torch.rand(256, generator=torch.Generator().manual_seed(3)).repeat(2) if weighted else None
    weight = torch.from_numpy(weights("gaussian"))[:4, :512].clone()
    weight[1, :256], weight[1, 256:], weight[2, 256:] = 0.37, -2.5, 0.37
    weight[3] = torch.tensor([0.0, -0.0]).repeat(256)
    seen = []
    cut = SubBlocks.from_blocks
    monkeypatch.setattr(SubBlocks, "from_blocks", lambda blocks, *rest: seen.append(len(blocks)) or cut(blocks, *rest))
    whole = QTYPES[name].quantize(weight, importance)
    per_row = 512 // QTYPES[name].block_size
    assert seen == [per_row + per_row // 2 + 3]
    assert torch.equal(whole, torch.stack([QTYPES[name].quantize(row, importance) for row in weight]))
    assert torch.equal(*whole.view(8, -1)[[2, 5]])


@pytest.mark.parametrize("magnitude", [1e6, 1e30, 3e38])
@pytest.mark.parametrize("name", BEST)
def test_weights_too_large_for_the_type_saturate(name: str, magnitude: float) -> None:
    weight = torch.randn(4, 256).clamp_(-1, 1) * magnitude
    restored = QTYPES[name].dequantize(QTYPES[name].quantize(weight))
    assert restored.isfinite().all()
    assert (restored * weight >= 0).float().mean() > 0.8


@pytest.mark.parametrize("name", BEST)
def test_nan_counts_as_zero(name: str) -> None:
    weight = torch.from_numpy(weights("gaussian"))[:2].clone()
    weight[0, ::7] = 0
    expected = QTYPES[name].quantize(weight)
    weight[0, ::7] = torch.nan
    assert torch.equal(QTYPES[name].quantize(weight), expected)


@pytest.mark.parametrize("name", BEST)
def test_input_channels_of_importance_0_do_not_spoil_the_others(name: str) -> None:
    weight = torch.from_numpy(weights("gaussian"))
    importance = torch.ones(SHAPE[1])
    importance[: SHAPE[1] // 2] = 0
    restored = QTYPES[name].dequantize(QTYPES[name].quantize(weight, importance))
    assert restored.isfinite().all()
    assert (restored - weight).square().mean() < weight.square().mean() / 4


@pytest.mark.parametrize("name", BEST)
def test_equal_importance_gives_the_error_of_none(name: str) -> None:
    weight = torch.from_numpy(weights("gaussian"))[:8]
    qtype = QTYPES[name]
    plain, equal = (qtype.dequantize(qtype.quantize(weight, i)) for i in (None, torch.full((SHAPE[1],), 3.0)))
    errors = [(restored - weight).square().mean() for restored in (plain, equal)]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", BEST)
def test_encoding_is_deterministic(name: str) -> None:
    weight = torch.from_numpy(weights("student_t5"))[:4]
    assert torch.equal(QTYPES[name].quantize(weight), QTYPES[name].quantize(weight))


def many_blocks() -> tuple[Tensor, Tensor]:
    """Return a weight, float32 (21, 2560), large enough that torch uses several threads, and its importance."""
    weight = torch.randn(21, 2560, generator=torch.Generator().manual_seed(1))
    return weight, torch.rand(2560, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", BEST)
def test_bytes_do_not_depend_on_how_rows_are_split(name: str) -> None:
    weight, importance = many_blocks()
    whole = QTYPES[name].quantize(weight, importance)
    for rows in (1, 7):
        parts = [QTYPES[name].quantize(part, importance) for part in weight[: 3 * rows].split(rows)]
        assert torch.equal(whole[: 3 * rows], torch.cat(parts))


# One type of each kind: with mins, with a codebook, with signs, and with offsets. Threads that wait for each other on a
# busy machine take seconds per type.
@pytest.mark.parametrize("name", ["Q2_K", "IQ4_XS", "IQ2_XS", "IQ1_M"])
def test_bytes_do_not_depend_on_threads(name: str) -> None:
    weight, importance = many_blocks()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = QTYPES[name].quantize(weight, importance)
        torch.set_num_threads(2)
        assert torch.equal(alone, QTYPES[name].quantize(weight, importance))
    finally:
        torch.set_num_threads(threads)


def test_codebook_rounds_to_the_nearest_entry() -> None:
    values = torch.arange(-140, 140, 0.03)
    entries = torch.tensor(KVALUES, dtype=torch.float32)
    codebook = Codebook(KVALUES)
    found = codebook.nearest(values.clone())
    assert torch.equal((found - values).abs(), (entries - values[:, None]).abs().amin(1))
    assert torch.equal(codebook.codes(entries), torch.arange(16.0))


@pytest.mark.parametrize("sign", [1, -1])
def test_search_scale_finds_an_exact_scale(sign: int) -> None:
    q = torch.tensor([-8.0, 7, 3, 0, -2, 1, 5, -6])[:, None]
    scale = search_scale(SubBlocks(q * sign * 0.3), Integers(-8, 7), (8, -8), is_stored=False)
    torch.testing.assert_close(scale, torch.tensor([sign * 0.3]))


@pytest.mark.parametrize(("minimum", "signed"), [(1.2, False), (-1.2, True), (0.0, False)])
def test_search_scale_and_min_finds_an_exact_line(minimum: float, signed: bool) -> None:
    q = torch.tensor([0.0, 15, 3, 8])[:, None]
    sub_blocks = SubBlocks(q * 0.3 - minimum, torch.tensor([1.0, 2, 3, 4])[:, None])
    scale, found = search_scale_and_min(sub_blocks, Integers(0, 15), (14, 15), signed=signed)
    torch.testing.assert_close(scale, torch.tensor([0.3]))
    torch.testing.assert_close(found, torch.tensor([minimum]), atol=1e-5, rtol=1e-5)
