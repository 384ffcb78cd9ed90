"""The graphs behind workflows/, by their titles: ComfyUI's template browser shows the name of the file."""

from __future__ import annotations

from typing import NamedTuple

from . import tools, wan21, wan22
from .canvas import Columns


class Template(NamedTuple):
    """A graph, and what its thumbnail shows going in and coming out: icons of `thumbnail`, each with a caption."""

    columns: Columns
    given: tuple[tuple[str, str], ...]
    made: tuple[tuple[str, str], ...]
    remark: str = ""
    """A few words on the arrow."""


_TEXT, _PICTURE, _VIDEO = ("text", "prompt"), ("picture", "picture"), ("video", "video")
_CHECKPOINT = ("file", "checkpoint")


def templates() -> dict[str, Template]:
    """Return every template by its title, which is also the name of its file in workflows/."""
    return {
        "Check the installation": Template(tools.check(), (("chip", "your GPU"),), (("list", "report"),), "seconds"),
        "Wan 2.1 text to video, 1.3B": Template(wan21.t2v_small(), (_TEXT,), (_VIDEO,)),
        "Wan 2.1 text to video in 3.5 GiB, 14B": Template(wan21.low_vram(), (_TEXT,), (_VIDEO,), "3.5 GiB"),
        "Wan 2.1 image to video, 14B": Template(wan21.i2v(), (_TEXT, _PICTURE), (_VIDEO,)),
        "Wan 2.1 first and last frame, 14B": Template(
            wan21.first_last_frame(), (("picture", "first"), ("end", "last")), (_VIDEO,)
        ),
        "Wan 2.1 Fun Control, 1.3B": Template(
            wan21.fun_control(), (("outlines", "outlines"), _PICTURE), (_VIDEO,), "follows"
        ),
        "Wan 2.1 VACE, 14B": Template(wan21.vace(), (_TEXT, ("picture", "reference")), (_VIDEO,)),
        "Wan 2.1 VACE on a small GPU, 14B": Template(
            wan21.vace_low_vram(), (_TEXT, ("picture", "reference")), (_VIDEO,), "small GPU"
        ),
        "Wan 2.2 text to video, A14B": Template(wan22.experts_t2v(), (_TEXT,), (_VIDEO,), "2 experts"),
        "Wan 2.2 text to video in 4 steps, A14B": Template(wan22.experts_4_steps(), (_TEXT,), (_VIDEO,), "4 steps"),
        "Wan 2.2 image to video, A14B": Template(wan22.experts_i2v(), (_TEXT, _PICTURE), (_VIDEO,), "2 experts"),
        "Wan 2.2 image to video in 4 steps on a small GPU, A14B": Template(
            wan22.experts_i2v_4_steps(), (_TEXT, _PICTURE), (_VIDEO,), "4 steps"
        ),
        "Wan 2.2 text and image to video, 5B": Template(wan22.ti2v_5b(), (_TEXT, _PICTURE), (_VIDEO,)),
        "Wan 2.2 Animate, 14B": Template(wan22.animate(), (("person", "person"), ("pose", "motion")), (_VIDEO,)),
        "Wan 2.2 speech to video, 14B": Template(
            wan22.speech(), (("person", "person"), ("sound", "speech")), (_VIDEO,)
        ),
        "Convert any Wan": Template(tools.convert_any(), (_CHECKPOINT,), (("small file", "GGUF or 8 bits"),)),
        "Convert for speed (INT8)": Template(
            tools.convert_for_speed(), (_CHECKPOINT,), (("small file", "INT8"), _VIDEO), "faster"
        ),
        "Calibrate and tune": Template(
            tools.calibrate(), (_CHECKPOINT, _TEXT), (("small file", "calibrated"),), "measure"
        ),
        "What quantization costs": Template(
            tools.quality(), (("file", "full"), ("small file", "quantized")), (("chart", "difference"),), "compare"
        ),
        "Coming from ComfyUI-GGUF": Template(tools.migrate(), (("graph", "old graph"),), (("graph", "same graph"),)),
    }
