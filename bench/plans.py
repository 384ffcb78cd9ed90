"""Memory and time of a step of 14B by memory plan, simulated and measured: the README's picture. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from . import harness

MODEL = "14B-T2V"
PICTURE = harness.ROOT / "docs" / "images" / "plans.png"
PLANS = {"ComfyUI's own forward": "#d55e00", "Wan Low VRAM": "#0072b2", "Wan Low VRAM, least": "#56b4e9"}
"""From the largest budget to the smallest, with colors."""


class Bar(NamedTuple):
    """One plan for one video."""

    video: str
    plan: str
    peak: float
    """Video memory in GiB."""
    weights: float
    """The part of it that holds weights from step to step."""
    cost: float
    """What a step takes, as a multiple of a step of ComfyUI's own forward."""


def simulated() -> list[Bar]:
    """Return the bars of an RTX 3060 on which no weights stay; the cost is arithmetic."""
    rows = [row for row in _rows("memory-simulated") if (row["model"], row["precision"]) == (MODEL, "exact")]
    return _bars([row | {"resident_gib": 0.0} for row in rows], "peak_gib", "slowdown")


def measured() -> list[Bar]:
    """Return the bars of an H100 with dynamic VRAM; the cost is time."""
    rows = [row for row in _rows("gpu-memory-h100") if row["is_dynamic"] and row.get("precision") == "exact"]
    return _bars([row for row in rows if not row["loras"]], "device_gib", "seconds_a_step")


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((harness.RESULTS / f"{name}.json").read_text())["rows"]


def _bars(rows: list[dict[str, Any]], peak: str, cost: str) -> list[Bar]:
    bars = []
    for width in sorted({row["width"] for row in rows}):
        of_video = sorted((row for row in rows if row["width"] == width), key=lambda row: -row["budget_gib"])
        for plan, row in zip(PLANS, of_video, strict=True):
            video = "{width}x{height}x{frames}".format(**row)
            bars.append(Bar(video, plan, row[peak], row["resident_gib"], row[cost] / of_video[0][cost]))
    return bars


def draw(path: Path) -> None:
    """Draw both side by side, as PNG."""
    figure = harness.new_figure(10, 3.8)
    figure.suptitle("14B-T2V in Q4_K_M: peak memory, and a step relative to ComfyUI's own forward", fontsize=13)
    panels = (
        ("Simulated for an RTX 3060, weights streamed", "arithmetic", simulated()),
        ("Measured on an H100; pale: weights that stay", "time", measured()),
    )
    for axis, (title, cost, bars) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        places = [index + index // len(PLANS) for index in range(len(bars))]
        for place, bar in zip(places, bars, strict=True):
            axis.barh(place, bar.peak, color=PLANS[bar.plan], alpha=0.35, height=0.9)
            axis.barh(place, bar.peak - bar.weights, color=PLANS[bar.plan], height=0.9)
            axis.text(bar.peak, place, f" {bar.peak:.2f} GiB, {cost} {bar.cost:.2f}x", va="center")
        axis.set(xlim=(0, 1.6 * max(bar.peak for bar in bars)), xlabel="GiB of video memory")
        axis.set_yticks(places[1 :: len(PLANS)], [bar.video for bar in bars[1 :: len(PLANS)]])
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=11, loc="left")
    axis.invert_yaxis()
    handles = [figure.axes[0].barh(0, 0, color=colour) for colour in PLANS.values()]
    figure.legend(handles, PLANS, loc="outside lower center", ncols=len(PLANS), frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG to write; the README's is the default")
    options = parser.parse_args()
    found = {"simulated": simulated(), "measured": measured()}
    draw(options.picture)
    result = [{"kind": kind, **bar._asdict()} for kind, bars in found.items() for bar in bars]
    head = ("", "video", "plan", "peak, GiB", "of it weights that stay", "arithmetic or time")
    cells = [[kind, *bar[:2], *(f"{x:.2f}" for x in bar[2:])] for kind, bars in found.items() for bar in bars]
    harness.conclude(options, result, harness.table(head, cells))


if __name__ == "__main__":
    main()
