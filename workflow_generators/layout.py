"""Places of nodes on the canvas: boxes of nodes in columns, as large as the window can show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_TITLE = 30  # height of a node's title bar, in the canvas's units
_GAP, _MARGIN, _BOX_TITLE = 20, 15, 45
_BOX_COLOR = "#3f789e"
# ComfyUI fits a template into the window. It shows no text below a zoom of 57 %, or of 47 % where Windows enlarges by
# half (litegraph's low_quality: 8 / 14 / square root of the pixel ratio).
_WINDOW = 16 / 9
_HEIGHTS = range(500, 2000, 50)  # of columns


class SizedBox(NamedTuple):
    """A group of nodes from top to bottom: the width and height of each by id.

    Without a title no frame is drawn, and the nodes are not made as wide as others in the column.
    """

    title: str
    nodes: Mapping[str, tuple[int, int]]

    @property
    def width(self) -> int:
        return max(width for width, _ in self.nodes.values())

    @property
    def height(self) -> int:
        title = _BOX_TITLE if self.title else 0
        return title + sum(_TITLE + height + _GAP for _, height in self.nodes.values()) + _GAP


class Layout(NamedTuple):
    """The places of all nodes and frames."""

    places: dict[str, list[int]]
    """[x, y, width, height] of every node, without its title bar."""
    groups: list[dict[str, Any]]
    """The frames, as a workflow file lists them."""

    @property
    def extent(self) -> float:
        """The width of the window that shows everything, in the canvas's units."""
        areas = [*self.places.values(), *(group["bounding"] for group in self.groups)]
        right, low = (max(area[axis] + area[axis + 2] for area in areas) for axis in (0, 1))
        return max(right, _WINDOW * low)


def layout(boxes: Sequence[SizedBox]) -> Layout:
    """Return the layout in columns, from left to right in the order of the boxes, that a window shows largest."""
    return min((_placed(_stacked(boxes, highest)) for highest in _HEIGHTS), key=lambda made: made.extent)


def _stacked(boxes: Sequence[SizedBox], highest: int) -> list[list[SizedBox]]:
    """Return the boxes in as few columns as their heights allow."""
    columns: list[list[SizedBox]] = []
    room = 0
    for box in boxes:
        if box.height > room:
            columns.append([])
            room = highest
        columns[-1].append(box)
        room -= box.height
    return columns


def _placed(columns: Sequence[Sequence[SizedBox]]) -> Layout:
    made = Layout({}, [])
    x = 0
    for column in columns:
        widest = max(box.width for box in column)
        y = 0
        for box in column:
            top, y = y, y + (_BOX_TITLE if box.title else 0)
            width = widest if box.title else box.width
            for name, (_, height) in box.nodes.items():
                made.places[name] = [x + _MARGIN, y + _TITLE, width, height]
                y += _TITLE + height + _GAP
            if box.title:
                bounding = [x, top, width + 2 * _MARGIN, y - top]
                made.groups.append(_group(len(made.groups) + 1, box.title, bounding))
            y += _GAP
        x += widest + 2 * _MARGIN + _GAP
    return made


def _group(number: int, title: str, bounding: list[int]) -> dict[str, Any]:
    return {"id": number, "title": title, "bounding": bounding, "color": _BOX_COLOR, "font_size": 24, "flags": {}}
