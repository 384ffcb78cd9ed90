"""Graphs as one node: the canvas's subgraph blueprints, found in the node library.

Source: the blueprints of ComfyUI 0.30.0 (blueprints/*.json); SerialisableGraph in the ComfyUI frontend's litegraph.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from .canvas import Columns, Json, Schemas, workflow

INPUT, OUTPUT = -10, -20  # what the ends of a subgraph are called


class Input(NamedTuple):
    """A socket or widget of the whole: its name outside, and the (node id, input) pairs that it sets."""

    name: str
    targets: Sequence[tuple[str, str]]


class Output(NamedTuple):
    """A result of the whole: its name outside, and the node and slot that it comes from."""

    name: str
    node: str
    slot: int


def blueprint(
    name: str, description: str, columns: Columns, inputs: Sequence[Input], outputs: Sequence[Output], schemas: Schemas
) -> Json:
    """The file of one blueprint; the same graph always gives the same file."""
    inner = workflow(name, columns, schemas)
    keys = [key for column in columns for box in column for key in box.nodes]
    nodes = dict(zip(keys, inner["nodes"], strict=True))
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(fields, link, strict=True)) for link in inner["links"]]

    def link(origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> int:
        links.append(dict(zip(fields, (len(links) + 1, origin, origin_slot, target, target_slot, kind), strict=True)))
        return len(links)

    ports, shown = [], []
    for slot, port in enumerate(inputs):
        entries = [_socket(nodes[node], socket, schemas) for node, socket in port.targets]
        for (node, _), entry in zip(port.targets, entries, strict=True):
            number, position = nodes[node]["id"], nodes[node]["inputs"].index(entry)
            entry["link"] = link(INPUT, slot, number, position, entry["type"])
        ids = [entry["link"] for entry in entries]
        ports.append(
            {"id": _id(name, "input", port.name), "name": port.name, "type": entries[0]["type"], "linkIds": ids}
        )
        widget = {"widget": {"name": port.name}} if "widget" in entries[0] else {}
        shown.append({"name": port.name, "type": entries[0]["type"], **widget, "link": None})
    results = []
    for slot, output in enumerate(outputs):
        source = nodes[output.node]["outputs"][output.slot]
        number = link(nodes[output.node]["id"], output.slot, OUTPUT, slot, source["type"])
        source["links"].append(number)
        results.append(
            {"id": _id(name, "output", output.name), "name": output.name, "type": source["type"], "linkIds": [number]}
        )
    right = max(node["pos"][0] + node["size"][0] for node in inner["nodes"])
    whole = _id(name, "subgraph", "")
    subgraph = {
        "id": whole,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "description": description,
        "category": "WanQuant",
        "inputNode": {"id": INPUT, "bounding": [-220, 0, 160, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUT, "bounding": [right + 60, 0, 160, 40 + 20 * len(outputs)]},
        "inputs": ports,
        "outputs": results,
        "widgets": [],
        "nodes": inner["nodes"],
        "groups": inner["groups"],
        "links": links,
        "extra": {},
    }
    promoted = [
        [str(nodes[port.targets[0][0]]["id"]), port.targets[0][1]]
        for port, entry in zip(inputs, shown, strict=True)
        if "widget" in entry
    ]
    node = {
        "id": len(nodes) + 1,
        "type": whole,
        "title": name,
        "pos": [0, 0],
        "size": [360, 40 + 24 * len(inputs)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": shown,
        "outputs": [{"name": output["name"], "type": output["type"], "links": []} for output in results],
        "properties": {"proxyWidgets": promoted},
        "widgets_values": [],
    }
    outer = {**inner, "nodes": [node], "links": [], "groups": [], "last_node_id": node["id"], "last_link_id": 0}
    return {**outer, "definitions": {"subgraphs": [subgraph]}}


def _socket(node: Json, name: str, schemas: Schemas) -> Json:
    """The node's entry for an input; made if it is a widget without one so far."""
    for entry in node["inputs"]:
        if entry["name"] == name:
            return entry
    declared = schemas[node["type"]]["input"]
    kind = (declared["required"] | declared.get("optional", {}))[name][0]
    entry = {"name": name, "type": kind if isinstance(kind, str) else "COMBO", "widget": {"name": name}, "link": None}
    node["inputs"].append(entry)
    return entry


def _id(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("wanquant", *parts))))
