"""ComfyUI's own formats in the graph: convert, then load by the path or by the name."""

import shutil

import pytest
import torch

from wanquant.nodes import encoding
from wanquant.nodes.convert import WanQuantConvert
from wanquant.nodes.load_diffusion_model import WanQuantLoader
from wanquant.nodes.load_expert_pair import WanQuantExpertPairLoader
from wanquant.nodes.low_vram import WanQuantLowVRAM
from wanquant.nodes.save_model import WanQuantSaveModel
from wanquant.nodes.tune import WanQuantTune
from wanquant.ops.host_version import host_version
from wanquant.ops.loading import native_model
from wanquant.quant import QuantError
from wanquant.quant.inspection.report import inspect
from wanquant.quant.native.registry import NATIVE

LOADABLE = "INT8" if "int8_tensorwise" in native_model.comfy.quant_ops.QUANT_ALGOS else "FP8"
"""A recipe that this host loads."""


def convert(recipe, output_name="", **inputs):
    return WanQuantConvert.execute(
        "wan.safetensors", recipe, "diffusion_models", output_name, False, "fast", "cpu", **inputs
    ).args


def load(**inputs):
    return WanQuantLoader.execute(**{"model_name": "wan-Q8_0.gguf", "compute_dtype": "float32", **inputs}).args[0]


def weight(model):
    return model.model.diffusion_model.blocks[0].ffn[0].weight


def test_native_recipes_follow_the_present_ones(models):
    """The values are saved in graphs, so that neither they nor their order may change."""
    (combo,) = (one for one in WanQuantConvert.define_schema().inputs if one.id == "recipe")
    assert combo.options[:3] == ["F16", "BF16", "Q8_0"]
    assert set(combo.options[-len(NATIVE) :]) == set(NATIVE)
    (combo,) = (one for one in WanQuantTune.define_schema().inputs if one.id == "recipe")
    assert not {*combo.options} & {*NATIVE}


@pytest.mark.parametrize(
    ("recipe", "asked", "target_size", "written", "said"),
    [
        ("INT8", "", 0.0, "wan-INT8.safetensors", False),
        ("INT8", "a.gguf", 0.0, "a.safetensors", True),
        ("INT8", "a.SAFETENSORS", 0.0, "a.SAFETENSORS", False),
        ("Q8_0", "a.safetensors", 0.0, "a.gguf", True),
        ("FP8", "a.safetensors", 0.0055, "a.safetensors", False),
        ("W4A8", "", 0.0045, "wan-W4A8-0.0045GiB.safetensors", False),
        ("Q8_0", "", 0.005, "wan-0.005GiB.gguf", False),
    ],
)
def test_the_recipe_chooses_the_suffix(recipe, asked, target_size, written, said, folder):
    path, _, summary = convert(recipe, asked, target_size=target_size)
    assert path == str(folder / written)
    assert ("is written as" in summary) == said


def test_convert_then_load_then_forward(folder):
    path = convert(LOADABLE)[0]
    linked, named = load(path=path), load(model_name=f"wan-{LOADABLE}.safetensors")
    assert WanQuantLoader.validate_inputs(model_name=f"wan-{LOADABLE}.safetensors") is True
    (folder / "other.ckpt").touch()
    (combo,) = (one for one in WanQuantLoader.define_schema().inputs if one.id == "model_name")
    assert "other.ckpt" not in combo.options
    assert combo.options[0] == "wan-Q8_0.gguf" and f"wan-{LOADABLE}.safetensors" in combo.options
    dense = load(model_name="wan.safetensors")
    inputs = torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        outputs = [m.model.apply_model(*inputs, c_crossattn=torch.ones(1, 7, 4096)) for m in (linked, named, dense)]
    assert type(weight(linked)).__name__ == "QuantizedTensor"
    assert torch.equal(outputs[0], outputs[1])
    assert 0 < (outputs[0] - outputs[2]).norm() / outputs[2].norm() < 0.05


