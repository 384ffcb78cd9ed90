"""The pictures of the documentation: each page shows its node as the canvas draws it today, the README three."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from wanquant.testing.hosts import DEFAULT_HOST, ROOT
from wanquant.testing.server import HostServer
from wanquant.tests.host import help_graph
from wanquant.tests.host.browser import Canvas
from wanquant.tests.host.test_server import NODES
from wanquant.workflow_generators.canvas import Schemas, workflow

pytestmark = pytest.mark.host
UPDATE = "the node has changed: dev.py test tests/host --update"


def _skip_other_hosts(server: HostServer) -> None:
    if server.version() != DEFAULT_HOST:
        pytest.skip(f"drawn with ComfyUI {DEFAULT_HOST}")


@pytest.fixture(scope="module")
def every_node(canvas: Canvas, server: HostServer, schemas: Schemas) -> Iterator[Canvas]:
    _skip_other_hosts(server)
    help_graph.prepare(server)
    canvas.refresh()
    canvas.drop(Path("help.json"), json.dumps(workflow("help", help_graph.columns(), schemas)).encode())
    assert canvas.run()["status"]["status_str"] == "success"
    assert canvas.errors() == ""
    yield canvas
    canvas.close_panel()


@pytest.mark.parametrize("kind", NODES)
def test_page_shows_the_node_as_it_is(kind: str, every_node: Canvas, pytestconfig: pytest.Config):
    path = ROOT / "web" / "docs" / "images" / f"{kind}.png"
    picture = every_node.close_up(help_graph.SHOWN.get(kind, (kind,)))
    if pytestconfig.getoption("update"):
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    shown = every_node.help_picture(kind)
    assert shown == Image.open(path).size
    assert shown == pytest.approx(picture.size, abs=4), UPDATE


def test_readme_shows_three_linked_nodes(
    canvas: Canvas, server: HostServer, schemas: Schemas, pytestconfig: pytest.Config
):
    _skip_other_hosts(server)
    canvas.drop(Path("readme.json"), json.dumps(help_graph.readme_graph(schemas)).encode())
    sent = canvas.prompt().values()
    assert [entry["inputs"].get("model") for entry in sent] == [None, ["1", 0], ["2", 0]]
    assert canvas.errors() == ""
    canvas.close_panel()
    picture = canvas.close_up([entry["class_type"] for entry in sent], links=True)
    path = ROOT / "docs" / "images" / "canvas.png"
    if pytestconfig.getoption("update"):
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert picture.size == pytest.approx(Image.open(path).size, abs=4), UPDATE
