"""A chart of a file report: what it shows, bytes by role and type, then bytes and error of every layer by block.

It needs matplotlib, so import this module only to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from ..errors import printable
from ..units import GIB, MIB, counted
from .report import FileReport, TensorSummary, sqnr_db

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches. Text of 10 points is 11 pixels high in a node 440 pixels wide.
_DPI, _WIDTH = 100, 5.4
_ROW, _BAR, _LINE, _LABELS = 0.26, 0.26, 0.25, 1.35
_LEGEND_COLUMNS = 4
# The palette of Okabe and Ito, whose colors can be distinguished with any color vision.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
_ROLES = ("self_attn", "cross_attn", "ffn", "embedding", "head", "other")
_LAYER = re.compile(r"(?:(\w{1,20})_)?blocks\.(\d{1,9})\.(.{1,60})\.weight")
# A hostile file may have any number of layers and blocks; those of a Wan model are far fewer.
_MAX_LAYERS, _MAX_BLOCKS = 60, 400
_LINE_CHARS = 62

Layers = Mapping[str, Mapping[int, TensorSummary]]
"""The matrix of each layer of a block (such as `self_attn.q`), by the number of the block."""


def draw(report: FileReport) -> Image.Image:
    """Return the chart as an RGB image, 540 pixels wide."""
    return _as_text(report, whole=True)


def draw_bytes(report: FileReport) -> Image.Image:
    """Return its upper part for a node that has little room: bytes by role and type."""
    return _as_text(report, whole=False)


def _as_text(report: FileReport, *, whole: bool) -> Image.Image:
    # Names from a file are text, not TeX.
    with rc_context({"text.parse_math": False}):
        return _draw(report, whole=whole)


def _draw(report: FileReport, *, whole: bool) -> Image.Image:
    roles = [role for role in _ROLES if any(tensor.role == role for tensor in report.tensors)]
    layers = _layers(report)
    lines = [(line, 12, "black") for line in _message(report, layers)]
    maps: list[tuple[str, Callable[[TensorSummary], float]]] = []
    if whole:
        lines += [(report.path.name, 11, "black"), *((line, 10, "#667085") for line in (_size(report), report.kind))]
        maps = _maps(layers)
    legend = 0.1 + 0.25 * math.ceil(len(report.by_type) / _LEGEND_COLUMNS)
    head, bars, body = 0.12 + _LINE * len(lines), _BAR * len(roles), 0.85 + _ROW * len(layers) if maps else 0.0
    height = head + bars + legend + body
    # pyplot would keep every figure in memory and choose a window system.
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")

    def axes(left: float, top: float, width: float, tall: float) -> Axes:
        """Return new axes at a position in inches from the upper left corner."""
        return figure.add_axes((left / _WIDTH, 1 - (top + tall) / height, width / _WIDTH, tall / height))

    for row, (line, size, color) in enumerate(lines):
        shown = printable(line, _LINE_CHARS)
        fitting = min(size, 630 / len(shown))
        figure.text(0.02, 1 - _LINE * (row + 0.7) / height, shown, fontsize=fitting, va="center", color=color)
    if roles:
        _draw_bytes(axes(_LABELS, head, _WIDTH - _LABELS - 0.1, bars), report, roles)
    top, tall = head + bars + legend + 0.4, _ROW * len(layers)
    each = (_WIDTH - _LABELS) / max(1, len(maps))
    for index, (title, value) in enumerate(maps):
        left, width = _LABELS + index * each, each - 0.7
        axis, scale = axes(left, top, width, tall), axes(left + width + 0.06, top, 0.1, tall)
        _draw_map(axis, scale, layers, title, value)
        if index:
            axis.tick_params(labelleft=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def _maps(layers: Layers) -> list[tuple[str, Callable[[TensorSummary], float]]]:
    """Return the titles of the maps that the file has values for, and the value of a tensor in each."""
    if not layers:
        return []
    size = ("MiB by block", lambda tensor: tensor.nbytes / MIB)
    lossy = any(tensor.relative_error for layer in layers.values() for tensor in layer.values())
    return [size, ("SQNR in dB: more is better", _sqnr)] if lossy else [size]


def _message(report: FileReport, layers: Layers) -> list[str]:
    """Return what the chart shows: the role with the most bytes, and the layer with the largest error."""
    nbytes: Counter[str] = Counter()
    for tensor in report.tensors:
        nbytes[tensor.role] += tensor.nbytes
    if not nbytes.total():
        return ["The file holds no weights"]
    role, most = max(nbytes.items(), key=lambda item: item[1])
    share = f"{role} has {100 * most / nbytes.total():.0f} % of the bytes"
    errors = {t.name: t.relative_error for layer in layers.values() for t in layer.values() if t.relative_error}
    if not errors:
        return [share]
    return [f"{share},", f"{max(errors, key=errors.__getitem__).removesuffix('.weight')} has the largest error"]


def _size(report: FileReport) -> str:
    size = f"{report.nbytes / GIB:.3f} GiB, {report.bits_per_weight:.2f} bits per weight"
    return f"{size}, {counted(len(report.tensors), 'tensor')}"


def _layers(report: FileReport) -> Layers:
    layers: dict[str, dict[int, TensorSummary]] = {}
    for tensor in report.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match and len(tensor.shape) == 2:
            prefix, block, role = match.groups()
            layer = printable(f"{prefix} {role}" if prefix else role)
            if layer in layers or len(layers) < _MAX_LAYERS:
                layers.setdefault(layer, {})[int(block)] = tensor
    return layers


def _sqnr(tensor: TensorSummary) -> float:
    return math.nan if not tensor.relative_error else sqnr_db(tensor.relative_error)


def _draw_bytes(axis: Axes, report: FileReport, roles: list[str]) -> None:
    """Draw a stacked bar for each role, with one section per type."""
    left = np.zeros(len(roles))
    for total, color in zip(report.by_type, cycle(_COLORS), strict=False):
        group = [tensor for tensor in report.tensors if tensor.qtype == total.qtype]
        width = np.array([sum(t.nbytes for t in group if t.role == role) / MIB for role in roles])
        axis.barh(roles, width, left=left, color=color, label=f"{total.qtype} x {total.count}")
        left += width
    for row, mib in enumerate(left):
        axis.annotate(f"{mib:,.1f} MiB", (mib, row), (4, 0), textcoords="offset points", va="center")
    axis.set_xlim(0, 1.3 * max(left))
    axis.set_ylim(len(roles) - 0.5, -0.5)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.legend(
        loc="upper left",
        bbox_to_anchor=(-0.01 - _LABELS / _WIDTH, 0),
        ncols=_LEGEND_COLUMNS,
        frameon=False,
        fontsize=10,
        handlelength=1,
        columnspacing=1.2,
    )


def _draw_map(axis: Axes, scale: Axes, layers: Layers, title: str, value: Callable[[TensorSummary], float]) -> None:
    """Draw a map with a row per layer and a column per block; layers without a value stay white."""
    blocks = sorted({block for layer in layers.values() for block in layer})[:_MAX_BLOCKS]
    columns = {block: column for column, block in enumerate(blocks)}
    values = np.full((len(layers), len(blocks)), math.nan)
    for row, layer in enumerate(layers.values()):
        for block, tensor in layer.items():
            if block in columns:
                values[row, columns[block]] = value(tensor)
    image = axis.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_yticks(range(len(layers)), list(layers))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: str(blocks[int(x)]) if 0 <= x < len(blocks) else ""))
    axis.tick_params(left=False)
    axis.spines[:].set_visible(False)
    scale.figure.colorbar(image, cax=scale)
    scale.yaxis.set_major_locator(MaxNLocator(5))
