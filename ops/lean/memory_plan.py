"""How finely a block's work is cut."""

from __future__ import annotations

from dataclasses import dataclass

from ...quant import QuantError


@dataclass(frozen=True)
class MemoryPlan:
    """Finer cuts take less memory and more time; the result is the same."""

    head_groups: int
    """Self-attention runs over this many groups of heads, one after the other; must divide the number of heads."""
    token_chunk: int
    """Tokens that pass through the projections, the cross-attention and the FFN at a time."""
    recomputed_groups: int = 0
    """Groups whose keys are not kept from the pass that measures their RMS norm (over all heads), but computed again:
    each saves tokens x dim / head_groups elements and costs 2 x tokens x dim^2 / head_groups multiplications and
    additions a block. Less than head_groups: the first group's keys are kept at no cost."""

    def __post_init__(self) -> None:
        if self.head_groups < 1 or self.token_chunk < 1 or not 0 <= self.recomputed_groups < self.head_groups:
            raise QuantError(
                f"{self}: expected at least 1 head group and 1 token a chunk, and fewer recomputed than head groups"
            )

    def check(self, num_heads: int) -> None:
        """Raise QuantError if the heads cannot be split so."""
        if num_heads % self.head_groups:
            raise QuantError(f"{self}: {num_heads} heads cannot be split into {self.head_groups} equal groups")
