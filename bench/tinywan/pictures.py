"""Pictures of the measurements on TinyWan; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from wanquant.bench.harness import new_figure
from wanquant.quant.plan.recipe import RECIPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

Row = Mapping[str, Any]

# Okabe and Ito's palette, which any color vision can distinguish; ggml's lines are dashed.
_STYLES = {
    "ggml": ("#999999", "--", "ggml's encoders"),
    "ggml + importance": ("#56b4e9", "--", "ggml's encoders, importance matrix"),
    "plain": ("#0072b2", "-", "WanQuant"),
    "importance": ("#009e73", "-", "WanQuant, importance matrix"),
    "importance + LoRA": ("#e69f00", ":", "the same and a recovery LoRA"),
    "calibrated": ("#d55e00", "-", "WanQuant, calibrated"),
    "thorough": ("#cc79a7", "-", "the same, thorough"),
}


# The recipes that are named, since the names of all would cover each other: line, offset in points, alignment.
_USUAL_NAME = ("plain", (5, -14), "left")
_NAMES = {
    **dict.fromkeys(("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ2_XXS", "IQ1_M"), _USUAL_NAME),
    "Q2_K": ("plain", (8, -10), "left"),
    "IQ3_S": ("calibrated", (-6, 2), "right"),
}
# Of ComfyUI's own formats, which are too few for lines, so that shapes tell the methods apart as well.
_NATIVE_STYLES = {
    "kitchen": ("#555555", "s", "ComfyUI's encoders"),
    "plain": ("#0072b2", "o", "WanQuant"),
    "calibrated": ("#d55e00", "D", "WanQuant, calibrated"),
}
# Where the name of a format stands: as offset in points and alignment. Some formats have almost the same size.
_LEFT, _RIGHT, _ABOVE = ((-9, -3), "right"), ((9, -3), "left"), ((0, 9), "center")
_SIDES = {"INT4": _LEFT, "FP8": _LEFT, "W4A8": _ABOVE, "INT8": _ABOVE}


def draw_quality(rows: Sequence[Row], path: Path) -> None:
    """Draw the error by size: GGUF on the left, ComfyUI's own formats on the right.

    A line for each method joins the files that are closer than all smaller ones.

    Rows of fewer networks than others are left out: other seeds have clips of other difficulty.
    """
    most = max(row["networks"] for row in rows)
    rows = [row for row in rows if row["networks"] == most]
    figure = new_figure(10, 7.2)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    gguf = [row for row in rows if not RECIPES[row["recipe"]].is_native]
    _draw_lines(left, gguf)
    for method in ("plain", "calibrated"):
        colour, _, label = _STYLES[method]
        line = _front(_line(gguf, method))
        right.plot(*_places(line), color=colour, alpha=0.4, linewidth=1, label=f"GGUF, {label}")
    _draw_formats(right, [row for row in rows if RECIPES[row["recipe"]].is_native])
    left.set_title("GGUF (band: deviation over the seeds)", fontsize=10)
    right.set_title("ComfyUI's own formats, inputs quantized too", fontsize=10)
    left.set_ylabel("PSNR of the latent to bfloat16, dB")
    for axis in (left, right):
        axis.set_xlabel("file, MB")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False, fontsize=10)
        axis.margins(x=0.09)
    figure.suptitle("A calibration brings TinyWan closest to bfloat16, at every size", fontsize=13)
    figure.savefig(path)


def _line(rows: Sequence[Row], method: str) -> list[Row]:
    return sorted((row for row in rows if row["method"] == method), key=lambda row: row["nbytes"])


def _front(line: Sequence[Row]) -> list[Row]:
    """Return the files of a line that are closer than all smaller ones."""
    best = -1.0
    return [row for row in line if best < (best := max(best, row["latent_psnr"]["mean"]))]


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return the sizes in MB and the PSNRs."""
    return [row["nbytes"] / 1e6 for row in rows], [row["latent_psnr"]["mean"] for row in rows]