def test_a_merged_model_is_saved_in_a_native_format(folder):
    model = load()
    path, _, summary = WanQuantSaveModel.execute(
        model, "merged.gguf", "W6A8", "diffusion_models", False, "fast", "cpu"
    ).args
    assert path == str(folder / "merged.safetensors")
    assert "written as .safetensors, not as .gguf" in summary
    assert {"W6A8"} < {total.qtype for total in inspect(path).by_type}


@pytest.mark.parametrize("options", [{"int8": True}, {"module_name": "wan-Q8_0.gguf"}])
def test_options_of_gguf_are_refused(options, folder):
    with pytest.raises(QuantError, match="are for GGUF files"):
        load(path=convert("FP8")[0], **options)


def test_what_the_host_lacks_is_said_before_and_after_a_conversion(folder, monkeypatch, caplog):
    def tooltip():
        (combo,) = (one for one in WanQuantConvert.define_schema().inputs if one.id == "recipe")
        return combo.tooltip

    monkeypatch.setattr(encoding, "lacking", lambda: [])
    assert "This ComfyUI" not in tooltip()
    monkeypatch.setattr(encoding, "lacking", lambda: ["W4A8", "W6A8"])
    assert tooltip().endswith("cannot use W4A8 (needs 0.31 or newer), W6A8 (needs 0.38 or newer).")
    assert "does not load" not in convert("FP8")[2]
    monkeypatch.setattr(native_model.comfy.quant_ops, "QUANT_ALGOS", {"float8_e4m3fn": {}})
    path, _, summary = convert("W4A8", "a.safetensors")
    sentence = f"W4A8 (asym_w4a8_int8) does not load in this ComfyUI {host_version()}; update ComfyUI to 0.31 or newer"
    assert sentence in summary.splitlines() and sentence in caplog.text
    with pytest.raises(QuantError, match=r"update ComfyUI to 0\.31 or newer, or convert to a recipe that it loads"):
        load(path=path)


def test_a_damaged_file_is_one_sentence(folder):
    (folder / "bad.safetensors").write_bytes(b"\1\0")
    with pytest.raises(QuantError, match=r"bad\.safetensors: header length"):
        load(model_name="bad.safetensors")


def test_names_without_a_known_suffix_stay():
    assert encoding.with_suffix("a.bin", ".safetensors") == "a.bin"
    assert encoding.with_suffix("a", ".safetensors") == "a"


def test_a_pair_of_experts_by_name_and_by_path(folder):
    path = convert(LOADABLE)[0]
    shutil.copy(path, folder / "low.safetensors")
    named = {"high_noise_name": f"wan-{LOADABLE}.safetensors", "low_noise_name": "low.safetensors"}
    assert WanQuantExpertPairLoader.validate_inputs(**named) is True
    assert "nearest name" in WanQuantExpertPairLoader.validate_inputs(**named | {"low_noise_name": "lo.safetensors"})
    stale = {"high_noise_name": "stale.gguf", "high_noise_path": None}
    assert WanQuantExpertPairLoader.validate_inputs(**named | stale) is True
    by_name = WanQuantExpertPairLoader.execute(**named, compute_dtype="float32").args
    linked = {**named, "high_noise_name": "stale.gguf", "high_noise_path": path}
    by_path = WanQuantExpertPairLoader.execute(**linked, compute_dtype="float32").args
    for patcher in (*by_name, *by_path):
        assert type(weight(patcher)).__name__ == "QuantizedTensor"
    before = WanQuantExpertPairLoader.fingerprint_inputs(**linked)
    (folder / f"wan-{LOADABLE}.safetensors").touch()
    assert WanQuantExpertPairLoader.fingerprint_inputs(**linked) != before


def test_a_budget_takes_a_native_model(folder):
    model = load(path=convert(LOADABLE)[0])
    limited, text, *_ = WanQuantLowVRAM.execute(model, 3.5, 256, 256, 5).args
    assert "GiB (weights" in text
    inputs = torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        ours, plain = (m.model.apply_model(*inputs, c_crossattn=torch.ones(1, 7, 4096)) for m in (limited, model))
    assert torch.equal(ours, plain)
