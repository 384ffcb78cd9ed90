"""Moments with factors: the turns of the spans against plain linear algebra on the whole matrix."""

from __future__ import annotations

import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.encoders.rounding import BEST, Moments, round_for_outputs

ROWS, SPAN = 24, 256


@pytest.fixture(scope="module")
def moments():
    """Moments of 5 spans that have much in common."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(5, SPAN, 40, generator=generator, dtype=torch.float64)
    blocks = blocks @ blocks.mT / 40 + 0.1 * torch.eye(SPAN)
    return Moments(blocks, torch.randn(5, SPAN, 8, generator=generator, dtype=torch.float64))


def whole(moments):
    """Return H, float64 (channels, channels)."""
    factors = moments.factors.flatten(0, 1)
    return torch.block_diag(*moments.blocks) + factors @ factors.mT


def test_every_span_has_one_turn(moments):
    spans = [index for turn in moments.turns for index in range(turn.spans.start, turn.spans.stop)]
    assert spans == list(range(5))
    assert [len(turn.moments.matrix) for turn in moments.turns] == [3, 1, 1]
    assert len(Moments(moments.blocks, moments.factors[:, :, :0]).turns) == 1


def test_errors_count_as_they_do_once_later_turns_make_up_for_them(moments):
    matrix = whole(moments)
    for turn in moments.turns:
        later = turn.spans.stop * SPAN
        for index, found in zip(range(turn.spans.start, turn.spans.stop), turn.moments.matrix, strict=True):
            own = torch.arange(index * SPAN, (index + 1) * SPAN)
            wanted = matrix[own][:, own]
            if later < len(matrix):
                across = matrix[own, later:]
                wanted = wanted - across @ torch.linalg.solve(matrix[later:, later:], across.mT)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_later_spans_move_to_where_the_error_is_least(moments):
    matrix = whole(moments)
    for turn in moments.turns[1:]:
        done = turn.spans.start * SPAN
        error = torch.randn(done, dtype=torch.float64)
        left = sum(moments.factors[i].mT @ error[i * SPAN : (i + 1) * SPAN] for i in range(turn.spans.start))
        wanted = torch.linalg.solve(matrix[done:, done:], matrix[done:, :done] @ error)
        found = (turn.answer @ left).flatten()
        torch.testing.assert_close(found, wanted[: len(found)], rtol=1e-4, atol=1e-5 * wanted.norm().item())


@pytest.mark.parametrize("name", ["Q2_K", "Q4_0", "IQ3_XXS"])
def test_factors_lower_the_error(name, moments):
    weight = torch.randn(ROWS, 5 * SPAN, generator=torch.Generator().manual_seed(2))
    qtype, matrix = QTYPES[name], whole(moments)
    weights = matrix.diagonal().float().expand_as(weight).contiguous()
    blocks = torch.stack([matrix[i : i + SPAN, i : i + SPAN] for i in range(0, len(matrix), SPAN)])
    within = Moments(blocks, moments.factors[:, :, :0])

    def error(known):
        packed = round_for_outputs(qtype.best, qtype.block_size, weight, weights, known, BEST)
        error = (qtype.dequantize(packed) - weight).double()
        return ((error @ matrix) * error).sum()

    assert error(moments) < 0.9 * error(within)


def test_bytes_depend_on_neither_other_rows_nor_threads(moments):
    weight = torch.randn(ROWS, 5 * SPAN, generator=torch.Generator().manual_seed(2))
    qtype, threads = QTYPES["Q3_K"], torch.get_num_threads()

    def rounded(rows):
        return round_for_outputs(qtype.best, qtype.block_size, rows, torch.ones_like(rows), moments, BEST)

    together = rounded(weight)
    try:
        torch.set_num_threads(3 - min(threads, 2))
        parts = [rounded(part) for part in weight.split([1, 16, 7])]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(parts), together)
