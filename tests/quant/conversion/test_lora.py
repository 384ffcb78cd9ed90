"""LoRAs that are added to the weights before these are quantized."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, open_gguf
from wanquant.quant.__main__ import main
from wanquant.quant.conversion.convert import convert, convert_all
from wanquant.quant.conversion.settings import Settings, Target
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.inspection.verify import verify
from wanquant.quant.qtype import QTYPES
from wanquant.quant.sources.baked_lora import LoRA
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.testing.hosts import ROOT
from wanquant.testing.tiny_wan import write_tiny_wan

LAYER = "blocks.0.ffn.0"
Q = "blocks.1.self_attn.q"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors", layers=2, ffn_dim=512)


def factors(state, *layers, rank=4, alpha=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        rows, columns = state[f"{layer}.weight"].shape
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 16
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 16
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture(scope="module")
def lora(wan, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "fast.safetensors"
    tensors = factors(load_file(wan), LAYER, Q) | {f"diffusion_model.{LAYER}.diff_b": torch.randn(512)}
    save_file(tensors, path)
    return path


def test_no_file_of_the_source_is_replaced(tmp_path, wan, lora):
    state = load_file(wan)
    names, shards = sorted(state), [tmp_path / f"wan-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        save_file({name: state[name] for name in part}, shard)
    own = tmp_path / "lora.safetensors"
    own.write_bytes(lora.read_bytes())
    for destination in (*shards, own):
        before = destination.read_bytes()
        with pytest.raises(QuantError, match="is the source itself or a part of it"):
            convert(shards[0], destination, "INT8", effort="fast", overwrite=True, loras=[own])
        assert destination.read_bytes() == before


def baked(wan, lora, strength=1.0):
    """Return the weights of the source with the LoRA added, in float32."""
    state, tensors = load_file(wan), load_file(lora)
    for layer in (LAYER, Q):
        up, down = (tensors[f"diffusion_model.{layer}.lora_{part}.weight"] for part in "BA")
        alpha = tensors[f"diffusion_model.{layer}.alpha"].item()
        state[f"{layer}.weight"] = state[f"{layer}.weight"].float() + strength * alpha / len(down) * (up @ down)
    state[f"{LAYER}.bias"] = state[f"{LAYER}.bias"].float() + strength * tensors[f"diffusion_model.{LAYER}.diff_b"]
    return state


@pytest.mark.parametrize(
    ("given", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1.0),
        ("C:\\loras\\a.safetensors:.5", "C:\\loras\\a.safetensors", 0.5),
        ("a:b:2", "a:b", 2.0),
        ("a:high", "a:high", 1.0),
        ("a:nan", "a:nan", 1.0),
        (("a:2", 3), "a:2", 3.0),
    ],
)
def test_a_strength_is_what_follows_the_last_colon_if_it_is_a_number(given, path, strength):
    lora = LoRA.of(given)
    assert (str(lora.path), lora.strength) == (path, strength)


@pytest.mark.parametrize("recipe", ["Q8_0", "BF16", "INT8", "W4A8", "FP8"])
def test_the_file_holds_the_sum(wan, lora, recipe, tmp_path):
    target = Target(tmp_path / "a", recipe)
    path = tmp_path / f"a{target.suffix}"
    report = convert(wan, path, recipe, loras=[f"{lora}:0.5"])
    summed = tmp_path / "sum.safetensors"
    save_file(baked(wan, lora, 0.5), summed)
    alike = convert(summed, tmp_path / f"b{target.suffix}", recipe)
    # The order of the sum differs, by which a code may change.
    assert verify(report.path, summed).by_role[-1].relative_error == pytest.approx(
        verify(alike.path, summed).by_role[-1].relative_error, rel=1e-3
    )
    (note,) = [note for note in report.notes if "fast.safetensors" in note]
    assert "strength 0.5 is baked into 3 tensors" in note and note in report.text()
    assert list(report.metadata["wanquant.loras"]) == ["fast.safetensors:0.5"]


def test_reuse_notices_another_lora_or_strength(wan, lora, tmp_path):
    path = tmp_path / "a.safetensors"
    convert(wan, path, "INT8", loras=[(lora, 0.5)])
    again = convert(wan, path, "INT8", loras=[(lora, 0.5)])
    assert again.reused and "baked into 3 tensors" in again.text()
    other = tmp_path / "other" / "fast.safetensors"
    other.parent.mkdir()
    save_file({name: tensor + 1 for name, tensor in load_file(lora).items()}, other)
    for loras in ([], [lora], [(lora, 0.5), (lora, 0.5)], [(other, 0.5)]):
        with pytest.raises(QuantError, match="is not this conversion"):
            convert(wan, path, "INT8", loras=loras)


def test_one_pass_makes_the_same_bytes(wan, lora, tmp_path):
    names = {"INT8": "a.safetensors", "Q4_K_M": "a.gguf", "NVFP4": "b.safetensors"}
    targets = [Target(tmp_path / name, recipe) for recipe, name in names.items()]
    convert_all(wan, targets, Settings(effort="fast", loras=[LoRA(lora, 0.7)]))
    for target in targets:
        alone = tmp_path / f"alone-{target.recipe}{target.suffix}"
        convert(wan, alone, target.recipe, effort="fast", loras=[(lora, 0.7)])
        assert alone.read_bytes() == target.destination.read_bytes()


KILLED = """
import sys, types, os, signal
package = types.ModuleType("wanquant")
package.__path__ = [sys.argv[1]]
sys.modules["wanquant"] = package
from wanquant.quant.conversion.convert import convert
seen = []
def progress(done, total, name):
    seen.append(name)
    if len(set(seen)) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
