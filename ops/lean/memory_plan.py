"""A memory plan: into how many pieces a forward is cut."""

from __future__ import annotations

from dataclasses import dataclass

from ...quant import QuantError


@dataclass(frozen=True)
class MemoryPlan:
    """How lean blocks are cut.

    Smaller pieces need less memory and more time. The result is the same but for rounding.
    """

    head_groups: int
    """Self-attention runs on this many groups of heads, one after the other. It must divide the number of heads."""
    token_chunk: int
    """The number of tokens that the projections of the self-attention process at a time."""
    recomputed_groups: int = 0
    """The number of head groups whose keys are computed twice: once for the RMS norm, and again for their attention.

    The RMS norm is over all heads, so all keys are computed before any can be used. Per block, each recomputed group
    saves tokens * dim / head_groups elements and costs 2 * tokens * dim^2 / head_groups floating-point operations. The
    first group is used right after the norm, so recomputing its keys would save nothing: this is less than head_groups.
    """
    wide_chunk: int = 0
    """The number of tokens that everything else processes at a time, while no keys are held; 0 stands for token_chunk.

    This is the output projection of the self-attention, the cross-attention, the FFN, and what models add to them.
    """

    def __post_init__(self) -> None:
        has_sizes = self.head_groups >= 1 and self.token_chunk >= 1 and self.wide_chunk >= 0
        if not (has_sizes and 0 <= self.recomputed_groups < self.head_groups):
            raise QuantError(
                f"{self}: expected head_groups >= 1, token_chunk >= 1, wide_chunk >= 0 and"
                " 0 <= recomputed_groups < head_groups; change the plan"
            )

    @property
    def chunk_without_keys(self) -> int:
        """The number of tokens at a time where no keys are held."""
        return self.wide_chunk or self.token_chunk

    def check(self, num_heads: int) -> None:
        """Raise QuantError if the groups do not divide `num_heads`."""
        if num_heads % self.head_groups:
            raise QuantError(
                f"{self}: {num_heads} heads cannot be split into {self.head_groups} equal groups;"
                " choose a divisor as head_groups"
            )
