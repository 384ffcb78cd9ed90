"""Wan Low VRAM through the server: the same latent as without it."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from torch import Tensor

from wanquant.testing.comparison import RANDOM
from wanquant.testing.graphs import node, quantized_model, video
from wanquant.testing.server import Event, Graph, GraphError, HostServer

pytestmark = pytest.mark.host

SIDE, FRAMES = 384, 17
# Between what stock and lean take of such a video.
BUDGET_GIB = 0.74


def limited(gib: float) -> Graph:
    """A quantized model behind the node; node `model` gives MODEL, node `text` shows the prediction."""
    graph = quantized_model("Q8_0")
    low_vram = node("WanQuantLowVRAM", model=["loader", 0], budget_gib=gib, width=SIDE, height=SIDE, frames=FRAMES)
    return {**graph, "loader": graph["model"], "model": low_vram}


def clip(model: Graph, name: str) -> Graph:
    """`video` of another size, in one step, and its latent alone."""
    graph = video(model, name)
    graph["empty"]["inputs"] |= {"width": SIDE, "height": SIDE, "length": FRAMES}
    graph["sampler"]["inputs"] |= {"steps": 1}
    return {key: graph[key] for key in (*model, "prompt", "empty", "sampler", "latent")}


def latent(server: HostServer, model: Graph, name: str) -> Tensor:
    (entry,) = server.run(clip(model, name))["latent"]["latents"]
    return load_file(server.output / entry["subfolder"] / entry["filename"])["latent_tensor"]


def test_same_latent_within_the_budget(server: HostServer):
    RANDOM.prepare(server)
    expected = latent(server, quantized_model("Q8_0"), "free")
    for gib, how in ((BUDGET_GIB, "of heads"), (24, "own forward")):
        got = latent(server, limited(gib), f"budget-{gib}")
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        log = server.log.read_text()
        assert f"384x384, 17 frames in {gib:.2f} GiB: predicted peak 0.7" in log
        assert how in log


def test_refuses_before_the_first_step(server: HostServer):
    RANDOM.prepare(server)
    with pytest.raises(GraphError, match="384x384, 17 frames needs at least"):
        server.run(clip(limited(0.3), "never"))


MOST_LINES = 5
"""A run of the most that this pack does is told in this many lines of the log, so that people read them."""


@pytest.mark.parametrize("precision", ["exact", "auto"])
def test_log_of_a_whole_run_is_short(precision: str, server: HostServer):
    """It converts, loads, keeps a budget and samples; one line says precision, plan and peak."""
    RANDOM.prepare(server)
    graph = clip(limited(24), f"log-{precision}")
    graph["convert"]["inputs"] |= {"output_name": f"log-{precision}.gguf"}
    graph["loader"]["inputs"] |= {"precision": precision}
    before = len(server.pack_log.read_text(encoding="utf-8").splitlines())
    events: list[Event] = []
    server.run(graph, events.append)
    seen = [(event["type"], event["data"]) for event in events]
    (said,) = [place for place, (kind, data) in enumerate(seen) if kind == "executed" and data["node"] == "model"]
    first_step = next(
        place for place, (kind, data) in enumerate(seen) if kind == "progress" and data["node"] == "sampler"
    )
    assert said < first_step and "own forward" in seen[said][1]["output"]["text"][0]
    lines = server.pack_log.read_text(encoding="utf-8").splitlines()[before:]
    assert len(lines) <= MOST_LINES, lines
    (told,) = [line for line in lines if "predicted peak" in line]
    for what in ("precision exact", "GiB", "own forward"):
        assert what in told