convert(*sys.argv[2:5], loras=[sys.argv[5]], progress=progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("recipe", ["INT8", "Q8_0"])
def test_a_killed_conversion_continues_with_the_same_bytes(wan, lora, recipe, tmp_path, caplog):
    suffix = Target(tmp_path, recipe).suffix
    expected = convert(wan, tmp_path / f"whole{suffix}", recipe, loras=[lora]).path.read_bytes()
    path = tmp_path / f"a{suffix}"
    arguments = [sys.executable, "-I", "-c", KILLED, *map(str, (ROOT, wan, path, recipe, lora))]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    convert(wan, path, recipe, loras=[(lora, 0.9)])
    assert "another source, recipe or version" in caplog.text
    path.unlink()
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    convert(wan, path, recipe, loras=[lora])
    assert "resumed after" in caplog.text
    assert path.read_bytes() == expected


def test_one_weight_is_held_at_a_time(wan, lora):
    with open_checkpoint(wan, loras=[LoRA(lora)]) as checkpoint:
        assert checkpoint.held_bytes == 8 * 512 * 256
        first = checkpoint.tensors[f"{LAYER}.weight"].read().data_ptr()
        assert checkpoint.tensors[f"{LAYER}.weight"].read(256, 512).data_ptr() == first + 1024
        latest = checkpoint.tensors[f"{LAYER}.weight"].latest
        checkpoint.tensors[f"{Q}.weight"].read()
        assert latest._values.numel() == 256 * 256


OTHERS = {
    "lokr_w1": (16, 16),
    "hada_w1_a": (512, 4),
    "oft_blocks": (4, 64, 64),
    "dora_scale": (512, 1),
    "a1.weight": (4, 4),
    "set_weight": (512, 256),
    "lora_magnitude_vector": (512,),
}


@pytest.mark.parametrize("end", OTHERS)
def test_other_kinds_are_refused(wan, end, tmp_path):
    tensors = factors(load_file(wan), LAYER) | {f"diffusion_model.{LAYER}.{end}": torch.ones(OTHERS[end])}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(QuantError, match=rf"tensor diffusion_model\.{LAYER}\.{end}: not part of .* use Save Model"):
        convert(wan, tmp_path / "a.gguf", "Q8_0", loras=[tmp_path / "other.safetensors"])
    assert not (tmp_path / "a.gguf").exists()


def test_what_does_not_fit_is_named(wan, tmp_path):
    state, path = load_file(wan), tmp_path / "part.safetensors"
    odd = {"diffusion_model.blocks.0.ffn.2.lora_A.weight": torch.ones(4, 100)}
    odd["diffusion_model.blocks.0.ffn.2.lora_B.weight"] = torch.ones(256, 4)
    missing = {name.replace("blocks.0", "blocks.7"): tensor for name, tensor in factors(state, LAYER).items()}
    save_file(factors(state, LAYER) | odd | missing, path)
    report = convert(wan, tmp_path / "a.gguf", "Q8_0", loras=[path])
    shapes, unknown = (warning for warning in report.warnings if warning.startswith("part.safetensors"))
    assert "left out 1 patch that does not fit:" in shapes and "blocks.0.ffn.2.weight has factors (256, 4)" in shapes
    assert "left out 3 tensors whose names are not in wan.safetensors" in unknown and "blocks.7.ffn.0" in unknown
    for tensors in (odd, missing):
        save_file(tensors, path)
        with pytest.raises(QuantError, match=r"part\.safetensors: a LoRA for another model than wan\.safetensors"):
            convert(wan, tmp_path / "b.gguf", "Q8_0", loras=[path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_B.weight": None}, r"lora_A\.weight: has no diffusion_model.blocks.0.ffn.0.lora_B.weight"),
        ({"lora_A.weight": None}, "has no diffusion_model.blocks.0.ffn.0.lora_A.weight"),
        ({"alpha": torch.ones(2)}, r"alpha: shape \(2,\), expected one number"),
        ({"alpha": torch.tensor(float("inf"))}, "alpha: holds NaN or infinity"),
        ({"lora_A.weight": torch.full((4, 256), float("nan"))}, "lora_A.weight: holds NaN or infinity"),
        ({"lora_A.weight": torch.ones(8, 256)}, "another model"),
        ({"lora_A.weight": torch.ones(())}, "another model"),
    ],
)
def test_damaged_loras_are_refused(wan, change, message, tmp_path):
    tensors = factors(load_file(wan), LAYER)
    tensors |= {f"diffusion_model.{LAYER}.{end}": value for end, value in change.items()}
    path = tmp_path / "bad.safetensors"
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(QuantError, match=message):
        convert(wan, tmp_path / "a.safetensors", "INT8", loras=[path])
    assert [file.name for file in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_is_no_lora_is_refused(wan, tmp_path):
    with pytest.raises(QuantError, match=r"wan\.safetensors: not a LoRA"):
        convert(wan, tmp_path / "a.gguf", "Q8_0", loras=[wan])
    with pytest.raises(QuantError, match="no such file"):
        convert(wan, tmp_path / "a.gguf", "Q8_0", loras=["nothing.safetensors:0.5"])


def test_a_lora_in_a_gguf(wan, lora, tmp_path):
    state, tensors = {}, load_file(lora)
    for layer in (LAYER, Q):
        for part in "ab":
            key = f"diffusion_model.{layer}.lora_{part.upper()}.weight"
            state[f"diffusion_model.{layer}.weight.lora_{part}"] = tensors[key]
    state[f"diffusion_model.{LAYER}.diff_b"] = tensors[f"diffusion_model.{LAYER}.diff_b"]
    specs = [TensorSpec(name, QTYPES["F32"], tuple(tensor.shape)) for name, tensor in state.items()]
    path = tmp_path / "fast.gguf"
    with GGUFWriter(path, {"general.architecture": "wan", "adapter.lora.alpha": 2.0}, specs) as writer:
        for spec, tensor in zip(specs, state.values(), strict=True):
            writer.write(spec.name, QTYPES["F32"].quantize(tensor, effort="fast"))
    expected = open_gguf(convert(wan, tmp_path / "a.gguf", "Q8_0", loras=[lora]).path)
    found = open_gguf(convert(wan, tmp_path / "b.gguf", "Q8_0", loras=[path]).path)
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].data, tensor.data)


