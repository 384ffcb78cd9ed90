"""Workflow files of the canvas: smaller settings, and the prompt that the canvas would make of them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from wanquant.testing.hosts import ROOT
from wanquant.testing.server import Graph
from wanquant.workflow_generators.blueprint import INPUT, OUTPUT
from wanquant.workflow_generators.canvas import Json, Schemas, widgets

FILES = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
MIGRATION = "Coming from ComfyUI-GGUF"  # has nodes of another pack
SMALL = {"width": 64, "height": 32, "length": 5, "target_size": 0.003, "effort": "fast"}


def write_files(folder: Path, contents: dict[str, Json]) -> None:
    """Write each under its name, as the canvas would export it."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def unusable_recipes(schemas: Schemas) -> list[str]:
    """The recipes that the tooltip says this ComfyUI cannot use."""
    tooltip = schemas["WanQuantConvert"]["input"]["required"]["recipe"][1]["tooltip"]
    return re.findall(r"(\w+) \(needs [\d.]+ or newer\)", tooltip)


def shrunk(workflow: Json, schemas: Schemas) -> Json:
    """The same graph with sizes and steps that a CPU does in a moment; experts take one step each.

    A recipe that this ComfyUI cannot use becomes FP8, which all can.
    """
    small, unusable = copy.deepcopy(workflow), unusable_recipes(schemas)
    settings = SMALL | {"steps": 2 if any(node["type"] == "KSamplerAdvanced" for node in small["nodes"]) else 1}
    for node in small["nodes"]:
        values = node["widgets_values"]
        for position, (name, _) in enumerate(_named(node, schemas)):
            if name in ("start_at_step", "end_at_step"):
                values[position] = values[position] if values[position] in (0, 10000) else 1
            elif name == "recipe" and values[position] in unusable:
                values[position] = "FP8"
            elif values[position] and isinstance(values[position], type(settings.get(name))):
                values[position] = settings[name]
    return small


def prompt(workflow: Json, schemas: Schemas) -> Graph:
    """What the canvas sends when Run is pressed."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in schemas:
            declared = [name for section in schemas[node["type"]]["input"].values() for name in section]
            inputs = {name: value for name, value in _named(node, schemas) if name in declared}
            inputs |= {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"]}
            title = {"title": node.get("title", "")}
            graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": title}
    return graph


def inside(blueprint: Json, schemas: Schemas, sources: dict[str, list[Any]]) -> tuple[Graph, dict[str, list[Any]]]:
    """What the canvas sends of a blueprint's only node, made small: the nodes in it, and where its outputs come from.

    Args:
        sources: [node, slot] for each of its inputs that is no widget.
    """
    (whole,) = blueprint["definitions"]["subgraphs"]
    rows, nodes = [], copy.deepcopy(whole["nodes"])
    for link in whole["links"]:
        source = [link["origin_id"], link["origin_slot"]]
        if link["origin_id"] == INPUT:
            source = sources.get(whole["inputs"][link["origin_slot"]]["name"], [])
        rows += [[link["id"], *source]] if source else []
    linked = {row[0] for row in rows}
    for entry in (entry for item in nodes for entry in item["inputs"]):
        entry["link"] = entry["link"] if entry["link"] in linked else None  # else a widget with its value
    ends = {
        link["target_slot"]: [str(link["origin_id"]), link["origin_slot"]]
        for link in whole["links"]
        if link["target_id"] == OUTPUT
    }
    outputs = {port["name"]: ends[slot] for slot, port in enumerate(whole["outputs"])}
    return prompt(shrunk({"nodes": nodes, "links": rows}, schemas), schemas), outputs


def saved_files(outputs: dict[str, Any], folder: Path) -> list[Path]:
    """Files that the output nodes of a run wrote below the output folder."""
    entries = [entry for output in outputs.values() for kind in output.values() for entry in kind]
    return [
        folder / e["subfolder"] / e["filename"] for e in entries if isinstance(e, dict) and e.get("type") == "output"
    ]


def _named(node: Json, schemas: Schemas) -> list[tuple[str, Any]]:
    if node["type"] not in schemas:
        return []
    named = widgets(node["type"], schemas)
    return [(widget.name, value) for widget, value in zip(named, node["widgets_values"], strict=False)]
