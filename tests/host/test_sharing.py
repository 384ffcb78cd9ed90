"""Graphs from elsewhere: saved on another system, made with another pack, naming files that are not here."""

from __future__ import annotations

import pytest

from wanquant.quant import convert
from wanquant.testing.graphs import node
from wanquant.testing.server import Graph, GraphError, HostServer
from wanquant.testing.tiny_wan import write_tiny_wan

pytestmark = pytest.mark.host

UNET, ADVANCED, CLIP = "UnetLoaderGGUF", "UnetLoaderGGUFAdvanced", "CLIPLoaderGGUF"
ADVANCED_WIDGETS = {"dequant_dtype": "target", "patch_dtype": "float16", "patch_on_device": True}


@pytest.fixture(scope="module")
def model(server: HostServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name, as Windows writes it, of a GGUF in a subfolder."""
    source = write_tiny_wan(tmp_path_factory.mktemp("shared") / "wan.safetensors", layers=1)
    (server.models / "diffusion_models" / "shared").mkdir()
    convert(source, server.models / "diffusion_models" / "shared" / "wan.gguf", "Q8_0", effort="fast")
    return "shared\\wan.gguf"


def run(server: HostServer, loader: Graph) -> dict[str, object]:
    """What the host shows of a graph that loads a model."""
    sigmas = node("BasicScheduler", model=["loader", 0], scheduler="simple", steps=2, denoise=1.0)
    show = node("PreviewAny", source=["sigmas", 0])
    return server.run({"loader": {**loader, "_meta": {"title": ""}}, "sigmas": sigmas, "show": show})["show"]


def test_name_saved_on_windows(server: HostServer, model: str):
    assert "tensor" in str(run(server, node("WanQuantLoader", model_name=model, compute_dtype="default")))


# The widgets of each loader of another pack, in its order, beside the file.
DISTORCH_2 = {"virtual_vram_gb": 4.0, "donor_device": "cpu", "expert_mode_allocations": "", "eject_models": True}
LOADERS: dict[str, tuple[str, dict[str, object]]] = {
    UNET: ("unet_name", {}),
    ADVANCED: ("unet_name", ADVANCED_WIDGETS),
    "UnetLoaderGGUFDynamicVRAM": ("unet_name", {}),
    "LoaderGGUF": ("gguf_name", {}),
    "LoaderGGUFAdvanced": ("gguf_name", ADVANCED_WIDGETS),
    "GGUFLoaderKJ": (
        "model_name",
        {
            "extra_model_name": "none",
            **ADVANCED_WIDGETS,
            "enable_fp16_accumulation": False,
            "attention_override": "none",
        },
    ),
    "UnetLoaderGGUFMultiGPU": ("unet_name", {"device": "cuda:0"}),
    "UnetLoaderGGUFAdvancedMultiGPU": ("unet_name", {**ADVANCED_WIDGETS, "device": "cuda:0"}),
    "UnetLoaderGGUFDisTorch2MultiGPU": ("unet_name", {"compute_device": "cuda:0", **DISTORCH_2}),
}
ENCODERS: dict[str, dict[str, object]] = {
    CLIP: {},
    "CLIPLoaderGGUFDynamicVRAM": {},
    "ClipLoaderGGUF": {"device": "default"},
    "CLIPLoaderGGUFMultiGPU": {"device": "cpu"},
    "CLIPLoaderGGUFDisTorch2MultiGPU": {"device": "cpu", **DISTORCH_2},
}


@pytest.mark.parametrize("loader", LOADERS)
def test_prompt_made_with_another_pack_runs(server: HostServer, model: str, loader: str):
    name, widgets = LOADERS[loader]
    assert "tensor" in str(run(server, node(loader, **{name: model}, **widgets)))


def test_optional_widgets_may_be_missing(server: HostServer, model: str):
    assert "tensor" in str(run(server, node("UnetLoaderGGUFDisTorch2MultiGPU", unet_name=model)))


def test_extra_model_of_kjnodes_becomes_the_add_on(server: HostServer, model: str):
    widgets = LOADERS["GGUFLoaderKJ"][1] | {"extra_model_name": "vace.gguf"}
    with pytest.raises(GraphError, match="refused") as refusal:
        run(server, node("GGUFLoaderKJ", model_name=model, **widgets))
    assert "'vace.gguf' is not in" in str(refusal.value.details["node_errors"]["loader"]["errors"])


def test_missing_file_is_told_with_the_nearest(server: HostServer, model: str):
    with pytest.raises(GraphError, match="refused") as refusal:
        run(server, node(UNET, unet_name="downloads\\wan.gguf"))
    (error,) = refusal.value.details["node_errors"]["loader"]["errors"][:1]
    assert "the nearest name there is 'shared/wan.gguf'" in error["details"]
    assert str(server.models / "diffusion_models") in error["details"]


@pytest.mark.parametrize("old", ENCODERS)
def test_text_encoder_of_another_pack_is_replaced(server: HostServer, old: str):
    loader = {**node(old, clip_name="umt5.gguf", type="wan", **ENCODERS[old]), "_meta": {"title": ""}}
    prompt = node("CLIPTextEncode", clip=["loader", 0], text="a red ball")
    with pytest.raises(GraphError, match="refused") as refusal:
        server.run({"loader": loader, "prompt": prompt, "show": node("PreviewAny", source=["prompt", 0])})
    refused = refusal.value.details["node_errors"]["loader"]
    assert refused["class_type"] == "WanQuantTextEncoderLoader"
    assert "'umt5.gguf' is not in" in str(refused["errors"])


def test_canvas_is_told_every_old_widget(server: HostServer):
    offered = server.get("/node_replacements")
    widgets = {old: entries[0]["old_widget_ids"] for old, entries in offered.items() if old in LOADERS | ENCODERS}
    assert widgets == {
        **{old: [name, *others] for old, (name, others) in LOADERS.items()},
        **{old: ["clip_name", "type", *others] for old, others in ENCODERS.items()},
    }
