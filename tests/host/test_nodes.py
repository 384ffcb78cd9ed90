"""Nodes in a real server: reuse and refusal of conversions, and the nodes that show something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.ops.conditioning import save_conditioning
from wanquant.quant import open_gguf
from wanquant.testing.graphs import PROMPT, STEPS, conversion, node, video
from wanquant.testing.server import Event, GraphError, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan

pytestmark = pytest.mark.host

NAME = "job.safetensors"
SAVED = {"folder": "diffusion_models", "overwrite": False, "effort": "fast", "device": "cpu"}


@pytest.fixture(scope="module")
def target(server: HostServer) -> Path:
    folder = server.models / "diffusion_models"
    write_tiny_wan(folder / NAME, layers=1)
    return folder / "job-Q4_0.gguf"


def convert(server: HostServer, **inputs: object) -> str:
    """The text shown under the node."""
    return server.run(conversion("Q4_0", source=NAME, **inputs))["convert"]["text"][0]


def test_result_of_the_same_job_is_reused(server: HostServer, target: Path):
    assert "written in" in convert(server)
    written = target.stat().st_mtime_ns
    assert "up to date" in convert(server)
    assert target.stat().st_mtime_ns == written
    target.unlink()
    assert "written in" in convert(server)
    assert target.exists(), "a deleted result is made again"


def test_progress_names_the_tensors(server: HostServer, target: Path):
    target.unlink(missing_ok=True)
    events: list[Event] = []
    server.run(conversion("Q4_0", source=NAME), events.append)
    of_node = [(event["type"], event["data"]) for event in events if event["data"].get("node") == "convert"]
    (done, total), *_ = [(data["value"], data["max"]) for kind, data in reversed(of_node) if kind == "progress"]
    names = [data["text"] for kind, data in of_node if kind == "progress_text"]
    assert done == total
    assert names
    assert set(names) <= open_gguf(target).tensors.keys()


def test_new_file_can_be_chosen_after_refresh(server: HostServer, target: Path):
    name = "only-now.gguf"

    def choices() -> str:
        return str(server.get("/object_info/WanQuantLoader")["WanQuantLoader"]["input"]["required"]["model_name"])

    assert name not in choices()
    convert(server, output_name=name)
    assert name in choices()


def test_converted_again_under_the_same_name_reloads(server: HostServer, target: Path):
    convert(server, overwrite=True)
    graph = {
        "loader": node("WanQuantLoader", model_name=target.name, compute_dtype="default"),
        "sigmas": node("BasicScheduler", model=["loader", 0], scheduler="simple", steps=2, denoise=1.0),
        "show": node("PreviewAny", source=["sigmas", 0]),
    }

    def runs_loader() -> bool:
        events: list[Event] = []
        server.run(graph, events.append)
        return any(event["type"] == "executing" and event["data"]["node"] == "loader" for event in events)

    assert runs_loader()
    assert not runs_loader()
    server.run(conversion("Q8_0", source=NAME, output_name=target.name, overwrite=True))
    assert runs_loader()


@pytest.mark.parametrize("source", ["typed", "constant"])
def test_changed_file_at_a_path_reloads(server: HostServer, target: Path, source: str):
    convert(server, overwrite=True)
    moved = target.rename(server.models / f"{source}.gguf")
    path = {"typed": str(moved), "constant": ["path", 0]}[source]
    graph = {
        "loader": node("WanQuantLoader", model_name=NAME, compute_dtype="default", path=path),
        "sigmas": node("BasicScheduler", model=["loader", 0], scheduler="simple", steps=2, denoise=1.0),
        "show": node("PreviewAny", source=["sigmas", 0]),
    }
    if source == "constant":
        graph["path"] = node("PrimitiveString", value=str(moved))

    def runs_loader() -> bool:
        events: list[Event] = []
        server.run(graph, events.append)
        return any(event["type"] == "executing" and event["data"]["node"] == "loader" for event in events)

    assert runs_loader()
    assert not runs_loader()
    os.utime(moved, (0, 0))
    assert runs_loader()
    assert not runs_loader()


def test_other_file_is_kept_unless_overwrite_is_set(server: HostServer, target: Path):
    target.write_bytes(b"something else")
    with pytest.raises(GraphError, match="is not this conversion"):
        convert(server)
    assert target.read_bytes() == b"something else"
    assert "written in" in convert(server, overwrite=True)


def test_output_folder_and_device_of_choice(server: HostServer, target: Path):
    convert(server, folder="output", output_name="kept/small.gguf", device="default", effort="fast")
    assert (server.output / "diffusion_models" / "kept" / "small.gguf").exists()


def test_info_shows_text_and_picture(server: HostServer, target: Path):
    convert(server)
    shown = server.run({"info": node("WanQuantInspect", model_name=target.name)})["info"]
    assert "Wan diffusion model" in shown["text"][0]
    assert server.fetch("/view", **shown["images"][0]).startswith(b"\x89PNG")


def test_importance_is_collected_and_used(server: HostServer, target: Path):
    save_conditioning([[0.1 * torch.randn(1, 16, 4096), {}]], str(server.models / "conditioning" / PROMPT))
    model = video({"loader": node("UNETLoader", unet_name=NAME, weight_dtype="default")}, "importance")
    sampled = {key: model[key] for key in ("loader", "prompt", "empty", "sampler")}
    sampled["empty"]["inputs"] |= {"width": 64, "height": 64, "length": 5}
    sampled["model"] = node("WanQuantCollectImportance", model=["loader", 0], steps="alike")
    save = node("WanQuantSaveImportance", importance=["model", 1], name="job.gguf", latent=["sampler", 0])
    graph = {**sampled, "save": save}
    text = server.run(graph)["save"]["text"][0]
    assert f"over {STEPS} evaluations" in text and "Saved job.gguf" in text
    again = {**graph, **conversion("Q4_0", source=NAME, overwrite=True, importance_path=["save", 0])}
    shown = server.run(again)
    assert f"over {STEPS} evaluations" in shown["save"]["text"][0], "cached sampling adds nothing"
    assert "quantize.imatrix.file: job.gguf" in shown["convert"]["text"][0]


def test_model_is_captured_and_tuned(server: HostServer, target: Path):
    save_conditioning([[0.1 * torch.randn(1, 16, 4096), {}]], str(server.models / "conditioning" / PROMPT))
    model = video({"loader": node("UNETLoader", unet_name=NAME, weight_dtype="default")}, "tuned")
    sampled = {key: model[key] for key in ("loader", "prompt", "empty", "sampler")}
    sampled["empty"]["inputs"] |= {"width": 64, "height": 64, "length": 5}
    sampled["model"] = node("WanQuantCollectImportance", model=["loader", 0], steps="alike", blocks=0.1)
    collected = {"importance": ["model", 1], "blocks": ["model", 2], "latent": ["sampler", 0]}
    save = node("WanQuantSaveImportance", name="tuned.gguf", **collected)
    tune = node("WanQuantTune", model=["loader", 0], blocks="none", name="tuned.gguf", recipe="Q4_0", **SAVED)
    tune["inputs"]["blocks_path"] = ["save", 1]
    graph = {**sampled, "save": save, "tune": tune}
    events: list[Event] = []
    shown = server.run(graph, events.append)
    assert f"Saved tuned.blocks.safetensors: {STEPS} of {STEPS} evaluations" in shown["save"]["text"][0]
    assert "written in" in shown["tune"]["text"][0]
    texts = [event["data"]["text"] for event in events if event["type"] == "progress_text"]
    assert any(text.startswith("block 1 of 1") for text in texts)
    tensors = open_gguf(server.models / "diffusion_models" / "tuned.gguf").tensors
    assert tensors["blocks.0.ffn.0.weight"].qtype.name == "Q4_0"
    with pytest.raises(GraphError, match="has no blocks"):
        del tune["inputs"]["blocks_path"]
        server.run({"loader": sampled["loader"], "tune": tune})


def test_model_with_lora_is_saved(server: HostServer, target: Path):
    stem = "diffusion_model.blocks.0.ffn.0"
    factors = {f"{stem}.lora_A.weight": torch.randn(4, 256), f"{stem}.lora_B.weight": torch.randn(1024, 4)}
    (server.models / "loras").mkdir(exist_ok=True)
    save_file(factors, server.models / "loras" / "job.safetensors")
    convert(server, overwrite=True)
    loader = node("WanQuantLoader", model_name=target.name, compute_dtype="default")
    lora = node("LoraLoaderModelOnly", model=["loader", 0], lora_name="job.safetensors", strength_model=0.5)
    save = node("WanQuantSaveModel", model=["lora", 0], name="job-merged.gguf", recipe="Q4_0", **SAVED)
    text = server.run({"loader": loader, "lora": lora, "save": save})["save"]["text"][0]
    assert "written in" in text and "MODEL is quantized already (Q4_0)" in text
    saved, base = (open_gguf(target.with_name(name)).tensors for name in ("job-merged.gguf", target.name))
    difference = {name: (saved[name].dequantize() - base[name].dequantize()).abs().max() for name in saved}
    assert max(difference, key=difference.get) == "blocks.0.ffn.0.weight"


def test_recovery_lora_goes_straight_into_the_hosts_loader(server: HostServer, target: Path):
    convert(server, overwrite=True)
    files = {"model_name": target.name, "source": NAME}
    settings = {"size": 1.0, "name": "", "overwrite": True, "device": "cpu"}
    events: list[Event] = []
    graph = {
        "recover": node("WanQuantSaveRecoveryLora", **files, **settings),
        "loader": node("WanQuantLoader", model_name=target.name, compute_dtype="default"),
        "lora": node("LoraLoaderModelOnly", model=["loader", 0], lora_name=["recover", 0], strength_model=1.0),
        "save": node("WanQuantSaveModel", model=["lora", 0], name="job-recovered.gguf", recipe="F16", **SAVED),
    }
    text = server.run(graph, events.append)["recover"]["text"][0]
    assert "removes" in text and "job-Q4_0-recovery.safetensors" in text
    assert any(e["type"] == "progress_text" and e["data"].get("node") == "recover" for e in events)
    source = load_file(target.with_name(NAME))["blocks.0.ffn.0.weight"].float()
    before, after = (open_gguf(target.with_name(name)) for name in (target.name, "job-recovered.gguf"))
    errors = [(f.tensors["blocks.0.ffn.0.weight"].dequantize() - source).norm() for f in (before, after)]
    assert errors[1] < 0.99 * errors[0]
    with pytest.raises(GraphError, match="exists"):
        server.run({"recover": node("WanQuantSaveRecoveryLora", **files, **{**settings, "overwrite": False})})


def test_latents_are_compared(server: HostServer):
    empty = node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    compare = node("WanQuantCompareLatents", reference=["empty", 0], compared=["empty", 0])
    shown = server.run({"empty": empty, "compare": compare})["compare"]
    assert "PSNR inf dB" in shown["text"][0]
    assert server.fetch("/view", **shown["images"][0]).startswith(b"\x89PNG")
