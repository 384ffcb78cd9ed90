"""The graphs behind workflows/."""

from __future__ import annotations

from . import tools, wan21, wan22
from .canvas import Columns


def templates() -> dict[str, Columns]:
    """Return the graph of every file in workflows/, by its name."""
    return {
        "check_installation": tools.check(),
        "convert_any_wan": tools.convert_any(),
        "wan2.1_t2v_1.3B": wan21.t2v_small(),
        "wan2.1_t2v_14B_low_vram": wan21.low_vram(),
        "wan2.1_i2v_14B_480p": wan21.i2v(),
        "wan2.1_vace_14B": wan21.vace(),
        "wan2.2_t2v_A14B": wan22.experts_t2v(),
        "wan2.2_t2v_A14B_4_steps": wan22.experts_4_steps(),
        "wan2.2_i2v_A14B": wan22.experts_i2v(),
        "wan2.2_ti2v_5B": wan22.ti2v_5b(),
        "quality_comparison": tools.quality(),
        "migrate_from_comfyui_gguf": tools.migrate(),
    }
