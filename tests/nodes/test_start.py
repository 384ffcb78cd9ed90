"""The nodes that start in a ComfyUI that the pack does not fit."""

from __future__ import annotations

import logging
import sys

import comfy.model_management
import pytest


@pytest.fixture
def nodes(monkeypatch):
    """The nodes package, which imports its model nodes again."""
    import wanquant.nodes as nodes

    for name in ("load_diffusion_model", "load_expert_pair", "low_vram"):
        monkeypatch.delitem(sys.modules, f"wanquant.nodes.{name}", raising=False)
        monkeypatch.delattr(nodes, name, raising=False)
    return nodes


def node_ids(nodes):
    # Run by hand, because asyncio.run refuses while the browser tests keep their event loop running.
    with pytest.raises(StopIteration) as done:
        nodes.WanQuantExtension().get_node_list().send(None)
    return {node.__name__ for node in done.value.value}


def test_file_nodes_stay_when_model_nodes_cannot_be_imported(nodes, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wanquant.ops.loading.native_model", None)
    ids = node_ids(nodes)
    assert {"WanQuantConvert", "WanQuantInspect", "WanQuantSaveRecoveryLora"} <= ids
    assert "WanQuantLoader" not in ids
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "the nodes that load models cannot start" in record.getMessage()
    assert "but Convert to Quantized Model and GGUF Info work; update WanQuant" in record.getMessage()


def test_changed_call_is_reported_at_start(nodes, monkeypatch, caplog):
    monkeypatch.delattr(comfy.model_management, "free_memory")
    assert "WanQuantLoader" in node_ids(nodes), "it refuses when it runs"
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "there is no comfy.model_management.free_memory" in record.getMessage()


@pytest.mark.parametrize("name", ["ComfyUI-WanQuant-0.2.0", "ComfyUI-WanQuant (1)", "モデル"])
def test_folder_that_the_page_does_not_find_is_warned_of(nodes, caplog, name):
    nodes.check_folder_name(name)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"named {name!r}" in record.getMessage() and "rename the folder" in record.getMessage()


@pytest.mark.parametrize("name", ["ComfyUI-WanQuant", "wanquant", "renamed_pack-2"])
def test_usual_folders_are_not_warned_of(nodes, caplog, name):
    nodes.check_folder_name(name)
    assert caplog.records == []