def test_command_line(wan, lora, tmp_path, capsys):
    arguments = ["--lora", f"{lora}:0.5", "--lora", str(lora)]
    assert main(["convert", str(wan), str(tmp_path), "--recipe", "INT8", *arguments]) == 0
    assert "baked into 3 tensors" in capsys.readouterr().out
    path = tmp_path / "wan-fast-fast-INT8.safetensors"
    assert main(["inspect", str(path)]) == 0
    assert "wanquant.loras: fast.safetensors:0.5, fast.safetensors:1.0" in capsys.readouterr().out
    assert main(["verify", str(path), str(wan), *arguments]) == 0
    with_loras = capsys.readouterr().out
    assert "made with LoRAs" not in with_loras
    assert main(["verify", str(path), str(wan)]) == 0
    assert "made with LoRAs: fast.safetensors:0.5, fast.safetensors:1.0; it was compared" in capsys.readouterr().out
    with pytest.raises(SystemExit) as usage:
        main(["convert", str(wan), str(tmp_path), "--lora", f"{lora}:1e999"])
    assert usage.value.code == 2


def test_an_open_source_has_its_loras_already(wan, lora, tmp_path):
    with pytest.raises(QuantError, match="is open without LoRA fast"):
        convert(open_checkpoint(wan), tmp_path / "a.gguf", "Q8_0", loras=[lora])
    convert(open_checkpoint(wan, loras=[LoRA(lora)]), tmp_path / "a.gguf", "Q8_0")
    assert convert(wan, tmp_path / "a.gguf", "Q8_0", loras=[lora]).reused
