"""The main job through the server: convert, load by the linked path, sample, decode and save in one graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanquant.testing.comparison import DENSE, RANDOM, TRAINED, Run, sample
from wanquant.testing.server import HostServer

pytestmark = pytest.mark.host

# Random weights at 1/sqrt(fan-in), fixed seed, float32 arithmetic, at most 10 steps, cfg 1.
FLOOR_DB = {"Q8_0": 52, "Q4_K_M": 34}


@pytest.fixture(scope="module")
def dense(server: HostServer) -> Run:
    RANDOM.prepare(server)
    return sample(server, RANDOM, DENSE)


@pytest.mark.parametrize("recipe", FLOOR_DB)
def test_latent_stays_close_to_the_unquantized_run(server: HostServer, dense: Run, recipe: str):
    run = sample(server, RANDOM, recipe)
    assert run.sqnr_db(dense) >= FLOOR_DB[recipe]
    assert run.nbytes < dense.nbytes
    assert len(run.outputs["frames"]) == 5
    assert run.outputs["video"][0].stat().st_size > 0


def test_trained_model_comes_closer_with_every_bit(tmp_path: Path):
    """Uses a server of its own, since the checkpoints have the same name."""
    with HostServer(tmp_path, log=tmp_path / "comfyui.log") as server:
        TRAINED.prepare(server)
        dense = sample(server, TRAINED, DENSE)
        runs = [sample(server, TRAINED, recipe) for recipe in ("Q2_K", "Q4_0", "Q8_0")]
    sizes, closeness = [run.nbytes for run in runs], [run.sqnr_db(dense) for run in runs]
    assert sizes == sorted(sizes)
    assert closeness == sorted(closeness)
    assert closeness[-1] > 50
