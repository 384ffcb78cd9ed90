"""Files and values that do not fit: the node says what to do, the server stays up, and the next prompt runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QTYPES, convert
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.testing.graphs import conversion, node
from wanquant.testing.server import Graph, GraphError, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan

pytestmark = pytest.mark.host

LONG = f"{'n' * 120}.gguf"
NAME = "视频 é.gguf"
OTHER_SIZE = (("A", (4, 5120)), ("B", (13824, 4)))


def write_gguf(path: Path, architecture: str, *names: str) -> None:
    specs = [TensorSpec(name, QTYPES["F32"], (8, 8)) for name in names]
    with GGUFWriter(path, {"general.architecture": architecture}, specs) as writer:
        for name in names:
            writer.write(name, torch.zeros(8, 32, dtype=torch.uint8))


@pytest.fixture(scope="module")
def files(server: HostServer) -> None:
    """One file of each wrong kind, and good ones of difficult names."""
    models, encoders = server.models / "diffusion_models", server.models / "text_encoders"
    source = write_tiny_wan(models / "input.safetensors", layers=1)
    good = convert(source, models / NAME, "Q8_0", effort="fast").path.read_bytes()
    (models / LONG).write_bytes(good)
    (models / "cut.gguf").write_bytes(good[: len(good) // 2])
    (models / "page.gguf").write_bytes(b"<!doctype html><title>Sign in</title>")
    (encoders / "video.gguf").write_bytes(good)
    (models / "taken").touch()
    write_gguf(models / "encoder.gguf", "t5encoder", "enc.blk.0.attn_q.weight")
    write_gguf(models / "mmproj.gguf", "clip", "v.blk.0.attn_q.weight")
    write_gguf(models / "llm.gguf", "qwen2", "blk.0.attn_q.weight")
    write_gguf(encoders / "llm.gguf", "qwen2", "blk.0.attn_q.weight", "token_embd.weight")
    encoder_layers = ("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.blk.1.attn_q.weight")
    biases = ("enc.blk.0.attn_rel_b.weight", "enc.blk.1.attn_rel_b.weight")
    write_gguf(encoders / "umt5-small.gguf", "t5encoder", *encoder_layers, *biases)
    write_gguf(encoders / "t5.gguf", "t5encoder", *encoder_layers, biases[0])
    (models / "links").mkdir()
    (models / "links" / "itself.gguf").symlink_to("itself.gguf")
    (models / "links" / "around").symlink_to(models / "links")
    save_file({"lora": torch.zeros(1)}, server.models / "conditioning" / "elsewhere.safetensors")
    (server.models / "loras").mkdir(exist_ok=True)
    named = {
        f"lora_unet_mid_block_{part}.lora_{way}.weight": torch.zeros(4, 4) for part in "ab" for way in ("up", "down")
    }
    save_file(named, server.models / "loras" / "other-names.safetensors")
    sized = {f"diffusion_model.blocks.0.ffn.0.lora_{part}.weight": torch.zeros(shape) for part, shape in OTHER_SIZE}
    save_file(sized, server.models / "loras" / "other-size.safetensors")


def model(name: str) -> Graph:
    return node("WanQuantLoader", model_name=name, compute_dtype="default")


def encoder(name: str, kind: str = "wan") -> Graph:
    return node("WanQuantTextEncoderLoader", encoder_name=name, type=kind)


def conditioning(name: str) -> Graph:
    return node("WanQuantLoadConditioning", name=name)


def lora(name: str) -> Graph:
    return node("LoraLoaderModelOnly", model=["good", 0], lora_name=f"{name}.safetensors", strength_model=1.0)


def low_vram(**changed: float) -> Graph:
    wanted = {"budget_gib": 3.5, "width": 64, "height": 64, "frames": 5} | changed
    return node("WanQuantLowVRAM", model=["good", 0], **wanted)


def target(name: str) -> Graph:
    return conversion("Q4_0", source="input.safetensors", output_name=name, effort="fast")["convert"]


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (model("encoder.gguf"), "a T5 text encoder .*load it with Load Text Encoder"),
        (model("mmproj.gguf"), "a vision projector .*choose another file"),
        (model("llm.gguf"), "a language model or text encoder .*choose another file"),
        (model("cut.gguf"), "the file is cut off, download or convert it again"),
        (model("page.gguf"), "a web page, so the download failed; download it again"),
        (model("absent.gguf"), "choose a file, or put this one there and press R"),
        (encoder("video.gguf"), "not a T5 text encoder .*load it with Load Diffusion Model"),
        (encoder("llm.gguf"), "not a T5 text encoder .*choose umt5-xxl for Wan"),
        (encoder("umt5-small.gguf", "sd3"), "umT5, the text encoder of Wan; choose type wan"),
        (encoder("t5.gguf"), "T5, but Wan's text encoder is umT5; choose umt5-xxl"),
        (model("links/itself.gguf"), "is a broken link: repair it, or choose another file"),
        (model("links/around/around/itself.gguf"), "is a broken link: repair it, or choose another file"),
        (conditioning("elsewhere.safetensors"), "no saved conditioning in this file; write one with Save Conditioning"),
        (target("taken/x.gguf"), "cannot be written: .*choose another name or folder"),
        (target(f"{'n' * 300}.gguf"), "File name too long; choose another name or folder"),
        (lora("other-names"), "none of its tensors names a weight of this model .*choose a LoRA for this model"),
        (lora("other-size"), r"no match in this model for 1 of its 1 patch \(.*ffn.0.weight has 70,778,880 elements"),
        (low_vram(budget_gib=-1), "Value -1.* smaller than min of 0"),
        (low_vram(budget_gib=5000), "Value 5000.* bigger than max of 1024"),
        (low_vram(width=72), "size 72x64: expected multiples of 16 pixels"),
        (low_vram(frames=80), "frames 80: expected a multiple of 4 plus 1"),
        (node("WanQuantCompareLatents", reference=["small", 0], compared=["large", 0]), "sample both at the same size"),
    ],
)
def test_message_says_what_to_do_and_the_next_prompt_runs(
    server: HostServer, files: None, subject: Graph, message: str
):
    sizes = {"small": 64, "large": 128}
    latents = {
        name: node("EmptyHunyuanLatentVideo", width=size, height=size, length=5, batch_size=1)
        for name, size in sizes.items()
    }
    show = {"show": node("PreviewAny", source=["subject", 0])}
    with pytest.raises(GraphError, match=message):
        server.run({"subject": subject, "good": model(NAME), **latents, **show})
    server.run({**latents, "show": node("PreviewAny", source=["small", 0])})


@pytest.mark.parametrize("name", [NAME, LONG], ids=["unicode", "long"])
def test_difficult_names_load_and_convert(server: HostServer, files: None, name: str):
    sigmas = node("BasicScheduler", model=["subject", 0], scheduler="simple", steps=1, denoise=1.0)
    show = node("PreviewAny", source=["sigmas", 0])
    assert server.run({"subject": model(name), "sigmas": sigmas, "show": show})["show"]
    server.run({"subject": target(f"new {name}"), "show": node("PreviewAny", source=["subject", 0])})
    assert (server.models / "diffusion_models" / f"new {name}").is_file()
