"""Add-on modules, alone and merged, against the checkpoint that has them built in."""

from __future__ import annotations

import os

import comfy.ldm.wan.model as wan
import comfy.ops
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.__main__ import main
from wanquant.quant.inspection.report import inspect
from wanquant.quant.inspection.verify import verify

TINY = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}
# name: (class, arguments, what the module's tensors start with, the host's class of the merged model)
MODULES = {
    "vace": (wan.VaceWanModel, {"vace_layers": 2, "vace_in_dim": 96}, "vace_", "WAN21_Vace"),
    "camera": (wan.CameraWanModel, {"model_type": "camera_2.2", "in_dim": 36}, "control_adapter.", "WAN22_Camera"),
    "reference": (
        wan.WanModel,
        {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        "ref_conv.",
        "WAN21_FunControl2V",
    ),
}


@pytest.fixture(params=MODULES)
def files(request, tmp_path, tiny_wan):
    """(whole, base, module) as safetensors, and the host's class."""
    cls, arguments, start, host_class = MODULES[request.param]
    model = cls(**(TINY | arguments), dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: tiny_wan["random_tensor"](key, tuple(value.shape), generator).bfloat16()
        for key, value in model.state_dict().items()
    }
    paths = [tmp_path / f"{name}.safetensors" for name in ("whole", "base", "module")]
    save_file(state, paths[0])
    save_file({key: value for key, value in state.items() if not key.startswith(start)}, paths[1])
    save_file({key: value for key, value in state.items() if key.startswith(start)}, paths[2])
    return paths, host_class


def same(left, right):
    left, right = open_gguf(left).tensors, open_gguf(right).tensors
    assert left.keys() == right.keys()
    return all(torch.equal(left[name].data, right[name].data) for name in left)


def test_merged_module_equals_the_whole_checkpoint(files, tmp_path):
    (whole, base, module), host_class = files
    expected = convert(whole, tmp_path / "whole.gguf", "Q4_K_M", effort="fast").path
    merged = convert(base, tmp_path / "merged.gguf", "Q4_K_M", effort="fast", modules=[module])
    assert same(merged.path, expected)
    assert merged.metadata["wanquant.source_name"] == "base.safetensors + module.safetensors"
    assert type(load_diffusion_model(merged.path).model.model_config).__name__ == host_class
    assert convert(base, tmp_path / "merged.gguf", "Q4_K_M", effort="fast", modules=[module]).reused
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(base, tmp_path / "merged.gguf", "Q4_K_M", effort="fast")
    assert not verify(merged.path, base, [module]).unknown


def test_module_alone(files, tmp_path):
    (_, base, module), _ = files
    report = convert(module, tmp_path / "module.gguf", "Q8_0", effort="fast")
    assert inspect(report.path).kind == "module for a Wan diffusion model"
    tensors = open_gguf(report.path).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(value.shape) for name, value in load_file(module).items()
    }
    # A module in GGUF merges too.
    merged = convert(base, tmp_path / "merged.gguf", "Q8_0", effort="fast", modules=[report.path])
    assert merged.warnings == () or "Q8_0" in merged.warnings[0]


def test_module_on_the_command_line(files, tmp_path, capsys):
    (whole, base, module), _ = files
    arguments = ["convert", str(base), str(tmp_path / "a.gguf"), "--recipe", "Q8_0", "--effort", "fast"]
    assert main([*arguments, "--module", str(module)]) == 0
    assert same(tmp_path / "a.gguf", convert(whole, tmp_path / "b.gguf", "Q8_0", effort="fast").path)
    assert main(["verify", str(tmp_path / "a.gguf"), str(base), "--module", str(module)]) == 0
    assert "only in" not in capsys.readouterr().out


