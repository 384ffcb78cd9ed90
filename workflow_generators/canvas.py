"""The canvas's own file format, made from graphs that are written as nodes in titled boxes, in columns.

Source: the workflow JSON schema 0.4 of the ComfyUI frontend, https://docs.comfy.org/specs/workflow_json_0.4.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .layout import SizedBox, layout

Schemas = dict[str, Any]
"""The server's answer to /object_info: class -> inputs, outputs."""
Json = dict[str, Any]

_SOCKET, _WIDGET = 20, 24  # heights of one row, in the canvas's units
_WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
# Nodes that show text or pictures need more room than their rows.
_SIZES = {
    "CLIPLoaderGGUF": (330, 120),  # as high as the node that replaces it
    "CLIPTextEncode": (420, 170),
    "LoadAudio": (330, 180),
    "LoadImage": (310, 330),
    "LoadVideo": (330, 380),
    "PreviewAny": (440, 170),
    "PreviewImage": (480, 250),
    "SaveImage": (400, 340),
    "SaveVideo": (400, 340),
    "UnetLoaderGGUF": (330, 140),
    "WanQuantAdvise": (720, 330),
    "WanQuantCheck": (720, 300),
    "WanQuantCompareLatents": (560, 560),
    "WanQuantConvert": (440, 730),
    "WanQuantInspect": (440, 610),
    "WanQuantLowVRAM": (440, 330),
    "WanQuantSaveConditioning": (330, 170),
    "WanQuantSaveImportance": (440, 230),
    "WanQuantSaveModel": (440, 700),
    "WanQuantSaveRecoveryLora": (440, 330),
    "WanQuantTextEncode": (420, 340),
    "WanQuantTune": (440, 700),
}
_WIDTH, _NOTE_WIDTH = 330, 480
_NOTE_COLORS = {"color": "#432", "bgcolor": "#353535"}  # links are legible on it, also as the light theme lightens it
# In pixels of the canvas: its text beside the arrows of a widget, and the note's, which is smaller.
_LETTER, _ARROWS = 6.3, 115
_NOTE_LINE, _NOTE_LETTERS, _HEADING, _HEADING_LETTERS = 14, 80, 28, 42
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


class Model(NamedTuple):
    """A file that ComfyUI can download; `directory` is a folder below models."""

    name: str
    url: str
    directory: str
    gib: float
    """The size of the file in GiB, for the note."""


class Widget(NamedTuple):
    """An input whose value is set on the node itself."""

    name: str
    default: Any
    optional: bool


@dataclass(frozen=True)
class Node:
    """A node in API format: an input that is a list [id, slot] is a link, any other the value of a widget.

    Widgets that are not named get ComfyUI's default.
    """

    class_type: str
    inputs: dict[str, Any]
    title: str = ""
    models: tuple[Model, ...] = ()
    color: dict[str, str] = field(default_factory=dict)


class Box(NamedTuple):
    """A group of nodes from top to bottom, by id; without a title no frame is drawn."""

    title: str
    nodes: dict[str, Node]


Columns = Sequence[Sequence[Box]]
"""Columns from left to right, each of boxes from top to bottom."""


def node(class_type: str, /, *, title: str = "", models: Sequence[Model] = (), **inputs: Any) -> Node:
    """Return a node; see `Node`."""
    return Node(class_type, inputs, title, tuple(models))


def note(text: str) -> Box:
    """Return a note in Markdown."""
    return Box("", {"note": Node("MarkdownNote", {"": text}, "Read me", color=_NOTE_COLORS)})


def workflow(name: str, columns: Columns, schemas: Schemas) -> Json:
    """Return the file that the canvas opens; the same graph always gives the same file."""
    places, groups = layout(
        [
            SizedBox(box.title, {name: _size(item, schemas) for name, item in box.nodes.items()})
            for column in columns
            for box in column
        ]
    )
    ids = {item: index for index, item in enumerate(places, start=1)}
    nodes, links = [], []
    for order, (item_id, item) in enumerate(_nodes(columns)):
        sockets = _sockets(item, schemas)
        for slot, socket in enumerate(sockets):
            if source := item.inputs.get(socket["name"]):
                socket["link"] = len(links) + 1
                links.append([socket["link"], ids[source[0]], source[1], ids[item_id], slot, socket["type"]])
        nodes.append(_node(ids[item_id], order, item, places[item_id], sockets, schemas))
    for entry in nodes:
        for slot, output in enumerate(entry["outputs"]):
            output["links"] = [link[0] for link in links if link[1:3] == [entry["id"], slot]]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"wanquant/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"workflowRendererVersion": "LG"},
        "version": 0.4,
    }


def _nodes(columns: Columns) -> Iterator[tuple[str, Node]]:
    for column in columns:
        for box in column:
            yield from box.nodes.items()


