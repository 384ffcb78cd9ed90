"""The encoder of each IQ type: its sub-blocks, its groups, its integers, and how many scales its search tries."""

from __future__ import annotations

from ...formats import iquants
from .grid_candidates import EIGHT_AT_ONCE, FOUR_AT_ONCE, GridSearch, TriedScales
from .grid_encoder import GridEncoder
from .levels import OddIntegers


def _search(tried: TriedScales, anchor: float, largest: int = 31) -> GridSearch:
    return GridSearch(OddIntegers(1, largest), tried, anchor)


best_iq3_s = GridEncoder("IQ3_S", 32, 4, _search(FOUR_AT_ONCE, 10.6), iquants.pack_iq3_s)
best_iq3_xxs = GridEncoder("IQ3_XXS", 32, 8, _search(FOUR_AT_ONCE, 43.5), iquants.pack_iq3_xxs, even_signs=True)
best_iq2_s = GridEncoder("IQ2_S", 16, 8, _search(EIGHT_AT_ONCE, 36.8), iquants.pack_iq2_s)
best_iq2_xs = GridEncoder("IQ2_XS", 16, 8, _search(EIGHT_AT_ONCE, 36.2), iquants.pack_iq2_xs, even_signs=True)
best_iq2_xxs = GridEncoder("IQ2_XXS", 32, 8, _search(EIGHT_AT_ONCE, 37.4), iquants.pack_iq2_xxs, even_signs=True)
_IQ1 = _search(EIGHT_AT_ONCE, 0.9, 15)
best_iq1_m = GridEncoder("IQ1_M", 16, 8, _IQ1, iquants.pack_iq1_m, group_offsets=(0.125, -0.125))
best_iq1_s = GridEncoder("IQ1_S", 32, 8, _IQ1, iquants.pack_iq1_s, offsets=(0.125, -0.125))
