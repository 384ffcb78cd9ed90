"""A publication on a Ray cluster of several nodes, on the loopback of this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

from wanquant.quant import QuantError, convert
from wanquant.quant.files.atomic_file import AtomicFile
from wanquant.quant.publish import node
from wanquant.quant.publish.job import Options
from wanquant.quant.publish.request import Request
from wanquant.quant.publish.run import publish
from wanquant.quant.publish.worker import PACK
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.conftest import ROOT

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install ray")
LOOPBACK = "127.0.0.1"


@pytest.fixture
def cluster(monkeypatch):
    # Ray reads them when it is imported: without the first, it looks for the address of this machine in its network.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, node_ip_address=LOOPBACK)
    yield cluster
    cluster.shutdown()


@needs_ray
def test_a_node_dies_and_another_has_another_version(cluster, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "quant", other / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "quant" / "units.py").write_text("")
    good = [cluster.add_node(num_cpus=1, node_ip_address=LOOPBACK) for _ in range(2)]
    bad = {"num_cpus": 1, "node_ip_address": LOOPBACK, "env_vars": {node.PATH_VARIABLE: str(other)}}
    cluster.add_node(**bad)

    sources = [write_tiny_wan(tmp_path / f"wan-{n}.safetensors", layers=1, seed=n) for n in range(2)]
    recipes = ["IQ3_S", "INT8"]  # the first takes long enough to meet both nodes at work
    busy, killed = set(), []

    def kill(node):
        killed.append(node)
        cluster.remove_node(node, allow_graceful=False)

    def replace_one(worker, done, total, name):
        busy.add(worker)
        if len(busy) == 2 and not killed:
            kill(good[0])
            cluster.add_node(**bad)  # which is idle, and was not asked

    request = Request(sources, tmp_path / "out", recipes)
    made = publish(request, ray=cluster.address, on_progress=replace_one)
    assert made.ok and len(made.results) == 4, made.text()
    (warning,) = made.warnings
    assert "has another version of WanQuant" in warning

    made_bytes = [result.destination.read_bytes() for result in made.results]
    for result, content in zip(made.results, made_bytes, strict=True):
        source = next(source for source in sources if source.stem == result.destination.parent.name)
        recipe = result.destination.stem.removeprefix(f"{source.stem}-")
        assert convert(source, tmp_path / result.destination.name, recipe).path.read_bytes() == content
    assert not list((tmp_path / "out").rglob("*.tmp")) and not list((tmp_path / "out").rglob("*.journal"))

    one, *rest = (result.destination for result in made.results)
    times = [path.stat().st_mtime_ns for path in rest]
    one.unlink()
    again = publish(request, ray=cluster.address, on_progress=lambda *_: good[1] in killed or kill(good[1]))
    assert [result.reused for result in again.results] == [False, *(True for _ in rest)]
    assert times == [path.stat().st_mtime_ns for path in rest]
    assert "no node is left that can help; start one" in again.results[0].why


@needs_ray
def test_an_address_without_cluster(tmp_path):
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=512)
    request = Request([source], tmp_path / "out", ["Q8_0"], options=Options("fast"))
    with pytest.raises(QuantError, match=r"Ray cluster 127\.0\.0\.1:1: cannot be reached"):
        publish(request, ray=f"{LOOPBACK}:1")


def test_without_ray_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=512)
    request = Request([source], tmp_path / "out", ["Q8_0"], options=Options("fast"))
    with pytest.raises(QuantError, match="pip install ray"):
        publish(request, ray="auto")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_what_a_node_must_have(tmp_path, monkeypatch):
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=512)
    with AtomicFile(tmp_path / "a", 0) as file:
        file.write(b"token")
        file.flush()
        expected = {
            "pack": str(PACK),
            "digest": node.digest_of_code(str(PACK)),
            "versions": node.versions_of_libraries(),
            "files": [(str(source), source.stat().st_size)],
            "token": (str(tmp_path / ".a.tmp"), "token"),
        }
        assert node.fault_of_node(expected) == ""
        wrong = {
            "has no WanQuant at": {"pack": os.devnull},
            "has another version of WanQuant": {"digest": "0"},
            "which give the same bytes": {"versions": "torch 1.0"},
            "does not see the folder": {"token": (str(tmp_path / ".a.tmp"), "of another folder")},
            "does not see": {"files": [(str(tmp_path / "gone.safetensors"), 1)]},
        }
        for text, change in wrong.items():
            assert text in node.fault_of_node(expected | change)
    monkeypatch.setenv(node.PATH_VARIABLE, "/elsewhere")
    assert node.pack_on_node("/here") == "/elsewhere"
