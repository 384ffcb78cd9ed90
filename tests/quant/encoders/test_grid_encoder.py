"""The encoders of IQ types: goals of their error, and the rounding of groups that calibrated rounding calls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from wanquant.quant import QTYPES
from wanquant.quant.encoders.search import GridEncoder
from wanquant.quant.encoders.search.grid import look_up
from wanquant.quant.encoders.search.levels import Integers, OddIntegers
from wanquant.quant.encoders.search.sub_blocks import SubBlocks
from wanquant.quant.formats.iquants import grid_entries
from wanquant.testing.libggml import LibGGML

ENCODERS = {name: qtype.best for name, qtype in QTYPES.items() if isinstance(qtype.best, GridEncoder)}
encoders = pytest.mark.parametrize("name", ENCODERS)


@pytest.mark.parametrize(("kind", "goal"), [("gaussian", 0.95), ("student_t5", 0.92)])
@encoders
def test_squared_error_is_far_below_that_of_ggml(name: str, kind: str, goal: float, libggml: LibGGML) -> None:
    shares = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        draws = rng.standard_normal((64, 512)) if kind == "gaussian" else rng.standard_t(5, (64, 512))
        weight = draws.astype(np.float32) * np.float32(0.02)
        theirs = libggml.dequantize(name, libggml.quantize(name, weight, np.ones(512, np.float32)))
        ours = QTYPES[name].dequantize(QTYPES[name].quantize(torch.from_numpy(weight))).numpy()
        shares.append(float(np.square(ours - weight).sum() / np.square(theirs - weight).sum()))
    assert max(shares) < 1
    assert sum(shares) / 3 < goal


def groups(encoder: GridEncoder, lanes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, float32 (together, lanes), scales and importance that make all levels occur."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(encoder.together, lanes, generator=generator)
    scale = (torch.rand(lanes, generator=generator) + 0.5) * 1.7 / encoder.search.anchor
    return values, scale, torch.rand(values.shape, generator=generator) + 0.1


def triangular(encoder: GridEncoder, n: int) -> Tensor:
    """Return upper triangular factors, float32 (n, together, together)."""
    generator = torch.Generator().manual_seed(9)
    size = encoder.together
    return torch.eye(size) + 0.4 * torch.randn(n, size, size, generator=generator).triu()


def squared(residual: Tensor, factor: Tensor) -> Tensor:
    """Return ||e P||**2 of each lane, for e (together, n * rows) and P (n, together, together)."""
    vectors = residual.view(len(residual), len(factor), -1)
    return torch.einsum("inr,nij->jnr", vectors, factor).square().sum(0).flatten()


def all_levels(encoder: GridEncoder) -> Tensor:
    """Return every vector of levels that a group can get under its first offset, float32 (together, k)."""
    entries = grid_entries(encoder.name, torch.device("cpu")).t()
    offsets = [encoder.offsets[0] + own for own in encoder.group_offsets]
    if entries.min() < 0:
        return torch.cat([entries + offset for offset in offsets], 1)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(entries))))
    if encoder.even_signs:
        signs = signs[signs.prod(1) > 0]
    return (signs.t()[:, :, None] * entries[:, None]).flatten(1)


SINGLE = [name for name in ENCODERS if name != "IQ3_XXS"]  # two entries have too many combinations


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", SINGLE)
def test_nearest_levels_are_those_of_exhaustion(name: str, weighted: bool) -> None:
    encoder = ENCODERS[name]
    values, scale, importance = groups(encoder, 24)
    found = encoder.nearest(values, scale, importance if weighted else None, encoder.offsets[0])
    w, every = importance if weighted else torch.ones_like(values), all_levels(encoder)
    least = [(w[:, lane, None] * (values[:, lane, None] - scale[lane] * every) ** 2).sum(0).min() for lane in range(24)]
    errors = (w * (values - scale * found) ** 2).sum(0)
    torch.testing.assert_close(errors.sum(), torch.stack(least).sum(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", SINGLE)
def test_coupled_levels_are_close_to_those_of_exhaustion(name: str) -> None:
    encoder = ENCODERS[name]
    values, scale, _ = groups(encoder, 24)
    factor, every = triangular(encoder, 2), all_levels(encoder)
    errors = squared(values - scale * encoder.nearest(values, scale, factor, encoder.offsets[0]), factor)
    least = [squared(values[:, lane, None] - scale[lane] * every, factor[lane // 12][None]).min() for lane in range(24)]
    assert errors.sum() < 1.3 * torch.stack(least).sum()


@encoders
def test_coupled_levels_have_less_error_than_those_of_the_diagonal(name: str) -> None:
    encoder = ENCODERS[name]
    values, scale, _ = groups(encoder, 600)
    factor = triangular(encoder, 3)
    diagonal = factor.square().sum(2).t().repeat_interleave(200, 1)
    levels = [encoder.nearest(values, scale, metric, encoder.offsets[0]) for metric in (factor, diagonal)]
    coupled, uncoupled = (squared(values - scale * each, factor) for each in levels)
    assert coupled.sum() < 0.95 * uncoupled.sum()
    if encoder.even_signs:
        assert (levels[0].sign().prod(0) == 1).all()


@encoders
def test_levels_do_not_depend_on_other_lanes_or_threads(name: str) -> None:
    encoder = ENCODERS[name]
    values, scale, importance = groups(encoder, 3 * 1000)
    factor = triangular(encoder, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = [encoder.nearest(values, scale, metric, encoder.offsets[0]) for metric in (factor, importance)]
        torch.set_num_threads(2)
        for expected, metric in zip(whole, (factor, importance), strict=True):
            assert torch.equal(encoder.nearest(values, scale, metric, encoder.offsets[0]), expected)
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(0, 1), slice(5, 12), slice(100, 600)):
        part = values.view(-1, 3, 1000)[:, :, rows].flatten(1), scale.view(3, -1)[:, rows].flatten()
        expected = whole[0].view(-1, 3, 1000)[:, :, rows].flatten(1)
        assert torch.equal(encoder.nearest(*part, factor, encoder.offsets[0]), expected)
        part = values[:, rows], scale[rows], importance[:, rows]
        assert torch.equal(encoder.nearest(*part, encoder.offsets[0]), whole[1][:, rows])


@encoders
def test_fitted_scales_and_any_levels_are_packed_exactly(name: str) -> None:
    encoder = ENCODERS[name]
    blocks = torch.randn(6, 256, generator=torch.Generator().manual_seed(4))
    scales = encoder.fit_scales(SubBlocks.from_blocks(blocks, None, encoder.size), 6)
    assert torch.equal(encoder.search.scales.nearest(scales.scales.clone()), scales.scales)
    effective = scales.effective()[0].repeat_interleave(encoder.size)
    lanes = blocks.view(-1, encoder.together).t(), effective[:: encoder.together].contiguous()
    levels = encoder.nearest(*lanes, None, encoder.offsets[-1]).t().reshape(6, 256)
    packed = encoder.pack_levels(scales, levels)
    assert torch.equal(QTYPES[name].dequantize_blocks(packed), (effective * levels.flatten()).view(6, 256))


def test_odd_integers_round_to_the_nearest() -> None:
    values = torch.tensor([-3.0, 0.0, 1.9, 2.1, 3.0, 8.5, 14.2, 40.0])
    assert OddIntegers(1, 15).nearest(values).tolist() == [1, 1, 1, 3, 3, 9, 15, 15]
    assert (OddIntegers(1, 15).step, Integers(0, 15).step) == (2, 1)


def test_look_up_returns_entries() -> None:
    rows = torch.tensor([[3, 511], [0, 7]])
    entries = grid_entries("IQ3_S", torch.device("cpu"))
    assert torch.equal(look_up("IQ3_S", rows), entries[rows].movedim(2, 0))
