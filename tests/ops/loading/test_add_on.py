"""Add-ons, alone and added to a transformer, against the checkpoint that has them built in."""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter

import comfy.ldm.wan.model as wan
import comfy.ops
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.ops.loading.add_on import with_add_on
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.__main__ import main
from wanquant.quant.gguf.header import read_header
from wanquant.quant.inspection.report import inspect
from wanquant.quant.inspection.verify import verify

TINY = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}
# Name: (class, arguments, prefix of the add-on's tensors, the host's class of the whole model).
ADD_ONS = {
    "vace": (wan.VaceWanModel, {"vace_layers": 2, "vace_in_dim": 96}, "vace_", "WAN21_Vace"),
    "camera": (wan.CameraWanModel, {"model_type": "camera_2.2", "in_dim": 36}, "control_adapter.", "WAN22_Camera"),
    "reference": (
        wan.WanModel,
        {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        "ref_conv.",
        "WAN21_FunControl2V",
    ),
}


@pytest.fixture(params=ADD_ONS)
def files(request, tmp_path, tiny_wan):
    """Return (whole, base, add-on) as safetensors, and the host's class of the whole model."""
    cls, arguments, start, host_class = ADD_ONS[request.param]
    model = cls(**(TINY | arguments), dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: tiny_wan["random_tensor"](key, tuple(value.shape), generator).bfloat16()
        for key, value in model.state_dict().items()
    }
    paths = [tmp_path / f"{name}.safetensors" for name in ("whole", "base", "add-on")]
    save_file(state, paths[0])
    save_file({key: value for key, value in state.items() if not key.startswith(start)}, paths[1])
    save_file({key: value for key, value in state.items() if key.startswith(start)}, paths[2])
    return paths, host_class


def same(left, right):
    left, right = open_gguf(left).tensors, open_gguf(right).tensors
    assert left.keys() == right.keys()
    return all(torch.equal(left[name].data, right[name].data) for name in left)


def test_base_with_add_on_equals_the_whole_checkpoint(files, tmp_path):
    (whole, base, add_on), host_class = files
    expected = convert(whole, tmp_path / "whole.gguf", "Q4_K_M", effort="fast").path
    merged = convert(base, tmp_path / "merged.gguf", "Q4_K_M", effort="fast", modules=[add_on])
    assert same(merged.path, expected)
    assert merged.metadata["wanquant.source_name"] == "base.safetensors + add-on.safetensors"
    assert type(load_diffusion_model(merged.path).model.model_config).__name__ == host_class
    assert convert(base, tmp_path / "merged.gguf", "Q4_K_M", effort="fast", modules=[add_on]).reused
    with pytest.raises(QuantError, match="is not this conversion"):
        convert(base, tmp_path / "merged.gguf", "Q4_K_M", effort="fast")
    assert not verify(merged.path, base, [add_on]).unknown


def test_add_on_alone(files, tmp_path):
    (_, base, add_on), _ = files
    report = convert(add_on, tmp_path / "add-on.gguf", "Q8_0", effort="fast")
    assert inspect(report.path).kind == "add-on for a Wan diffusion model"
    tensors = open_gguf(report.path).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(value.shape) for name, value in load_file(add_on).items()
    }
    # An add-on in GGUF can be added too.
    merged = convert(base, tmp_path / "merged.gguf", "Q8_0", effort="fast", modules=[report.path])
    assert merged.warnings == () or "Q8_0" in merged.warnings[0]


def test_add_on_on_the_command_line(files, tmp_path, capsys):
    (whole, base, add_on), _ = files
    arguments = ["convert", str(base), str(tmp_path / "a.gguf"), "--recipe", "Q8_0", "--effort", "fast"]
    assert main([*arguments, "--module", str(add_on)]) == 0
    assert same(tmp_path / "a.gguf", convert(whole, tmp_path / "b.gguf", "Q8_0", effort="fast").path)
    assert main(["verify", str(tmp_path / "a.gguf"), str(base), "--module", str(add_on)]) == 0
    assert "only in" not in capsys.readouterr().out


def test_refused_add_ons(files, tmp_path):
    (whole, base, add_on), _ = files
    with pytest.raises(QuantError, match=r"tensor \S+: is in whole\.safetensors too"):
        convert(whole, tmp_path / "a.gguf", modules=[add_on])
    with pytest.raises(QuantError, match=r"tensor \S+: is in base"):
        convert(base, tmp_path / "a.gguf", modules=[add_on, add_on])
    with pytest.raises(QuantError, match="not an add-on"):
        convert(base, tmp_path / "a.gguf", modules=[whole])
    assert not (tmp_path / "a.gguf").exists()


def test_add_on_of_another_size(tmp_path, tiny_wan):
    base = tiny_wan["write_tiny_wan"](tmp_path / "base.safetensors", layers=1)
    save_file({"vace_blocks.3.ffn.0.weight": torch.zeros(3, 256)}, tmp_path / "add-on.safetensors")
    with pytest.raises(QuantError, match=r"vace_blocks\.3\.ffn\.0\.weight: shape \(3, 256\), expected \(1024, 256\)"):
        convert(base, tmp_path / "a.gguf", modules=[tmp_path / "add-on.safetensors"])


