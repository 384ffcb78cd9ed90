"""Pictures of the measurements on TinyWan; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
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


def draw_quality(rows: Sequence[Row], path: Path) -> None:
    """Draw the error by size, one line per method."""
    figure = _figure(9, 5)
    axis = figure.add_subplot()
    for method, (colour, dash, label) in _STYLES.items():
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["nbytes"])
        if not line:
            continue
        sizes, psnr = [row["nbytes"] / 1e6 for row in line], [row["latent_psnr"]["mean"] for row in line]
        axis.plot(sizes, psnr, color=colour, linestyle=dash, marker="o", markersize=4, label=label)
        if method == "importance":
            spread = [row["latent_psnr"]["deviation"] for row in line]
            low, high = ([p + sign * s for p, s in zip(psnr, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
    for row in rows:
        if row["method"] == "plain":
            place = (row["nbytes"] / 1e6, row["latent_psnr"]["mean"])
            axis.annotate(row["recipe"], place, (5, -14), textcoords="offset points", fontsize=9)
    axis.set_xlabel("file, MB")
    axis.set_ylabel("PSNR of the latent, dB")
    axis.set_title("TinyWan: quantized against bfloat16, same seeds (band: deviation over the seeds)", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    # pyplot would keep every figure and choose a window system. The import is slow.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")


def draw_sensitivity(rows: Sequence[Row], levels: Sequence[float], path: Path) -> None:
    """Draw the error of each step (column) when one layer alone (row) is quantized."""
    figure = _figure(7, 0.19 * len(rows) + 1.2)
    axis = figure.add_subplot()
    roles = sorted(rows, key=lambda row: row["name"].split(".", 2)[2])
    # Reversed, so that the largest error is the brightest.
    image = axis.imshow([row["velocity_sqnr"] for row in roles], cmap="viridis_r", aspect="auto")
    names = [row["name"].removesuffix(".weight").removeprefix("blocks.") for row in roles]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xticks(range(len(levels)), [f"{level:.2f}" for level in levels], fontsize=8)
    axis.set_xlabel("noise level of the step")
    axis.set_ylabel("block and layer")
    axis.set_title("Error of a step's velocity, one layer of TinyWan in Q3_K", fontsize=11)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, label="velocity over its error, dB").ax.invert_yaxis()
    figure.savefig(path)


def draw_clips(clips: Tensor, captions: Sequence[object], path: Path) -> None:
    """Draw clips, two per row, with their frames side by side below the caption.

    Args:
        clips: float32, (n, 3, frames, height, width) in 0..1.
    """
    figure = _figure(10, 0.65 * len(clips))
    axes = figure.subplots(len(clips) // 2, 2).flat
    for axis, clip, caption in zip(axes, clips, captions, strict=True):
        axis.imshow(clip.permute(2, 1, 3, 0).flatten(1, 2).numpy(), interpolation="nearest")
        axis.set_xticks([edge - 0.5 for edge in range(0, clip.shape[1] * clip.shape[3], clip.shape[3])], labels=[])
        axis.grid(axis="x", color="white")
        axis.tick_params(length=0)
        axis.set_yticks([])
        axis.set_title(str(caption), fontsize=11)
    figure.savefig(path)
