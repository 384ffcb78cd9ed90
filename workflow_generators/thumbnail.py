"""Thumbnails of the templates: icons of what goes in, an arrow, icons of what comes out, each with a caption.

Everything is drawn, so that nothing looks like the output of a model. Pixels are drawn at twice the size.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 360)
_SCALE = 2
PAPER, INK = "#f7f5f0", "#22313f"
# Told apart by colour-blind people: Okabe and Ito, https://jfly.uni-koeln.de/color/.
BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"
_SIDE = 140
_CAPTION = 32
_GAP = 22

Pen = ImageDraw.ImageDraw


class _Icon:
    """A square of `_SIDE` units at (left, top), in which icons draw with coordinates of 0 to 100."""

    def __init__(self, pen: Pen, left: float, top: float, side: float = _SIDE) -> None:
        self._pen, self._left, self._top, self._unit = pen, left, top, side / 100

    def _place(self, *points: float) -> list[float]:
        starts = self._left, self._top
        return [_SCALE * (starts[i % 2] + point * self._unit) for i, point in enumerate(points)]

    def _width(self, width: float) -> int:
        return max(1, round(_SCALE * width * self._unit))

    def box(self, *corners: float, fill: str = "white", line: str = INK, width: float = 3, radius: float = 5) -> None:
        self._pen.rounded_rectangle(
            self._place(*corners), _SCALE * radius * self._unit, fill=fill, outline=line, width=self._width(width)
        )

    def line(self, *points: float, color: str = INK, width: float = 4) -> None:
        self._pen.line(self._place(*points), fill=color, width=self._width(width), joint="curve")

    def shape(self, *points: float, color: str) -> None:
        self._pen.polygon(self._place(*points), fill=color)

    def disc(self, x: float, y: float, radius: float, color: str) -> None:
        self._pen.ellipse(self._place(x - radius, y - radius, x + radius, y + radius), fill=color)

    def part(self, left: float, top: float, side: float) -> _Icon:
        """Return a smaller square in this one."""
        return _Icon(self._pen, self._left + left * self._unit, self._top + top * self._unit, side * self._unit)


def _text(icon: _Icon) -> None:
    icon.box(8, 10, 92, 90)
    for y, end in ((28, 80), (44, 72), (60, 80), (76, 50)):
        icon.line(20, y, end, y, color=BLUE, width=6)


def _landscape(icon: _Icon, sun: float) -> None:
    icon.box(2, 14, 98, 86, fill="#e4f1fa")
    icon.disc(sun, 34, 9, ORANGE)
    icon.shape(6, 82, 36, 42, 64, 82, color=GREEN)
    icon.shape(46, 82, 70, 54, 94, 82, color="#5fbf9f")


def _picture(icon: _Icon) -> None:
    _landscape(icon, 28)


def _end(icon: _Icon) -> None:
    _landscape(icon, 76)


def _film(icon: _Icon, draw: Callable[[_Icon], None]) -> None:
    icon.box(0, 10, 100, 90, fill=INK)
    for x in range(6, 96, 14):
        for y in (14, 79):
            icon.box(x, y, x + 8, y + 7, fill=PAPER, line=PAPER, width=1, radius=1)
    draw(icon.part(20, 20, 60))


def _video(icon: _Icon) -> None:
    _film(icon, _scene)


def _scene(icon: _Icon) -> None:
    icon.box(-20, 6, 120, 94, fill="#e4f1fa", line="#e4f1fa")
    icon.shape(36, 28, 36, 72, 76, 50, color=ORANGE)


def _outlines(icon: _Icon) -> None:
    def draw(inner: _Icon) -> None:
        inner.line(-18, 88, 22, 24, 52, 88, color="white", width=5)
        inner.line(34, 62, 66, 34, 116, 88, color="white", width=5)

    _film(icon, draw)


def _person(icon: _Icon) -> None:
    icon.box(8, 8, 92, 92, fill="#e4f1fa")
    icon.disc(50, 40, 17, ORANGE)
    icon.shape(20, 88, 30, 66, 50, 60, 70, 66, 80, 88, color=BLUE)


def _pose(icon: _Icon) -> None:
    def draw(inner: _Icon) -> None:
        inner.disc(50, 16, 12, ORANGE)
        inner.line(50, 28, 50, 62, color=SKY, width=8)
        inner.line(10, 26, 50, 40, 92, 52, color=SKY, width=8)
        inner.line(26, 98, 50, 62, 80, 96, color=SKY, width=8)

    _film(icon, draw)


def _sound(icon: _Icon) -> None:
    icon.box(4, 14, 96, 86)
    for x, half in zip(range(16, 90, 10), (6, 16, 27, 12, 24, 30, 14, 7), strict=True):
        icon.line(x, 50 - half, x, 50 + half, color=BLUE, width=6)


def _file(icon: _Icon) -> None:
    icon.box(14, 4, 86, 96)
    for row in range(4):
        for column in range(4):
            x, y = 24 + 14 * column, 18 + 18 * row
            icon.box(x, y, x + 10, y + 12, fill=BLUE, line=BLUE, width=1, radius=2)


def _small_file(icon: _Icon) -> None:
    icon.box(30, 30, 70, 90)
    for row in range(3):
        for column in range(2):
            x, y = 38 + 14 * column, 40 + 16 * row
            icon.box(x, y, x + 10, y + 10, fill=GREEN, line=GREEN, width=1, radius=2)


def _chip(icon: _Icon) -> None:
    for at in (30, 50, 70):
        icon.line(at, 4, at, 96, width=5)
        icon.line(4, at, 96, at, width=5)
    icon.box(18, 18, 82, 82, fill="white")
    icon.box(34, 34, 66, 66, fill=GREEN, line=GREEN)


def _list(icon: _Icon) -> None:
    icon.box(10, 6, 90, 94)
    for y in (26, 50, 74):
        icon.line(20, y, 27, y + 7, 38, y - 8, color=GREEN, width=6)
        icon.line(48, y, 80, y, color=INK, width=5)


def _chart(icon: _Icon) -> None:
    icon.line(10, 8, 10, 92, 96, 92)
    for x, height, color in ((20, 66, BLUE), (46, 40, ORANGE), (72, 20, GREEN)):
        icon.box(x, 92 - height, x + 18, 90, fill=color, line=color, width=1, radius=2)


def _graph(icon: _Icon) -> None:
    icon.line(30, 30, 60, 30, 60, 68, 76, 68)
    for left, top, color in ((4, 16, BLUE), (58, 56, GREEN), (4, 64, ORANGE)):
        icon.box(left, top, left + 36, top + 26)
        icon.box(left, top, left + 36, top + 9, fill=color, line=color, width=1)


ICONS: dict[str, Callable[[_Icon], None]] = {
    "text": _text,
    "picture": _picture,
    "end": _end,
    "video": _video,
    "outlines": _outlines,
    "person": _person,
    "pose": _pose,
    "sound": _sound,
    "file": _file,
    "small file": _small_file,
    "chip": _chip,
    "list": _list,
    "chart": _chart,
    "graph": _graph,
}

Parts = tuple[tuple[str, str], ...]
"""(icon, caption) pairs from left to right."""


def draw(given: Parts, made: Parts, remark: str = "") -> Image.Image:
    """Return the thumbnail: RGB, of `SIZE` pixels.

    Args:
        given: what goes in.
        made: what comes out.
        remark: a few words above the arrow.
    """
    image = Image.new("RGB", (SIZE[0] * _SCALE, SIZE[1] * _SCALE), PAPER)
    pen = ImageDraw.Draw(image)
    arrow, gap = 96, _GAP
    count = len(given) + len(made)
    side = 180 if count == 2 else _SIDE
    total = count * side + (count - 2) * gap + arrow + 2 * gap
    left, top = (SIZE[0] - total) / 2, (SIZE[1] - side) / 2 - 16
    for group, last in ((given, False), (made, True)):
        for icon, caption in group:
            ICONS[icon](_Icon(pen, left, top, side))
            _write(pen, left + side / 2, top + side + 10, caption, _CAPTION, room=side + gap - 4)
            left += side + gap
        if not last:
            _arrow(pen, left, top + side / 2, arrow, remark)
            left += arrow + gap
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def _arrow(pen: Pen, left: float, middle: float, length: float, remark: str) -> None:
    icon = _Icon(pen, left, middle - 50, 100)
    icon.line(4, 50, length - 20, 50, color=INK, width=9)
    icon.shape(length - 30, 28, length, 50, length - 30, 72, color=INK)
    _write(pen, left + length / 2, middle - 62, remark, 28, ORANGE, room=length + _GAP)


def _write(pen: Pen, x: float, y: float, text: str, size: float, color: str = INK, *, room: float) -> None:
    """Write centered at x, below y, smaller if the text needs more than `room`."""
    font = ImageFont.load_default(_SCALE * size)
    if (width := font.getlength(text)) > _SCALE * room:
        font = ImageFont.load_default(_SCALE * size * _SCALE * room / width)
    pen.text((_SCALE * x, _SCALE * y), text, fill=color, font=font, anchor="ma")