def forward(patcher, vace):
    model = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, model.in_dim, 2, 8, 8), generator=generator)
    text = torch.randn((1, 7, 4096), generator=generator)
    control = {"vace_context": torch.randn((1, 1, 96, 2, 8, 8), generator=generator), "vace_strength": [1.0]}
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, **(control if vace else {}))


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_add_on_is_added_as_the_model_is_loaded(files, tmp_path, suffix):
    (whole, base, add_on), host_class = files
    if suffix == "gguf":
        add_on = convert(add_on, tmp_path / "add-on.gguf", "BF16").path
    expected = load_diffusion_model(convert(whole, tmp_path / "whole.gguf", "BF16").path, dtype=torch.float32)
    loaded = load_diffusion_model(
        convert(base, tmp_path / "base.gguf", "BF16").path, dtype=torch.float32, add_on=add_on
    )
    assert type(loaded.model.model_config).__name__ == host_class
    vace = host_class == "WAN21_Vace"
    if vace or host_class == "WAN21_FunControl2V":  # The camera model needs other inputs.
        assert torch.equal(forward(loaded, vace), forward(expected, vace))
    assert loaded.clone(disable_dynamic=True).model.state_dict().keys() == expected.model.state_dict().keys()
    os.utime(add_on, (0, 0))
    with pytest.raises(QuantError, match="was changed or replaced"):
        loaded.pre_run()


def test_quantized_add_on_stays_packed_on_a_prefixed_base(tmp_path, tiny_wan, write_gguf):
    model = wan.VaceWanModel(
        **TINY, vace_layers=2, vace_in_dim=96, dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    generator = torch.Generator().manual_seed(0)
    state = {
        key: tiny_wan["random_tensor"](key, tuple(value.shape), generator) for key, value in model.state_dict().items()
    }

    def types(name, tensor):
        return "Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"

    base, add_on = ({n: t for n, t in state.items() if n.startswith("vace_") == own} for own in (False, True))
    base = write_gguf(tmp_path / "base.gguf", base, types, prefix="model.diffusion_model.")
    add_on = write_gguf(tmp_path / "add-on.gguf", add_on, types)
    loaded = load_diffusion_model(base, add_on=add_on)
    assert is_packed(loaded.model.diffusion_model.vace_blocks[1].ffn[0].weight)
    assert load_diffusion_model(base, add_on=add_on).model.diffusion_model.state_dict().keys() == state.keys()
    with pytest.raises(QuantError, match=r"an add-on for a Wan model.*choose it as add_on_name"):
        load_diffusion_model(add_on)
    with pytest.raises(QuantError, match="not an add-on"):
        load_diffusion_model(base, add_on=base)


@pytest.mark.parametrize("stored", ["float8", "float8 with scales"])
def test_add_on_in_fp8_is_loaded_in_the_compute_dtype(tmp_path, tiny_wan, write_gguf, stored):
    """Its values are those of the add-on in BF16 that has the same values."""
    model = wan.VaceWanModel(
        **TINY, vace_layers=2, vace_in_dim=96, dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    generator = torch.Generator().manual_seed(0)
    state = {
        key: tiny_wan["random_tensor"](key, tuple(value.shape), generator).bfloat16()
        for key, value in model.state_dict().items()
    }
    scale = 0.5 if "scales" in stored else 1.0
    fp8, exact = {}, {}
    for key, value in state.items():
        if not key.startswith("vace_"):
            continue
        quantized = value.ndim == 2
        fp8[key] = (value / scale).to(torch.float8_e4m3fn) if quantized else value
        exact[key] = fp8[key].bfloat16() * scale if quantized else value
        if quantized and "scales" in stored:
            fp8[key.removesuffix("weight") + "scale_weight"] = torch.tensor(scale)
    save_file(fp8 | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    save_file(exact, tmp_path / "exact.safetensors")
    base = {key: value for key, value in state.items() if not key.startswith("vace_")}
    base = write_gguf(tmp_path / "base.gguf", base, lambda name, tensor: "BF16")
    loaded, expected = (
        load_diffusion_model(base, add_on=tmp_path / name, dtype=torch.bfloat16).model.diffusion_model.state_dict()
        for name in ("fp8.safetensors", "exact.safetensors")
    )
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_base_is_opened_as_often_as_without_an_add_on(tmp_path, tiny_wan, t2v, monkeypatch):
    add_on = tmp_path / "add-on.safetensors"
    save_file({"vace_patch_embedding.weight": torch.zeros(256, 96, 1, 2, 2)}, add_on)
    opened = Counter()

    def counting(path, *args, **kwargs):
        opened[os.fspath(path)] += 1
        return real(path, *args, **kwargs)

    real = open
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", counting)
    base = read_header(t2v[1])
    assert opened == {os.fspath(t2v[1]): 1}
    names = with_add_on(base, add_on).tensors.keys()
    assert names == {*base.tensors, "vace_patch_embedding.weight"}
    assert opened[os.fspath(t2v[1])] == 1
    assert opened[os.fspath(add_on)] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "not a Wan model"),
        ("condition_embedder.time_proj.weight", r"base\.gguf: incomplete: \d+ tensors are missing"),
    ],
    ids=["another model", "Wan in Diffusers' names"],
)
def test_base_that_an_add_on_cannot_be_added_to(tmp_path, write_gguf, name, message):
    base = write_gguf(tmp_path / "base.gguf", {name: torch.zeros(32, 32)}, lambda *_: "F32")
    save_file({"vace_patch_embedding.weight": torch.zeros(256, 96, 1, 2, 2)}, tmp_path / "add-on.safetensors")
    with pytest.raises(QuantError, match=message):
        load_diffusion_model(base, add_on=tmp_path / "add-on.safetensors")
