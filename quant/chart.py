"""Draws a file report: where the bytes are, and how exact each tensor is. Needs Pillow."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from .report import GIB, MIB, FileReport, TensorSummary, sqnr_db

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

    ImageFontLike = ImageFont.ImageFont | FreeTypeFont

_WIDTH, _MARGIN, _LABELS = 1024, 32, 150
_ROW, _PLOT, _LEGEND = 34, 240, 30
# Drawn larger and reduced, which smooths edges that Pillow draws hard.
_SCALE = 2
_INK, _PALE, _GRID, _PAPER = "#1c2430", "#667085", "#e4e7ec", "#ffffff"
# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
_ROLES = ("self_attn", "cross_attn", "ffn", "embedding", "head", "other")


def draw(report: FileReport) -> Image.Image:
    """RGB, 1024 pixels wide."""
    roles = [role for role in _ROLES if any(tensor.role == role for tensor in report.tensors)]
    inexact = [(index, tensor) for index, tensor in enumerate(report.tensors) if tensor.relative_error]
    top = _MARGIN + 66
    bottom = top + len(roles) * _ROW + _LEGEND + 20
    height = bottom + (_PLOT + 60 if inexact else 0) + 12
    canvas = _Canvas(
        height, {total.qtype: colour for total, colour in zip(report.by_type, cycle(_COLOURS), strict=False)}
    )
    size = f"{report.nbytes / GIB:.3f} GiB, {report.bits_per_weight:.2f} bits per weight, {len(report.tensors)} tensors"
    canvas.text(_MARGIN, _MARGIN - 8, report.path.name, 22)
    canvas.text(_MARGIN, _MARGIN + 24, f"{size} - {report.kind}", 14, _PALE)
    _draw_bytes(canvas, report, roles, top)
    _draw_legend(canvas, report, bottom - _LEGEND)
    if inexact:
        _draw_errors(canvas, inexact, len(report.tensors), bottom + 36)
    return canvas.image.resize((_WIDTH, height), Image.Resampling.LANCZOS)


class _Canvas:
    """Pillow's drawing in final pixels."""

    def __init__(self, height: int, colours: dict[str, str]) -> None:
        self.image = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), _PAPER)
        self.colours = colours
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int = 14, fill: str = _INK, anchor: str = "la") -> None:
        font: ImageFontLike = ImageFont.load_default(size * _SCALE)
        self._draw.text((x * _SCALE, y * _SCALE), text, fill, font, anchor)

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        if width * _SCALE >= 1:
            corners = (x * _SCALE, y * _SCALE, (x + width) * _SCALE - 1, (y + height) * _SCALE - 1)
            self._draw.rectangle(corners, fill)

    def dot(self, x: float, y: float, fill: str) -> None:
        self._draw.circle((x * _SCALE, y * _SCALE), 3 * _SCALE, fill)


def _draw_bytes(canvas: _Canvas, report: FileReport, roles: list[str], top: int) -> None:
    """One bar for each role, made of its types."""
    totals = {role: sum(t.nbytes for t in report.tensors if t.role == role) for role in roles}
    per_pixel = max(totals.values()) / (_WIDTH - _LABELS - _MARGIN - 100)
    for row, role in enumerate(roles):
        x, y = float(_LABELS), top + row * _ROW
        canvas.text(_LABELS - 12, y + 11, role, anchor="rm")
        for qtype, colour in canvas.colours.items():
            width = sum(t.nbytes for t in report.tensors if t.role == role and t.qtype == qtype) / per_pixel
            canvas.box(x, y, width, 22, colour)
            x += width
        canvas.text(x + 8, y + 11, f"{totals[role] / MIB:,.1f} MiB", fill=_PALE, anchor="lm")


def _draw_legend(canvas: _Canvas, report: FileReport, y: int) -> None:
    for column, total in enumerate(report.by_type):
        x = _LABELS + 104 * column
        canvas.box(x, y, 12, 12, canvas.colours[total.qtype])
        canvas.text(x + 18, y + 6, f"{total.qtype} x {total.count}", 13, anchor="lm")


def _draw_errors(canvas: _Canvas, tensors: list[tuple[int, TensorSummary]], count: int, top: int) -> None:
    """Signal to noise ratio of each tensor, in the order of the file."""
    ratios = [sqnr_db(tensor.relative_error or 0.0) for _, tensor in tensors]
    low, high = 5 * ((min(ratios) - 2) // 5), 5 * ((max(ratios) + 2) // 5 + 1)
    canvas.text(_MARGIN, top - 30, "Signal to quantization noise in dB of each tensor, in file order; higher is better")
    step = 5 if high - low <= 40 else 10
    for mark in range(int(low), int(high) + 1, step):
        y = top + _PLOT * (high - mark) / (high - low)
        canvas.box(_LABELS, y, _WIDTH - _LABELS - _MARGIN, 1, _GRID)
        canvas.text(_LABELS - 12, y, str(mark), 13, _PALE, anchor="rm")
    for (index, tensor), ratio in zip(tensors, ratios, strict=True):
        centre = _LABELS + (_WIDTH - _LABELS - _MARGIN) * (index + 0.5) / count
        canvas.dot(centre, top + _PLOT * (high - ratio) / (high - low), canvas.colours[tensor.qtype])
