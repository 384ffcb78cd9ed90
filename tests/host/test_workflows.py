"""Every template runs in a real server, on tiny models under the names it asks for, to a saved file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from wanquant.bench.harness import RESULTS
from wanquant.bench.template_memory import TEMPLATES
from wanquant.testing.graphs import node
from wanquant.testing.hosts import DEFAULT_HOST, ROOT
from wanquant.testing.server import HostServer
from wanquant.tests.host.browser import CHROMIUM
from wanquant.tests.host.workflow_files import (
    BLUEPRINTS,
    FILES,
    MIGRATION,
    inside,
    prompt,
    saved_files,
    shrunk,
    write_files,
)
from wanquant.workflow_generators import models
from wanquant.workflow_generators.blueprints import blueprints
from wanquant.workflow_generators.canvas import Json, workflow
from wanquant.workflow_generators.gallery import Template, templates
from wanquant.workflow_generators.thumbnail import draw

pytestmark = pytest.mark.host
MADE = {"wan2.1_t2v_1.3B-calibrated.gguf", "wan2.1_t2v_1.3B-tuned.gguf"}
"""The names of files that a template writes."""
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_files_are_those_of_the_templates(server: HostServer, schemas, pytestconfig):
    if server.version() != DEFAULT_HOST:
        pytest.skip(f"drawn with the nodes of ComfyUI {DEFAULT_HOST}")
    drawn = {title: workflow(title, template.columns, schemas) for title, template in templates().items()}
    if pytestconfig.getoption("update"):
        write_files(ROOT / "workflows", drawn)
        write_files(ROOT / "subgraphs", blueprints(schemas))
        for title, template in templates().items():
            _thumbnail(template).save(ROOT / "workflows" / f"{title}.jpg", quality=88)
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: _graph(file) for name, file in files.items()} == {name: _graph(file) for name, file in drawn.items()}
    inside = {path.stem: _inside(json.loads(path.read_text(encoding="utf-8"))) for path in BLUEPRINTS}
    assert inside == {name: _inside(content) for name, content in blueprints(schemas).items()}


def _thumbnail(template: Template) -> Image.Image:
    return draw(template.given, template.made, template.remark)


@each_file
def test_thumbnail_is_the_drawing(path: Path):
    """Up to JPEG, and to the font of another Pillow."""
    with Image.open(path.with_suffix(".jpg")) as file:
        kept = np.asarray(file.convert("RGB"), dtype=np.float32)
    drawn = np.asarray(_thumbnail(templates()[path.stem]), dtype=np.float32)
    assert kept.shape == drawn.shape
    assert np.abs(kept - drawn).mean() < 4
    others = (np.asarray(_thumbnail(t), dtype=np.float32) for title, t in templates().items() if title != path.stem)
    assert all(np.abs(kept - drawn).mean() <= np.abs(kept - other).mean() for other in others)


@each_file
def test_template_opens_with_text_on_a_full_hd_screen(path: Path):
    """ComfyUI shows a template in three quarters of the window, and text from a zoom of 57 % on."""
    file = json.loads(path.read_text(encoding="utf-8"))
    areas = [node["pos"] + node["size"] for node in file["nodes"]] + [group["bounding"] for group in file["groups"]]
    width, height = (max(area[axis] + area[axis + 2] for area in areas) for axis in (0, 1))
    assert 0.75 * min(1920 / width, 1080 / height) > 0.57 or path.stem == "What quantization costs"


def _inside(file: Json) -> Json:
    return _graph(file["definitions"]["subgraphs"][0])


def _graph(file: Json) -> Json:
    """All but the layout, which moves a little whenever a node gets another widget."""
    parts = ("type", "title", "inputs", "widgets_values", "properties")
    return {"links": file["links"], "nodes": [{part: node.get(part) for part in parts} for node in file["nodes"]]}


# With a browser, test_browser.py runs all of them, and checks that the canvas sends these prompts. There, it first puts
# our nodes in the place of another pack's; here, the server does.
SERVED = [path for path in FILES if CHROMIUM is None or path.stem == MIGRATION]


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.stem)
def test_template_runs_to_a_saved_file(path: Path, server: HostServer, schemas, tiny_models):
    small = shrunk(json.loads(path.read_text(encoding="utf-8")), schemas)
    outputs = server.run(prompt(small, schemas))
    written = saved_files(outputs, server.output)
    assert written or (path.stem == "Check the installation" and "checks passed" in str(outputs))
    assert all(file.stat().st_size for file in written)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_samples(path: Path, server: HostServer, schemas, tiny_models):
    around = {
        "clip": node("WanQuantTextEncoderLoader", encoder_name=models.UMT5.name, type="wan"),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text="a red ball"),
        "empty": node("EmptyHunyuanLatentVideo", width=128, height=64, length=5, batch_size=1),
        "vae": node("VAELoader", vae_name=models.VAE_21.name),
    }
    sources = {"positive": "prompt", "negative": "prompt", "latent_image": "empty", "vae": "vae"}
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    graph, outputs = inside(blueprint, schemas, {name: [source, 0] for name, source in sources.items()})
    savers = {"LATENT": ("SaveLatent", "samples"), "IMAGE": ("SaveImage", "images")}
    for name in outputs.keys() & savers.keys():
        kind, socket = savers[name]
        graph["save"] = node(kind, **{socket: outputs[name]}, filename_prefix="blueprint")
    written = saved_files(server.run(around | graph), server.output)
    assert written
    assert all(file.stat().st_size for file in written)


def test_template_browser_lists_them_with_thumbnails(server: HostServer):
    assert sorted(server.get("/workflow_templates")["renamed_pack-2"]) == sorted(path.stem for path in FILES)
    for path in FILES:
        base = f"/api/workflow_templates/renamed_pack-2/{quote(path.stem)}"
        assert server.fetch(f"{base}.json") == path.read_bytes()
        assert server.fetch(f"{base}.jpg").startswith(b"\xff\xd8")


def test_node_library_lists_the_blueprints(server: HostServer):
    listed = server.get("/global_subgraphs").values()
    ours = {entry["name"] for entry in listed if entry["info"]["node_pack"].startswith("custom_nodes.")}
    assert ours == {path.stem for path in BLUEPRINTS}


def _read_me(path: Path) -> str:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (text,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    return text


@each_file
def test_read_me_names_every_file(path: Path):
    text = path.read_text(encoding="utf-8")
    asked = set(re.findall(r'"([^"/\s]+\.(?:gguf|safetensors))"', text)) - MADE
    read_me = _read_me(path)
    assert asked == set(re.findall(r"\[([^\]]+)\]\(https:", read_me))
    known = {value.url for value in vars(models).values() if isinstance(value, models.Model)}
    known |= {file.url for pair in (models.T2V_A14B, models.I2V_A14B) for file in pair}
    assert set(re.findall(r"\((https:[^)]+)\)", read_me)) <= known
    sizes = re.findall(r"\(https:[^)]+\), (\d+\.\d) GiB", read_me)
    assert len(sizes) == read_me.count("](https:")


@each_file
def test_read_me_is_short_and_says_what_memory_it_needs(path: Path):
    title, text = _read_me(path).partition("## Files")[0].split("\n", 1)
    assert title == f"# {path.stem}"
    assert len(text.split()) <= 80
    samples = any(node["type"].startswith("KSampler") for node in json.loads(path.read_text(encoding="utf-8"))["nodes"])
    assert ("GiB of VRAM" in text and "(simulated)" in text) == samples
    assert (path.stem in TEMPLATES) == samples
    if samples:
        rows = json.loads((RESULTS / "template-memory-simulated.json").read_text(encoding="utf-8"))["rows"]
        (row,) = (row for row in rows if row["model"] == TEMPLATES[path.stem])
        sizes = sorted(map(float, re.findall(r"(\d+\.\d) GiB (?:of VRAM|with \*\*Wan Low VRAM|\(sim)", text)))
        assert sizes[-1] == round(row["stock_gib"], 1)
        assert all(row["least_gib"] <= size for size in sizes)