def _draw_lines(axis: Axes, rows: Sequence[Row]) -> None:
    for method, (colour, dash, label) in _STYLES.items():
        line = _line(rows, method)
        if not line:
            continue
        axis.plot(*_places(line), color=colour, linestyle="", marker="o", markersize=3, alpha=0.5)
        line = _front(line)
        sizes, psnr = _places(line)
        axis.plot(sizes, psnr, color=colour, linestyle=dash, marker="o", markersize=4, label=label)
        if method == "importance":
            spread = [row["latent_psnr"]["deviation"] for row in line]
            low, high = ([p + sign * s for p, s in zip(psnr, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
    drawn = {row["recipe"] for row in rows}
    for recipe, (method, offset, alignment) in ((name, how) for name, how in _NAMES.items() if name in drawn):
        place = [value for (value,) in _places([row for row in _line(rows, method) if row["recipe"] == recipe])]
        axis.annotate(recipe, place, offset, textcoords="offset points", fontsize=10, ha=alignment)


def _draw_formats(axis: Axes, rows: Sequence[Row]) -> None:
    """Draw the methods of each format above each other, joined by a thin line."""
    for method, (colour, marker, label) in _NATIVE_STYLES.items():
        if line := _line(rows, method):
            # Kitchen's square is hollow and larger, since without a search ours is at the same place.
            look = {"markersize": 9, "fillstyle": "none"} if method == "kitchen" else {"markersize": 6}
            axis.plot(*_places(line), color=colour, linestyle="", marker=marker, label=label, **look)
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        sizes, psnr = _places([row for row in rows if row["recipe"] == recipe])
        axis.plot(sizes, psnr, color="#666666", linewidth=0.8, zorder=1)
        offset, alignment = _SIDES.get(recipe, _RIGHT)
        place = sizes[0], max(psnr) if alignment == "center" else (min(psnr) + max(psnr)) / 2
        axis.annotate(recipe, place, offset, textcoords="offset points", fontsize=10, ha=alignment)


def draw_sensitivity(rows: Sequence[Row], levels: Sequence[float], path: Path) -> None:
    """Draw the error of each step (column) when one layer alone (row) is quantized."""
    figure = new_figure(7.5, 0.22 * len(rows) + 1.2)
    axis = figure.add_subplot()
    roles = sorted(rows, key=lambda row: row["name"].split(".", 2)[2])
    # Reversed, so that the largest error is the brightest.
    image = axis.imshow([row["velocity_sqnr"] for row in roles], cmap="viridis_r", aspect="auto")
    names = [row["name"].removesuffix(".weight").removeprefix("blocks.") for row in roles]
    axis.set_yticks(range(len(names)), names, fontsize=10)
    axis.set_xticks(range(len(levels)), [f"{level:.2f}" for level in levels], fontsize=10)
    axis.set_xlabel("noise level of the step")
    axis.set_ylabel("block and layer")
    worst = names[min(range(len(roles)), key=lambda index: fmean(roles[index]["velocity_sqnr"]))]
    axis.set_title(f"Of TinyWan's layers alone in Q3_K, {worst} costs most", fontsize=12)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, label="velocity of the step over its error, dB").ax.invert_yaxis()
    figure.savefig(path)


def draw_clips(clips: Tensor, captions: Sequence[object], path: Path) -> None:
    """Draw clips, two per row, with their frames side by side below the caption.

    Args:
        clips: float32, (n, 3, frames, height, width) in 0..1.
    """
    figure = new_figure(10, 0.65 * len(clips))
    axes = figure.subplots(len(clips) // 2, 2).flat
    for axis, clip, caption in zip(axes, clips, captions, strict=True):
        axis.imshow(clip.permute(2, 1, 3, 0).flatten(1, 2).numpy(), interpolation="nearest")
        axis.set_xticks([edge - 0.5 for edge in range(0, clip.shape[1] * clip.shape[3], clip.shape[3])], labels=[])
        axis.grid(axis="x", color="white")
        axis.tick_params(length=0)
        axis.set_yticks([])
        axis.set_title(str(caption), fontsize=11)
    figure.savefig(path)
