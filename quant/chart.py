"""Draws a file report: bytes by role and type, then bytes and error of every layer by block. Needs matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .report import GIB, MIB, FileReport, TensorSummary, sqnr_db

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI, _WIDTH = 100, 10.24
_ROW, _HEAD, _GAP = 0.26, 0.9, 0.75
# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
_ROLES = ("self_attn", "cross_attn", "ffn", "embedding", "head", "other")
_LAYER = re.compile(r"(?:(\w+)_)?blocks\.(\d+)\.(.+)\.weight")

Layers = Mapping[str, Mapping[int, TensorSummary]]
"""The matrix of each layer role in each block."""


def draw(report: FileReport) -> Image.Image:
    """RGB, 1024 pixels wide."""
    roles = [role for role in _ROLES if any(tensor.role == role for tensor in report.tensors)]
    layers = _layers(report)
    maps: list[tuple[str, Callable[[TensorSummary], float]]] = []
    if layers:
        maps.append(("MiB by layer and block", lambda tensor: tensor.nbytes / MIB))
    if any(tensor.relative_error for layer in layers.values() for tensor in layer.values()):
        maps.append(("signal to quantization noise in dB: higher is better", _sqnr))
    # Figure, not pyplot, which keeps every figure and picks a window system.
    heights = [_ROW * 1.4 * len(roles), *(_ROW * len(layers) for _ in maps)]
    height = _HEAD + sum(heights) + _GAP * len(heights)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    figure.text(0.02, 1 - 0.3 / height, report.path.name, fontsize=15, va="center")
    figure.text(0.02, 1 - 0.6 / height, _summary(report), fontsize=10, va="center", color="#667085")
    top = height - _HEAD
    axes = []
    for part in heights:
        axes.append(figure.add_axes((0.17, (top - part) / height, 0.74, part / height)))
        top -= part + _GAP
    _draw_bytes(axes[0], report, roles)
    for axis, (title, value) in zip(axes[1:], maps, strict=True):
        _draw_map(figure, axis, layers, title, value)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def _summary(report: FileReport) -> str:
    size = f"{report.nbytes / GIB:.3f} GiB, {report.bits_per_weight:.2f} bits per weight"
    return f"{size}, {len(report.tensors)} tensors - {report.kind}"


def _layers(report: FileReport) -> Layers:
    layers: dict[str, dict[int, TensorSummary]] = {}
    for tensor in report.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match and len(tensor.shape) == 2:
            prefix, block, role = match.groups()
            layers.setdefault(f"{prefix} {role}" if prefix else role, {})[int(block)] = tensor
    return layers


def _sqnr(tensor: TensorSummary) -> float:
    return math.nan if not tensor.relative_error else sqnr_db(tensor.relative_error)


def _draw_bytes(axis: Axes, report: FileReport, roles: list[str]) -> None:
    """One bar for each role, made of its types."""
    left = np.zeros(len(roles))
    for total, colour in zip(report.by_type, cycle(_COLOURS), strict=False):
        group = [tensor for tensor in report.tensors if tensor.qtype == total.qtype]
        width = np.array([sum(t.nbytes for t in group if t.role == role) / MIB for role in roles])
        axis.barh(roles, width, left=left, color=colour, label=f"{total.qtype} x {total.count}")
        left += width
    for row, mib in enumerate(left):
        axis.annotate(f"{mib:,.1f} MiB", (mib, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, 1.15 * max(left))
    axis.invert_yaxis()
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.legend(
        loc="upper left",
        bbox_to_anchor=(-0.01, 0),
        ncols=6,
        frameon=False,
        fontsize=9,
        handlelength=1,
    )


def _draw_map(figure: Figure, axis: Axes, layers: Layers, title: str, value: Callable[[TensorSummary], float]) -> None:
    """A row for each layer role, a column for each block; what has no value stays white."""
    blocks = 1 + max(block for layer in layers.values() for block in layer)
    values = np.full((len(layers), blocks), math.nan)
    for row, layer in enumerate(layers.values()):
        for block, tensor in layer.items():
            values[row, block] = value(tensor)
    image = axis.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_yticks(range(len(layers)), list(layers), fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.tick_params(left=False, labelsize=9)
    axis.spines[:].set_visible(False)
    box = axis.get_position()
    figure.colorbar(image, cax=figure.add_axes((box.x1 + 0.015, box.y0, 0.015, box.height))).ax.tick_params(labelsize=8)
