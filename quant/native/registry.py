"""The native formats by the names of their types."""

from __future__ import annotations

from .code_values import Codebook, Integers
from .float8 import FP8, MXFP8
from .levels import LevelsFormat
from .native_format import NativeFormat
from .nvfp4 import NVFP4
from .rotation import GROUP
from .rowwise import INT4, INT8


def w4a8(group: int = 16) -> NativeFormat:
    """Return W4A8 with this many weights per scale."""
    name = "W4A8" if group == 16 else f"W4A8_G{group}"
    best_values = Codebook() if group == 16 else Codebook(_CODEBOOK_OF_32)
    return LevelsFormat(name, 3, _levels_config(group), group, Codebook(), best_values, (), _BEST_STEPS)


def _levels_config(group: int) -> dict[str, object]:
    return {"format": "asym_w4a8_int8", "group_size": group, "convrot_groupsize": GROUP}


# A larger scale than the first may be better, also where the outermost values have no weight left then.
_BEST_STEPS = (-2, -1, 1, 2, 3, 4, 5)
# Lloyd's values for normally distributed weights at the scales that the search chooses for 32 of them. For 16, such
# values gain nothing over kitchen's, and cost its fast kernel for few tokens, which takes groups of 16 alone.
_HALF_OF_32 = (0.0499, 0.1523, 0.2599, 0.373, 0.4925, 0.6238, 0.7813, 1.0)
_CODEBOOK_OF_32 = (*(-value for value in reversed(_HALF_OF_32)), *_HALF_OF_32)
_INT8_CONFIG: dict[str, object] = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
_INT4_CONFIG: dict[str, object] = {"format": "convrot_w4a4", "convrot_groupsize": GROUP, "linear_dtype": "int4"}
# With 4 bits the best scale clips far more than with 8: a normally distributed row at 0.7 of its largest magnitude.
_INT8_COARSE = tuple(1 - 0.02 * step for step in range(1, 11))
_INT4_COARSE = tuple(0.95**step for step in range(1, 23))

NATIVE: dict[str, NativeFormat] = {
    native.name: native
    for native in (
        FP8("FP8", 0, {"format": "float8_e4m3fn"}),
        MXFP8("MXFP8", 0, {"format": "mxfp8"}),
        INT8("INT8", 1, _INT8_CONFIG, 127, 1e-30, _INT8_COARSE, (0.01, 0.005, 0.0025)),
        w4a8(),
        w4a8(32),
        LevelsFormat("W6A8", 2, _levels_config(16), 16, Integers(), Integers(), (-1, 1), _BEST_STEPS),
        NVFP4("NVFP4", 1, {"format": "nvfp4"}),
        INT4("INT4", 1, _INT4_CONFIG, 7, 1e-10 / 7, _INT4_COARSE, (0.02, 0.01, 0.005)),
    )
}

FIRST_HOST = {
    **{"FP8": (0, 8), "NVFP4": (0, 8), "MXFP8": (0, 18), "INT8": (0, 27), "INT4": (0, 28)},
    **{"W4A8": (0, 31), "W4A8_G32": (0, 31), "W6A8": (0, 38)},
}
"""The first ComfyUI that loads each format. Source: its release notes, and pull request 14859 for INT4."""


def companions(name: str) -> list[str]:
    """Return the formats that load wherever this one does, itself included, in the order of `NATIVE`.

    MXFP8 has no error less than FP8 in more bytes, and also needs PyTorch 2.10, so that it accompanies no other.
    """
    return [other for other in NATIVE if other == name or (other != "MXFP8" and FIRST_HOST[other] <= FIRST_HOST[name])]
