"""A conversion as a person follows it in the browser: cancelled by ComfyUI's button, chosen after a refresh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wanquant.testing.graphs import conversion, node
from wanquant.testing.server import Graph, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.host.browser import Canvas

pytestmark = pytest.mark.host

SMALL, LARGE, NAME = "browser.safetensors", "browser-large.safetensors", "browser-new.gguf"


def drop(canvas: Canvas, graph: Graph) -> None:
    canvas.drop(Path("graph.json"), json.dumps(graph).encode())


def choices(canvas: Canvas) -> list[Any]:
    """Files that the loader on the canvas offers."""
    find = "app.graph.nodes.find(node => node.type === 'WanQuantLoader')"
    return canvas.page.evaluate(f"{find}.widgets.find(widget => widget.name === 'model_name').options.values")


def test_cancelled_conversion_leaves_nothing_and_the_next_one_is_offered(canvas: Canvas, server: HostServer):
    folder = server.models / "diffusion_models"
    write_tiny_wan(folder / SMALL, layers=1)
    write_tiny_wan(folder / LARGE, dim=1024, ffn_dim=4096, layers=8)
    before = sorted(folder.iterdir())
    canvas.refresh()
    drop(canvas, conversion("Q4_K_M", source=LARGE))
    run = canvas.start()
    canvas.page.wait_for_function("app.graph.nodes[0].progress > 0", timeout=120_000)
    canvas.cancel()
    result = canvas.result(run, timeout=120)
    assert "execution_interrupted" in str(result["status"]["messages"])
    assert sorted(folder.iterdir()) == before

    loader = node("WanQuantLoader", model_name="", compute_dtype="default")
    drop(canvas, {**conversion("Q4_0", source=SMALL, output_name=NAME, effort="fast"), "loader": loader})
    assert canvas.run()["status"]["status_str"] == "success"
    assert NAME not in choices(canvas)
    canvas.refresh()
    assert NAME in choices(canvas)
