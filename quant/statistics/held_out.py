"""Tokens that are held out from the sums of a calibration, so that roundings can be tried on inputs it never saw."""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS = 64
"""The most tokens that are kept of one layer."""
# One of this many distinct tokens may be held out.
_SHARE = 8
# A token is rare if a call has it at most this many times as often as its average distinct token.
_RARE = 2
# Channels that tell tokens apart.
_COMPARED = 64
_MULTIPLIER = 0x2545F4914F6CDD1D


class HeldOut:
    """The held-out tokens of one layer.

    A token is chosen by its values: those with the least hashes are kept. A token that comes again, such as a word of
    the prompt in every step, therefore never is both held out and added. A token that makes up much of a call, such as
    padding, is never held out. So any number of calls keeps a fair sample of the distinct tokens.
    """

    def __init__(self, in_features: int) -> None:
        self._hashes = torch.zeros(0, dtype=torch.int64)
        self.tokens = torch.zeros(0, in_features, dtype=torch.bfloat16)
        """bfloat16 (tokens, in_features)."""

    def choose(self, tokens: Tensor) -> Tensor:
        """Choose the tokens of one call that are held out, and keep them.

        Args:
            tokens: floating point, (tokens, in_features).

        Returns:
            bool (tokens,), on the same device.
        """
        hashes = _hashes(tokens)
        values, counts = torch.unique(hashes, return_counts=True)
        is_rare = counts * len(values) <= _RARE * len(hashes)
        chosen = values[is_rare & (values % _SHARE == 0)]
        # A call of few tokens must leave some to the sums.
        kept = self._hashes if len(chosen) == len(values) else torch.unique(torch.cat([self._hashes, chosen]))[:TOKENS]
        held_out = torch.isin(hashes, kept)
        new = torch.isin(kept, self._hashes, invert=True)
        first = (hashes == kept[new][:, None]).long().argmax(1)
        rows = tokens[first.to(tokens.device)].to("cpu", torch.bfloat16)
        known = torch.isin(self._hashes, kept)
        self.tokens = torch.cat([self.tokens[known], rows])
        self._hashes = torch.cat([self._hashes[known], kept[new]])
        return held_out.to(tokens.device)


def _hashes(tokens: Tensor) -> Tensor:
    """Return a hash of each token, int64 from 0 to 2**40, on the CPU."""
    compared = tokens[:, :: max(1, tokens.shape[1] // _COMPARED)].float().cpu()
    hashes = torch.zeros(len(compared), dtype=torch.int64)
    for column in compared.view(torch.int32).long().unbind(1):
        hashes = (hashes ^ column).mul_(_MULTIPLIER)
        hashes ^= hashes >> 29
    return hashes >> 23 & (1 << 40) - 1
