"""Convert, load by the linked path, sample: one graph for every recipe that the node offers, in a real server."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from wanquant.quant.plan.recipe import RECIPES
from wanquant.testing.comparison import RANDOM
from wanquant.testing.graphs import SOURCE, conversion, dense_model, node, video
from wanquant.testing.server import Graph, GraphError, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.host.workflow_files import unusable_recipes
from wanquant.workflow_generators.canvas import Schemas

pytestmark = pytest.mark.host

# Lower bounds of the SQNR in dB of the latent of a random model, whose errors do not average out as in a trained one.
FLOORS = {"F16": 60, "BF16": 60, "Q8_0": 45, "INT8": 40, "W6A8": 30, "FP8": 25, "MXFP8": 25, "Q4_K_M": 25, "W4A8": 20}
# Where a model is not the one of the file, the SQNR is about 0.
LEAST = 3


@pytest.fixture(scope="module")
def dense(server: HostServer) -> Tensor:
    RANDOM.prepare(server)
    # Smaller than that scene's, as each recipe encodes it.
    write_tiny_wan(server.models / "diffusion_models" / SOURCE, dim=256, ffn_dim=256, layers=2, seed=0)
    # Other modules leave conversions of other sources under the same names.
    for path in (server.models / "diffusion_models").glob(f"{Path(SOURCE).stem}-*"):
        path.unlink()
    return latent(server, dense_model(), "dense")


def latent(server: HostServer, model: Graph, name: str) -> Tensor:
    """Return what two steps on a small clip give: float32, (1, channels, frames, height, width)."""
    graph = video(model, f"every-{name}", 64)
    graph = {key: graph[key] for key in (*model, "prompt", "empty", "sampler", "latent")}
    graph["sampler"]["inputs"]["steps"] = 2
    graph["empty"]["inputs"]["length"] = 5
    (saved,) = server.run(graph)["latent"]["latents"]
    return load_file(server.output / saved["subfolder"] / saved["filename"])["latent_tensor"]


def test_the_node_offers_every_recipe(schemas: Schemas):
    kind, more = schemas["WanQuantConvert"]["input"]["required"]["recipe"]
    assert sorted(more["options"] if kind == "COMBO" else kind) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_convert_load_sample(recipe: str, server: HostServer, schemas: Schemas, dense: Tensor):
    """What the tooltip says this ComfyUI cannot use is refused when it is loaded, and everything else samples."""
    loader = node("WanQuantLoader", model_name="", compute_dtype="default", path=["convert", 0])
    # Without an importance matrix, ggml has no encoder of the smallest types; the search has one for each.
    effort = "best" if recipe.startswith(("IQ1", "IQ2")) else "fast"
    # Other tests convert the same source to the default name, at another effort.
    model = conversion(recipe, effort=effort, output_name=f"every-{recipe}.gguf") | {"model": loader}
    if recipe in unusable_recipes(schemas):
        with pytest.raises(GraphError, match=rf"{recipe} .* this ComfyUI .*; update ComfyUI to 0\.\d+ or newer"):
            latent(server, model, recipe)
        return
    found = latent(server, model, recipe)
    noise = (found - dense).square().sum().item()
    sqnr = 10 * math.log10(dense.square().sum().item() / noise) if noise else math.inf
    assert sqnr > FLOORS.get(recipe, LEAST)
