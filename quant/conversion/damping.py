"""What the held-out tokens of a calibration decide: how far its moments are to be trusted, and whether at all.

A calibration of few tokens knows the inputs of a layer badly. Rounding then makes up for errors in directions that
other inputs do not have. More damping, a larger diagonal, lets it make up for less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import one_thread
from ..encoders.rounding import Moments
from ..errors import QuantError
from ..statistics.calibration import SecondMoments

# Fractions of the mean of a span's diagonal that are added to the diagonal. The first, that of GPTQ (arXiv 2210.17323),
# is taken without held-out tokens.
_DAMPINGS = (0.01, 0.001, 0.1, 1.0)
# The most that rounding can leave of the covariances of inputs that never vary, relative to their mean squares.
_ROUNDING = 1e-3
# With fewer, two standard errors say little.
_FEWEST_TOKENS = 8


def damped(second: SecondMoments, held_out: Tensor | None, label: str, squares: Tensor | None = None) -> Moments:
    """Return the moments with the damping that suits the held-out tokens best.

    Args:
        held_out: float32 (tokens, in_features), or None.
        label: the file and the tensor, for the message.
        squares: (in_features,), the mean squares of the inputs, if the moments are covariances.

    Raises:
        QuantError: the moments are not positive definite, as those of inputs are once they are damped.
    """
    # Before anything rounds the factors, which all candidates share.
    scale = (second.blocks.diagonal(dim1=1, dim2=2) + second.factors.square().sum(2)).mean(1)
    usual = _with_damping(second, _DAMPINGS[0], scale)
    if not _is_positive_definite(usual) and second.factors.shape[2]:
        return damped(second.within_spans(), held_out, label, squares)
    if not _is_positive_definite(usual) and squares is not None:
        # Inputs that never vary, as those of the time embedding in a single step, leave rounding errors alone.
        of_spans = squares.view(len(second.blocks), -1).mean(1)
        return damped(_raised(second, _ROUNDING * of_spans), held_out, label)
    if not _is_positive_definite(usual):
        raise QuantError(
            f"{label}: got a matrix that is not positive definite, expected the Gram matrix (X^T X) of the layer's"
            " inputs; collect the calibration again"
        )
    if held_out is None or not len(held_out):
        return usual
    best, least = usual, _expected_error(usual, held_out)
    for damping in _DAMPINGS[1:]:
        moments = _with_damping(second, damping, scale)
        if _is_positive_definite(moments) and (error := _expected_error(moments, held_out)) < least:
            best, least = moments, error
    return best


@one_thread()
def is_clearly_less(error: Tensor, than: Tensor, tokens: Tensor) -> bool:
    """Return whether an error of a weight does less to the outputs than another one, beyond chance.

    That is so if the mean difference over the tokens is above two standard errors. Few tokens cannot show it.

    Args:
        error, than: float32 (rows, in_features).
        tokens: float32 (tokens, in_features).
    """
    if len(tokens) < _FEWEST_TOKENS:
        return False
    ours, theirs = ((each.double() @ tokens.double().mT).square().sum(0) for each in (error, than))
    gains = theirs - ours
    return bool(gains.mean() > 2 * gains.std() / len(gains) ** 0.5)


def _with_damping(second: SecondMoments, damping: float, scale: Tensor) -> Moments:
    """Return the moments, damped by a fraction of the mean of each diagonal, float64 (spans,)."""
    return Moments(*_raised(second, torch.where(scale > 0, damping * scale, 1.0)))


def _raised(second: SecondMoments, by: Tensor) -> SecondMoments:
    """Return the moments with larger diagonals, by as much as `by` says for each span."""
    blocks = second.blocks.clone()
    blocks.diagonal(dim1=1, dim2=2).add_(by[:, None])
    return second._replace(blocks=blocks)


def _is_positive_definite(moments: Moments) -> bool:
    _, failed = torch.linalg.cholesky_ex(moments.blocks)
    return not failed.any()


def _expected_error(moments: Moments, tokens: Tensor) -> float:
    """Return the error of the outputs if each channel is rounded with an error of size 1 and random sign.

    Args:
        tokens: float32 (tokens, in_features).
    """
    error = 0.0
    for turn in moments.turns:
        feedback = turn.moments.feedback
        spread = feedback / feedback.diagonal(dim1=1, dim2=2)[:, :, None]
        inputs = tokens.view(len(tokens), len(moments.blocks), -1)[:, turn.spans].double()
        error += float(torch.einsum("tni,nji->tnj", inputs, spread).square().sum())
    return error
