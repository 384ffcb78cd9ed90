"""The picture of a comparison of two latents. It needs matplotlib."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .compare import LatentComparison

_MAX_COLUMNS = 4
# Inches of 100 pixels. Text of 10 points is 11 pixels high in a node 440 pixels wide.
_WIDTH, _CURVE_HEIGHT, _STRIP_WIDTH = 5.4, 2.1, 4.3


def draw(comparison: LatentComparison) -> Image.Image:
    """Return an RGB picture, 540 pixels wide: PSNR by frame, then some frames of both latents and their error.

    The frame that differs most is among them.
    """
    count = len(comparison.frame_psnr)
    columns = min(count, _MAX_COLUMNS)
    shown = _frames(count, columns, comparison.worst_frame)
    _, height, width, _ = comparison.reference.shape
    strip_height = 0.6 + 3.15 * min(_STRIP_WIDTH / columns * height / width, 1.1)
    figure = Figure(figsize=(_WIDTH, _CURVE_HEIGHT + strip_height), dpi=100, facecolor="white", layout="constrained")
    curve, strips = np.asarray(figure.subfigures(2, 1, height_ratios=(_CURVE_HEIGHT, strip_height)))
    axis = curve.subplots()
    axis.plot(range(count), comparison.frame_psnr, marker="o", color="#0072b2")
    curve.suptitle(comparison.message(), x=0.01, ha="left", fontsize=13)
    axis.set_title(comparison.figures(), loc="left", fontsize=10, color="#667085")
    axis.set_xlabel("latent frame")
    axis.set_ylabel("PSNR in dB")
    axis.set_xlim(-0.5, count - 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axis.grid(color="#e4e7ec")
    rows = strips.subplots(3, columns, squeeze=False)
    largest = comparison.error.max().item() or 1.0
    for column, frame in enumerate(shown):
        rows[0][column].set_title(f"frame {frame}", fontsize=10)
        rows[0][column].imshow(comparison.reference[frame].numpy())
        rows[1][column].imshow(comparison.compared[frame].numpy())
        heat = rows[2][column].imshow(comparison.error[frame].numpy(), cmap="inferno", vmin=0, vmax=largest)
    for row, label in zip(rows, ("reference", "compared", "error"), strict=True):
        row[0].set_ylabel(label, fontsize=10)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    strips.colorbar(heat, ax=rows.ravel().tolist(), label="error in std. dev.", fraction=0.02)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def _frames(count: int, columns: int, worst: int) -> list[int]:
    """Return the numbers of the frames to show: evenly spaced, the nearest one moved to the worst."""
    shown = [round(index * (count - 1) / max(1, columns - 1)) for index in range(columns)]
    nearest = min(range(columns), key=lambda column: abs(shown[column] - worst))
    shown[nearest] = worst
    return shown
