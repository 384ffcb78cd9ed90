"""Every template in a real browser: dropped on the canvas, and run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from wanquant.testing.graphs import node
from wanquant.testing.server import HostServer
from wanquant.tests.host.browser import Canvas
from wanquant.tests.host.workflow_files import BLUEPRINTS, FILES, MIGRATION, prompt, saved_files, shrunk
from wanquant.workflow_generators import models
from wanquant.workflow_generators.canvas import Box, Node, Schemas, workflow
from wanquant.workflow_generators.tools import COMFYUI_GGUF

pytestmark = pytest.mark.host
# Those that share the CLIP Vision model in a row: the host keeps what it gave for the graph that follows.
IN_ORDER = sorted(FILES, key=lambda path: "CLIPVisionEncode" in path.read_text(encoding="utf-8"))
each_file = pytest.mark.parametrize("path", IN_ORDER, ids=lambda path: path.stem)


@each_file
def test_dropped_template_runs(path: Path, canvas: Canvas, server: HostServer, schemas):
    small = shrunk(json.loads(path.read_text(encoding="utf-8")), schemas)
    canvas.drop(path, json.dumps(small).encode())
    if unknown := {entry["type"] for entry in canvas.nodes() if not entry["known"]}:
        assert path.stem == MIGRATION
        assert unknown == set(COMFYUI_GGUF)
        if server.version().startswith("0.2"):
            pytest.skip("the canvas of this ComfyUI offers replacements in another place")
        canvas.replace_missing()
    assert canvas.errors() == ""
    sent = canvas.prompt()
    for item, expected in prompt(small, schemas).items():
        if expected["class_type"] in unknown:
            continue
        assert sent[item]["class_type"] == expected["class_type"]
        assert sent[item]["inputs"].items() >= expected["inputs"].items(), "every widget has its value"
    places = _places(canvas)
    result = canvas.run()
    assert result["status"]["status_str"] == "success"
    assert unknown or _places(canvas) == places, "texts and pictures have the room that they need"
    assert all(file.stat().st_size for file in saved_files(result["outputs"], server.output))
    assert path.stem != "Check the installation" or "WanQuant: 8 checks passed" in str(result["outputs"])
    assert _overlaps(canvas.nodes()) == []


ADVANCED_WIDGETS = {"dequant_dtype": "target", "patch_dtype": "float16", "patch_on_device": True}
ADVANCED: Schemas = {
    "UnetLoaderGGUFAdvanced": {
        "input": {"required": {"unet_name": ["COMBO"]} | {name: ["COMBO"] for name in ADVANCED_WIDGETS}},
        "output": ["MODEL"],
        "output_name": ["MODEL"],
    }
}


def test_advanced_loader_of_comfyui_gguf_is_replaced(canvas: Canvas, server: HostServer, schemas: Schemas):
    """The other two are in the template for migration."""
    if server.version().startswith("0.2"):
        pytest.skip("the canvas of this ComfyUI offers replacements in another place")
    loader = Node("UnetLoaderGGUFAdvanced", {"unet_name": models.T2V_14B.name, **ADVANCED_WIDGETS})
    shift = Node("ModelSamplingSD3", {"model": ["loader", 0], "shift": 5.0})
    graph = workflow("advanced", [[Box("", {"loader": loader, "shift": shift})]], schemas | ADVANCED)
    canvas.drop(Path("advanced.json"), json.dumps(graph).encode())
    canvas.replace_missing()
    sent = canvas.prompt()
    assert sent["1"]["class_type"] == "WanQuantLoader"
    assert sent["1"]["inputs"].items() >= {"model_name": models.T2V_14B.name, "compute_dtype": "default"}.items()
    assert sent["2"]["inputs"]["model"] == ["1", 0]


def _places(canvas: Canvas) -> list[list[float]]:
    return [entry["rectangle"] for entry in canvas.nodes() if entry["type"].startswith("WanQuant")]


def _overlaps(nodes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    def apart(one: list[float], other: list[float]) -> bool:
        return any(one[i] + one[i + 2] <= other[i] or other[i] + other[i + 2] <= one[i] for i in (0, 1))

    pairs = itertools.combinations(nodes, 2)
    return [(a["type"], b["type"]) for a, b in pairs if not apart(a["rectangle"], b["rectangle"])]


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_is_one_node_whose_widgets_reach_inside(path: Path, canvas: Canvas):
    canvas.drop(path)
    (whole,) = canvas.nodes()
    assert None not in whole["values"]
    shown = canvas.page.evaluate("app.graph.nodes[0].widgets.map(widget => widget.name)")
    (node,) = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    assert shown == [entry["name"] for entry in node["inputs"] if "widget" in entry]
    assert "proxyWidgets" not in node["properties"], "which newer canvases migrate with a warning"
    steps = [entry["inputs"]["steps"] for entry in canvas.prompt().values() if "steps" in entry["inputs"]]
    canvas.page.evaluate("app.graph.nodes[0].widgets.find(widget => widget.name === 'steps').value = 6")
    changed = [entry["inputs"]["steps"] for entry in canvas.prompt().values() if "steps" in entry["inputs"]]
    assert steps in ([20, 20], [30])
    assert changed == [6] * len(steps)


PICTURE = {"picture": node("EmptyImage", width=64, height=64, batch_size=2, color=255)}
SAVED = {
    "png": {"save": node("SaveImage", images=["picture", 0], filename_prefix="graph")},
    "webp": {
        "save": node(
            "SaveAnimatedWEBP",
            images=["picture", 0],
            filename_prefix="graph",
            fps=4.0,
            lossless=True,
            quality=80,
            method="default",
        )
    },
    "mp4": {
        "frames": node("CreateVideo", images=["picture", 0], fps=4.0),
        "save": node("SaveVideo", video=["frames", 0], filename_prefix="graph", format="mp4", codec="h264"),
    },
}


@pytest.mark.parametrize("kind", SAVED)
def test_saved_output_gives_the_graph_back(kind: str, canvas: Canvas, server: HostServer):
    graph = PICTURE | SAVED[kind]
    canvas.drop(Path("graph.json"), json.dumps(graph).encode())
    file, *_ = saved_files(canvas.run()["outputs"], server.output)
    assert file.suffix == f".{kind}"
    canvas.drop(file)
    given_back = canvas.prompt()
    assert given_back.keys() == graph.keys()
    for name, expected in graph.items():
        assert given_back[name]["inputs"].items() >= expected["inputs"].items()


@pytest.mark.parametrize("drawn_by", ["canvas", "HTML"])
def test_text_stays_until_the_node_runs_again(drawn_by: str, canvas: Canvas, server: HostServer):
    """The page itself shows a text only while the node runs."""
    set_drawing = "html => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', html)"
    canvas.page.evaluate(set_drawing, drawn_by == "HTML")
    file = server.models / "diffusion_models" / "text.gguf"
    shutil.copy(file.with_name(models.T2V_14B.name), file)
    canvas.refresh()
    graph = {"inspect": node("WanQuantInspect", model_name=file.name)}
    canvas.drop(Path(f"by {drawn_by}.json"), json.dumps(graph).encode())
    result = canvas.run()
    assert result["status"]["status_str"] == "success"
    (text,) = result["outputs"]["inspect"]["text"]
    box = canvas.page.locator("textarea[readonly]")
    canvas.page.get_by_text("Job completed").first.wait_for()
    expect(box).to_have_value(text)

    saved = canvas.page.evaluate("app.graph.serialize().nodes.map(node => node.widgets_values)")
    assert text not in str(saved) and text not in str(canvas.prompt())

    canvas.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    expect(box).to_have_count(0)
    canvas.page.get_by_text(f"by {drawn_by}", exact=True).first.click()
    expect(box).to_have_value(text)

    file.write_bytes(b"not a GGUF file")
    assert canvas.run()["status"]["status_str"] == "error"
    expect(box).to_have_count(0)
    canvas.page.evaluate(set_drawing, False)


_PLACE_OF_RECIPE = """
() => {
    const node = app.graph.nodes.find(node => node.type === "WanQuantConvert");
    const widget = node.widgets.find(widget => widget.name === "recipe");
    const place = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 8];
    const [left, top] = app.canvas.convertOffsetToCanvas(place);
    const page = app.canvas.canvas.getBoundingClientRect();
    return [page.left + left, page.top + top];
}
"""


def test_tooltip_of_the_recipe_is_that_of_this_host(canvas: Canvas, schemas: Schemas):
    """It names the recipes that this ComfyUI cannot use, which no text in locales/ can know."""
    (path,) = [path for path in FILES if path.stem == "Convert any Wan"]
    canvas.drop(path)
    left, top = canvas.page.evaluate(_PLACE_OF_RECIPE)
    canvas.page.mouse.move(left, top)
    canvas.page.mouse.move(left + 2, top)
    (_, options) = schemas["WanQuantConvert"]["input"]["required"]["recipe"]
    shown = canvas.page.locator(".node-tooltip")
    shown.wait_for()
    assert shown.inner_text() == options["tooltip"]
