"""Advice on which file to use and how to sample it, as a table or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import QuantError
from ..host_process import call_in_comfyui, find_comfyui

_HEAD = ("model", "video", "file", "how", "video memory", "main memory", "arithmetic", "copied per step")


@dataclass(frozen=True)
class Advice:
    """How to sample a video of one model.

    Attributes:
        video: (width and height in pixels, frames).
        files: of the model; Wan 2.2 A14B has two.
        file_gib: of one file in the recipe.
        ram_gib: main memory that the machine needs.
        vram_gib: predicted peak of video memory.
        budget_gib: of Wan Low VRAM, or 0 if ComfyUI's own forward fits.
        arithmetic: floating-point operations over those of ComfyUI's own forward.
        streamed_gib: weights that are copied to the GPU in each step.
        reason: why the video does not fit, or "".
    """

    model: str
    video: tuple[int, int, int]
    files: int
    recipe: str
    file_gib: float
    ram_gib: float
    vram_gib: float
    budget_gib: float
    arithmetic: float
    streamed_gib: float
    reason: str = ""

    @property
    def file(self) -> str:
        """The recipe and the size of the file or files."""
        return f"{'2 x ' if self.files == 2 else ''}{self.recipe}, {self.file_gib:.1f}"

    @property
    def how(self) -> str:
        """The node and its budget, or why the video does not fit."""
        return self.reason or (f"Wan Low VRAM, budget {self.budget_gib:g}" if self.budget_gib else "loader alone")

    def line(self) -> str:
        """Return what matters most, in one line."""
        video = "{}x{}x{}".format(*self.video)
        return f"{self.model}, {video}: {self.file}; {self.how}; peak {self.vram_gib:.2f}"

    def cells(self) -> tuple[str, ...]:
        """Return the cells of a row of the table."""
        video = "{}x{}x{}".format(*self.video)
        numbers = (f"{self.vram_gib:.2f}", f"{self.ram_gib:.1f}", f"{self.arithmetic:.3f}x", f"{self.streamed_gib:.1f}")
        return (self.model, video, self.file, self.how, *numbers)


@dataclass(frozen=True)
class AdviceReport:
    """The advice for a machine.

    Attributes:
        vram_gib, ram_gib: memory of the machine.
        others_gib: video memory of other programs.
    """

    vram_gib: float
    ram_gib: float
    others_gib: float
    advice: Sequence[Advice]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdviceReport:
        advice = [Advice(**{**each, "video": tuple(each["video"])}) for each in values["advice"]]
        return cls(**{**values, "advice": advice})

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return a table in Markdown, with sizes in GiB."""
        rows = [_HEAD, ("---",) * len(_HEAD), *(each.cells() for each in self.advice)]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{lines}\n\n{self._machine()}"

    def lines(self) -> str:
        """Return a line for the largest video of each model, for a font whose columns do not align."""
        largest = {each.model: each for each in self.advice}
        return "\n".join((self._machine(), *(each.line() for each in largest.values())))

    def _machine(self) -> str:
        return (
            f"For {round(self.vram_gib, 1):g} GiB of video memory (other programs hold {self.others_gib:g}), and"
            f" {round(self.ram_gib, 1):g} of main memory. Sizes are in GiB, and predicted."
        )


def advise(vram_gib: float, ram_gib: float) -> AdviceReport:
    """Return the advice for a machine, simulated by ComfyUI's own code in another process.

    Args:
        vram_gib: of the GPU, or 0 for this machine's.
        ram_gib: main memory, or 0 for this machine's.

    Raises:
        QuantError: no ComfyUI was found, or as `call_in_comfyui` raises it.
    """
    comfyui = find_comfyui()
    if comfyui is None:
        raise QuantError(
            "advise: no ComfyUI was found, whose code it simulates; set COMFYUI_PATH to ComfyUI's folder, or run the"
            " node Fits My Machine"
        )
    found = call_in_comfyui(comfyui, "ops.budget.advise", "advise_elsewhere", vram_gib, ram_gib)
    if "refused" in found:
        raise QuantError(found["refused"])
    return AdviceReport.from_json(found)