def _inputs(class_type: str, schemas: Schemas) -> Iterator[tuple[str, str, Json, bool]]:
    """Yield (name, type, options, optional) of every input in ComfyUI's order."""
    declared = schemas.get(class_type, {"input": {}})["input"]
    for section in ("required", "optional"):
        for name, (kind, *options) in declared.get(section, {}).items():
            yield name, kind if isinstance(kind, str) else "COMBO", options[0] if options else {}, section == "optional"


def _sockets(item: Node, schemas: Schemas) -> list[Json]:
    """Return the sockets: the required ones, and the optional ones that the graph links.

    The others are left to ComfyUI, so that a node may get more of them without a change of the file.
    """
    found = []
    for name, kind, options, optional in _inputs(item.class_type, schemas):
        linked = isinstance(item.inputs.get(name), list)
        widget = {"widget": {"name": name}} if _is_widget(kind, options) else {}
        if linked or not (widget or optional):
            found.append({"name": name, "type": kind, **widget, **({"shape": 7} if optional else {}), "link": None})
    return found


def _is_widget(kind: str, options: Json) -> bool:
    return kind in _WIDGET_TYPES and not options.get("forceInput")


def widgets(class_type: str, schemas: Schemas) -> list[Widget]:
    """Return the widgets of a node, in the order in which a file keeps their values."""
    found: list[Widget] = []
    for name, kind, options, optional in _inputs(class_type, schemas):
        if _is_widget(kind, options):
            found.append(Widget(name, options.get("default"), optional))
            # The canvas adds two widgets of its own, which are not inputs.
            if options.get("control_after_generate"):
                found.append(Widget("control_after_generate", "randomize", optional))
            if options.get("image_upload"):
                found.append(Widget("upload", "image", optional))
    return found


def _widget_values(item: Node, schemas: Schemas) -> list[Any]:
    """Return the values by position, without optional ones at the end that the graph does not set."""
    if item.class_type not in schemas:
        return list(item.inputs.values())
    named = widgets(item.class_type, schemas)
    while named and named[-1].optional and named[-1].name not in item.inputs:
        named.pop()
    values = {name: value for name, value in item.inputs.items() if not isinstance(value, list)}
    return [values.get(widget.name, widget.default) for widget in named]


def _node(number: int, order: int, item: Node, place: list[int], sockets: list[Json], schemas: Schemas) -> Json:
    schema = schemas.get(item.class_type, {"output": [], "output_name": []})
    outputs = [
        {"name": name, "type": kind if isinstance(kind, str) else "COMBO"}
        for name, kind in zip(schema["output_name"], schema["output"], strict=True)
    ]
    properties: Json = {"Node name for S&R": item.class_type} if item.class_type in schemas else {}
    if item.models:
        properties["models"] = [
            {"name": model.name, "url": model.url, "directory": model.directory} for model in item.models
        ]
    return {
        "id": number,
        "type": item.class_type,
        "pos": place[:2],
        "size": place[2:],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        **({"title": item.title} if item.title else {}),
        "properties": properties,
        "widgets_values": _widget_values(item, schemas),
        **item.color,
    }


def _size(item: Node, schemas: Schemas) -> tuple[int, int]:
    """Return width and height without the title bar, at least as the canvas would compute them."""
    if item.class_type == "MarkdownNote":
        return _NOTE_WIDTH, _note_height(item.inputs[""])
    declared = sum(not _is_widget(kind, options) for _, kind, options, _ in _inputs(item.class_type, schemas))
    rows = max(declared, len(_sockets(item, schemas)), len(schemas[item.class_type]["output"]))
    count = len(widgets(item.class_type, schemas))
    height = _SOCKET * rows + (_WIDGET * count + 14 if count else 6)
    width, least = _SIZES.get(item.class_type, (_WIDTH, 0))
    return max(width, _text_width(item, schemas)), max(height, least)


def _text_width(item: Node, schemas: Schemas) -> int:
    """Return the width with which no list entry is cut, beside the name of its widget."""
    lists = (name for name, kind, *_ in _inputs(item.class_type, schemas) if kind == "COMBO")
    letters = [len(name) + len(item.inputs[name]) for name in lists if isinstance(item.inputs.get(name), str)]
    return round(_ARROWS + _LETTER * max(letters, default=0))


def _note_height(text: str) -> int:
    """Return the height of a note, with some room for the fonts of other systems."""
    height = 40
    for line in _LINK.sub(r"\1", text).splitlines():
        heading = line.startswith("#")
        rows = math.ceil(len(line) / (_HEADING_LETTERS if heading else _NOTE_LETTERS))
        height += rows * (_HEADING if heading else _NOTE_LINE) if line else _NOTE_LINE - 4
    return height
