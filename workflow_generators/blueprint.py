"""Graphs as one node: subgraph blueprints, which the canvas lists in its node library.

Source: the blueprints of ComfyUI 0.30.0 (blueprints/*.json); SerialisableGraph in the ComfyUI frontend's litegraph.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from .canvas import Columns, Json, Schemas, workflow

INPUT, OUTPUT = -10, -20  # the node ids of the two ends of a subgraph


class Input(NamedTuple):
    """A socket or widget of the blueprint: its outer name, and the (node id, input) pairs that it sets."""

    name: str
    targets: Sequence[tuple[str, str]]


class Output(NamedTuple):
    """An output of the blueprint: its outer name, and the node and slot that it comes from."""

    name: str
    node: str
    slot: int


_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def blueprint(
    name: str, description: str, columns: Columns, inputs: Sequence[Input], outputs: Sequence[Output], schemas: Schemas
) -> Json:
    """Return the file of one blueprint; the same graph always gives the same file."""
    inner = workflow(name, columns, schemas)
    keys = [key for column in columns for box in column for key in box.nodes]
    nodes = dict(zip(keys, inner["nodes"], strict=True))
    links = [dict(zip(_LINK, link, strict=True)) for link in inner["links"]]
    sockets = [[_Socket.of(nodes[key], socket, schemas) for key, socket in port.targets] for port in inputs]
    # Links are numbered in the order of their creation: those of the inputs come first.
    ports = [
        _port(name, "input", port.name, [socket.link(slot, links) for socket in entries])
        for slot, (port, entries) in enumerate(zip(inputs, sockets, strict=True))
    ]
    results = [
        _port(name, "output", output.name, [_result(nodes[output.node], output.slot, slot, links)])
        for slot, output in enumerate(outputs)
    ]
    subgraph = {
        "id": _id(name, "subgraph", ""),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "description": description,
        "category": "WanQuant",
        **_ends(inner["nodes"], len(inputs), len(outputs)),
        "inputs": ports,
        "outputs": results,
        "widgets": [],
        "nodes": inner["nodes"],
        "groups": inner["groups"],
        "links": links,
        "extra": {},
    }
    node = _whole(subgraph, [entries[0] for entries in sockets])
    outer = {**inner, "nodes": [node], "links": [], "groups": [], "last_node_id": node["id"], "last_link_id": 0}
    return {**outer, "definitions": {"subgraphs": [subgraph]}}


class _Socket(NamedTuple):
    """An input of an inner node that an input of the blueprint sets."""

    node: Json
    entry: Json

    @classmethod
    def of(cls, node: Json, name: str, schemas: Schemas) -> _Socket:
        """Return a socket, and make its entry if it is a widget without one."""
        for entry in node["inputs"]:
            if entry["name"] == name:
                return cls(node, entry)
        declared = schemas[node["type"]]["input"]
        kind = (declared["required"] | declared.get("optional", {}))[name][0]
        kind = kind if isinstance(kind, str) else "COMBO"
        node["inputs"].append({"name": name, "type": kind, "widget": {"name": name}, "link": None})
        return cls(node, node["inputs"][-1])

    def link(self, slot: int, links: list[Json]) -> Json:
        """Add the link from the blueprint's input `slot`."""
        position = self.node["inputs"].index(self.entry)
        made = _link(links, INPUT, slot, self.node["id"], position, self.entry["type"])
        self.entry["link"] = made["id"]
        return made


def _result(node: Json, origin_slot: int, slot: int, links: list[Json]) -> Json:
    """Add the link from an inner node to the blueprint's output `slot`."""
    source = node["outputs"][origin_slot]
    made = _link(links, node["id"], origin_slot, OUTPUT, slot, source["type"])
    source["links"].append(made["id"])
    return made


def _link(links: list[Json], *ends: int | str) -> Json:
    """Add a link, numbered from 1; `ends` are all fields but its id."""
    links.append(dict(zip(_LINK, (len(links) + 1, *ends), strict=True)))
    return links[-1]


def _port(whole: str, end: str, name: str, links: Sequence[Json]) -> Json:
    numbers = [link["id"] for link in links]
    return {"id": _id(whole, end, name), "name": name, "type": links[0]["type"], "linkIds": numbers}


def _ends(nodes: Sequence[Json], inputs: int, outputs: int) -> Json:
    """Return the columns of sockets left and right of the nodes."""
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    return {
        "inputNode": {"id": INPUT, "bounding": [-220, 0, 160, 40 + 20 * inputs]},
        "outputNode": {"id": OUTPUT, "bounding": [right + 60, 0, 160, 40 + 20 * outputs]},
    }


def _whole(subgraph: Json, sockets: Sequence[_Socket]) -> Json:
    """Return the node that represents the subgraph; `sockets` are the first inner input of each of its inputs.

    An input that sets a widget shows it. Canvases until 2026 wanted these listed in a property.
    """
    ports = list(zip(subgraph["inputs"], sockets, strict=True))
    return {
        "id": len(subgraph["nodes"]) + 1,
        "type": subgraph["id"],
        "title": subgraph["name"],
        "pos": [0, 0],
        "size": [360, 40 + 24 * len(ports)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {
                "name": port["name"],
                "type": socket.entry["type"],
                **({"widget": {"name": port["name"]}} if "widget" in socket.entry else {}),
                "link": None,
            }
            for port, socket in ports
        ],
        "outputs": [{"name": port["name"], "type": port["type"], "links": []} for port in subgraph["outputs"]],
        "properties": {},
        "widgets_values": [],
    }


def _id(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("wanquant", *parts))))
