"""Encode Prompt (cached) in real servers: what one has encoded, every later one finds, without the encoder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wanquant.testing.graphs import node
from wanquant.testing.server import Graph, GraphError, HostServer

pytestmark = pytest.mark.host

ENCODER = "umt5.gguf"
KEPT = Path("user", "__wanquant", "prompts")


@pytest.fixture(scope="module")
def encoder(server: HostServer) -> Path:
    from wanquant.tests.host.tiny_models import write_text_encoder  # imports the host

    path = server.models / "text_encoders" / ENCODER
    write_text_encoder(path)
    return path


@pytest.fixture(scope="module")
def second(server: HostServer, encoder: Path) -> Iterator[HostServer]:
    """Another process with the same folders."""
    with HostServer(server.base, folder=server.folder, log=server.base / "second.log") as running:
        yield running


def graph(positive: str, negative: str, name: str) -> Graph:
    return {
        "prompt": node("WanQuantTextEncode", encoder_name=ENCODER, type="wan", positive=positive, negative=negative),
        "save": node("WanQuantSaveConditioning", conditioning=["prompt", 0], name=f"{name}.safetensors"),
        "other": node("WanQuantSaveConditioning", conditioning=["prompt", 1], name=f"{name}-negative.safetensors"),
    }


def kept(server: HostServer) -> set[Path]:
    return set((server.base / KEPT).glob("*"))


def encoded(server: HostServer, positive: str, negative: str, name: str) -> list[bytes]:
    """Run the node; the files with both results."""
    server.run(graph(positive, negative, name))
    folder = server.output / "conditioning"
    return [(folder / f"{stem}.safetensors").read_bytes() for stem in (name, f"{name}-negative")]


def test_an_unchanged_prompt_never_reads_the_encoder_again(encoder: Path, server: HostServer, second: HostServer):
    before = kept(server)
    both = encoded(server, "a fox", "a dog", "first")
    assert both[0] != both[1]
    assert len(kept(server) - before) == 2
    content, status = encoder.read_bytes(), encoder.stat()
    encoder.write_bytes(bytes(len(content)))  # of the same size and time, but no server can load it
    os.utime(encoder, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        assert encoded(second, "a fox", "a dog", "second") == both
        assert encoded(second, "a dog", "a fox", "second") == both[::-1]
        with pytest.raises(GraphError, match=ENCODER):
            encoded(second, "a fox", "a new text", "second")
        damaged = max(kept(server) - before)
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-1])
        with pytest.raises(GraphError, match=ENCODER):
            encoded(server, "a dog", "a fox", "third")
    finally:
        encoder.write_bytes(content)
        os.utime(encoder, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert encoded(server, "a dog", "a fox", "third") == both[::-1]
    assert damaged.read_bytes() == whole, "it is made again"
    os.utime(encoder)
    assert encoded(server, "a fox", "a dog", "fourth") == both
    assert len(kept(server) - before) == 4, "a file of another time counts as another encoder"


def test_two_servers_encode_the_same_prompt_at_once(server: HostServer, second: HostServer):
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(encoded, each, "at once", "at once too", f"at-once-{index}")
            for index, each in enumerate((server, second))
        ]
        results = [job.result() for job in jobs]
    assert results[0] == results[1]
    assert all(path.suffix == ".safetensors" for path in kept(server))