def test_refused_modules(files, tmp_path):
    (whole, base, module), _ = files
    with pytest.raises(QuantError, match=r"tensor \S+: is in whole\.safetensors too"):
        convert(whole, tmp_path / "a.gguf", modules=[module])
    with pytest.raises(QuantError, match=r"tensor \S+: is in base"):
        convert(base, tmp_path / "a.gguf", modules=[module, module])
    with pytest.raises(QuantError, match="no add-on module"):
        convert(base, tmp_path / "a.gguf", modules=[whole])
    assert not (tmp_path / "a.gguf").exists()


def test_module_of_another_size(tmp_path, tiny_wan):
    base = tiny_wan["write_tiny_wan"](tmp_path / "base.safetensors", layers=1)
    save_file({"vace_blocks.3.ffn.0.weight": torch.zeros(3, 256)}, tmp_path / "module.safetensors")
    with pytest.raises(QuantError, match=r"vace_blocks\.3\.ffn\.0\.weight: shape \(3, 256\), but \(1024, 256\)"):
        convert(base, tmp_path / "a.gguf", modules=[tmp_path / "module.safetensors"])


def forward(patcher, vace):
    model = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, model.in_dim, 2, 8, 8), generator=generator)
    text = torch.randn((1, 7, 4096), generator=generator)
    control = {"vace_context": torch.randn((1, 1, 96, 2, 8, 8), generator=generator), "vace_strength": [1.0]}
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, **(control if vace else {}))


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_module_is_added_as_the_model_is_loaded(files, tmp_path, suffix):
    (whole, base, module), host_class = files
    if suffix == "gguf":
        module = convert(module, tmp_path / "module.gguf", "BF16").path
    expected = load_diffusion_model(convert(whole, tmp_path / "whole.gguf", "BF16").path, dtype=torch.float32)
    loaded = load_diffusion_model(
        convert(base, tmp_path / "base.gguf", "BF16").path, dtype=torch.float32, module=module
    )
    assert type(loaded.model.model_config).__name__ == host_class
    vace = host_class == "WAN21_Vace"
    if vace or host_class == "WAN21_FunControl2V":  # the camera's inputs are of another kind
        assert torch.equal(forward(loaded, vace), forward(expected, vace))
    assert loaded.clone(disable_dynamic=True).model.state_dict().keys() == expected.model.state_dict().keys()
    os.utime(module, (0, 0))
    with pytest.raises(QuantError, match="was changed or replaced"):
        loaded.pre_run()


def test_quantized_module_stays_packed_on_a_prefixed_base(tmp_path, tiny_wan, write_gguf):
    model = wan.VaceWanModel(
        **TINY, vace_layers=2, vace_in_dim=96, dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    generator = torch.Generator().manual_seed(0)
    state = {
        key: tiny_wan["random_tensor"](key, tuple(value.shape), generator) for key, value in model.state_dict().items()
    }

    def types(name, tensor):
        return "Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"

    base, module = ({n: t for n, t in state.items() if n.startswith("vace_") == own} for own in (False, True))
    base = write_gguf(tmp_path / "base.gguf", base, types, prefix="model.diffusion_model.")
    module = write_gguf(tmp_path / "module.gguf", module, types)
    loaded = load_diffusion_model(base, module=module)
    assert is_packed(loaded.model.diffusion_model.vace_blocks[1].ffn[0].weight)
    assert load_diffusion_model(base, module=module).model.diffusion_model.state_dict().keys() == state.keys()
    with pytest.raises(QuantError, match=r"an add-on module.*choose it as the module_name"):
        load_diffusion_model(module)
    with pytest.raises(QuantError, match="no add-on module"):
        load_diffusion_model(base, module=base)


def test_scaled_module_is_to_be_converted(tmp_path, t2v):
    tensors = {"vace_blocks.0.before_proj.weight": torch.zeros(256, 256).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "module.safetensors")
    with pytest.raises(QuantError, match=r"stored as F8_E4M3.*convert the module with Convert to GGUF"):
        load_diffusion_model(t2v[1], module=tmp_path / "module.safetensors")
