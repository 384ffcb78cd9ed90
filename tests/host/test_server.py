"""The pack in a real server: import, schemas, refusals, interruption."""

from __future__ import annotations

import urllib.error

import pytest

from wanquant.testing.graphs import SOURCE, conversion, node
from wanquant.testing.server import GraphError, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan

pytestmark = pytest.mark.host

NODES = [
    "WanQuantAdvise",
    "WanQuantCheck",
    "WanQuantCollectImportance",
    "WanQuantCompareLatents",
    "WanQuantConvert",
    "WanQuantExpertPairLoader",
    "WanQuantInspect",
    "WanQuantLoadConditioning",
    "WanQuantLoader",
    "WanQuantLoraLoader",
    "WanQuantLowVRAM",
    "WanQuantModelPatchLoader",
    "WanQuantPreviewDecode",
    "WanQuantSaveConditioning",
    "WanQuantSaveImportance",
    "WanQuantSaveModel",
    "WanQuantSaveRecoveryLora",
    "WanQuantTextEncode",
    "WanQuantTextEncoderLoader",
    "WanQuantTune",
]


def test_imports_under_another_folder_name(server: HostServer):
    log = server.log.read_text()
    assert "renamed_pack-2" in log
    assert "IMPORT FAILED" not in log
    assert "comfy_entrypoint" not in log


def test_lists_every_node(server: HostServer):
    listed = server.get("/object_info")
    ours = {name: info for name, info in listed.items() if name.startswith("WanQuant")}
    assert sorted(ours) == NODES
    assert all(info["category"].startswith("WanQuant") for info in ours.values())


@pytest.mark.parametrize("name", NODES)
def test_serves_a_help_page(server: HostServer, name: str):
    assert server.fetch(f"/extensions/renamed_pack-2/docs/{name}.md").startswith(b"#")


@pytest.mark.parametrize(
    ("class_type", "inputs", "field"),
    [
        ("WanQuantLoader", {"model_name": "absent.gguf", "compute_dtype": "default"}, "model_name"),
        ("WanQuantConvert", {**conversion("Q4_0")["convert"]["inputs"], "source": "absent.safetensors"}, "source"),
        ("WanQuantConvert", {**conversion("Q9_Z")["convert"]["inputs"]}, "recipe"),
    ],
    ids=["model", "source", "recipe"],
)
def test_unknown_names_are_refused(server: HostServer, class_type: str, inputs: dict[str, object], field: str):
    sinks = {
        "latent": node("EmptyHunyuanLatentVideo", width=16, height=16, length=1, batch_size=1),
        "save": node("ModelSave", model=["subject", 0], filename_prefix="never"),
    }
    graph = {"subject": node(class_type, **inputs), **(sinks if class_type == "WanQuantLoader" else {})}
    with pytest.raises(GraphError, match="refused") as refusal:
        server.run(graph)
    errors = refusal.value.details["node_errors"]["subject"]["errors"]
    assert field in str(errors)


def test_unknown_node_is_refused(server: HostServer):
    with pytest.raises(GraphError, match="WanQuantNothing"):
        server.run({"subject": node("WanQuantNothing")})


@pytest.mark.parametrize("name", ["../escaped.gguf", "/escaped.gguf", "model.bin"])
def test_bad_output_name_writes_nothing(server: HostServer, name: str):
    folder = server.models / "diffusion_models"
    write_tiny_wan(folder / SOURCE, layers=1)
    before = sorted(server.base.rglob("*.gguf"))
    with pytest.raises(GraphError, match="output name"):
        server.run(conversion("Q4_0", output_name=name))
    assert sorted(server.base.rglob("*.gguf")) == before


def test_interruption_leaves_no_file(server: HostServer):
    folder = server.models / "diffusion_models"
    write_tiny_wan(folder / "large.safetensors", dim=1024, ffn_dim=4096, layers=4)
    before = sorted(folder.iterdir())
    with pytest.raises(GraphError, match="interrupted"):
        server.run(conversion("Q4_K_M", source="large.safetensors"), lambda event: _interrupt_conversion(server, event))
    assert sorted(folder.iterdir()) == before


def _interrupt_conversion(server: HostServer, event: dict[str, object]) -> None:
    if event["type"] == "progress":
        server.interrupt()


def test_answers_after_refusals_and_interruption(server: HostServer):
    with pytest.raises(urllib.error.HTTPError):
        server.get("/no-such-page")
    assert server.version().count(".") == 2
