"""Sources of publications, and jobs without processes."""

from __future__ import annotations

import pytest

from wanquant.quant.publish import run
from wanquant.quant.publish.job import Job, Result, make
from wanquant.testing.tiny_wan import write_tiny_wan


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [write_tiny_wan(folder / f"wan-{n}.safetensors", layers=1, ffn_dim=512, seed=n) for n in range(2)]


@pytest.fixture
def in_this_process(monkeypatch):
    """Make jobs here, which saves the start of a process, where processes do not matter."""

    def run_here(jobs, workers, threads, on_progress, on_results):
        for job in jobs:
            on_results([Result.from_json(result.json()) for result in make(Job.from_json(job.json()), 1)])

    monkeypatch.setattr(run, "run_in_processes", run_here)
