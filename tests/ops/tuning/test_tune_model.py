"""Capture and tuning of a tiny Wan, through the host's own sampling and block code."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import comfy.sample
import comfy.sd
import pytest
import torch
from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

from wanquant.ops.collect_importance import with_collector
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.merged_source import merged_checkpoint
from wanquant.ops.tuning.capture_blocks import check_tunable, with_capture
from wanquant.ops.tuning.tune_model import block_module, tune_model
from wanquant.quant import QuantError, open_gguf
from wanquant.quant.conversion import layer_encoder
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.provenance import TUNED
from wanquant.quant.statistics.importance import Collector
from wanquant.quant.tuning.capture import Capture, CapturedCalls
from wanquant.quant.tuning.tune import TuneSettings

STEPS, RECIPE = 2, "Q4_0"
SETTINGS = TuneSettings()


def sample(model, seed=0):
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    text = [[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), disable_pbar=True
        )


@pytest.fixture(scope="module")
def dense(t2v):
    return comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32})


@pytest.fixture(scope="module")
def captured(dense, tmp_path_factory):
    """The path of a capture of `dense`."""
    folder = tmp_path_factory.mktemp("capture")
    capture = Capture(folder, 1 << 24)
    observed, plain = sample(with_capture(dense, capture)), sample(dense)
    assert torch.equal(observed, plain), "results do not change"
    assert capture.seen == len(capture) == STEPS
    assert not any(module._forward_pre_hooks for module in dense.model.diffusion_model.modules())
    return capture.write(folder / "blocks.safetensors")


@pytest.fixture(scope="module")
def tuned(dense, captured, tmp_path_factory):
    return tune_model(dense, captured, tmp_path_factory.mktemp("tuned") / "a.gguf", RECIPE, SETTINGS).path


def test_blocks_without_the_model_repeat_what_it_computes(dense, captured):
    seen, model = [], dense.model.diffusion_model
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out.clone())) for block in model.blocks]
    sample(dense)
    for hook in hooks:
        hook.remove()
    calls, module = CapturedCalls.open(captured), block_module(model, dense)
    for index in range(STEPS):
        hidden = calls.hidden(index)
        for number, block in enumerate(model.blocks):
            weights = {name: tensor.detach().float() for name, tensor in block.named_parameters()}
            hidden = module(weights, hidden, calls.others(index, torch.device("cpu")))
            torch.testing.assert_close(hidden, seen[2 * index + number], rtol=1e-4, atol=1e-4)


def test_file_has_the_types_and_the_size_of_a_conversion(tuned, dense, tmp_path):
    source = merged_checkpoint(dense, torch.device("cpu"))
    report = convert(source, tmp_path / "a.gguf", RECIPE, effort="fast")
    ours, theirs = open_gguf(tuned), open_gguf(report.path)
    assert {n: t.qtype.name for n, t in ours.tensors.items()} == {n: t.qtype.name for n, t in theirs.tensors.items()}
    assert sum(t.data.nbytes for t in ours.tensors.values()) == sum(t.data.nbytes for t in theirs.tensors.values())
    assert TUNED in ours.metadata and TUNED not in theirs.metadata
    assert list(tuned.parent.iterdir()) == [tuned], "nothing else stays"


def test_file_loads_and_samples(tuned, dense, sqnr):
    assert sqnr(sample(dense), sample(load_diffusion_model(tuned, dtype=torch.float32))) > 15


def test_same_tuning_is_reused(tuned, dense, captured):
    written = tuned.stat().st_mtime_ns
    assert tune_model(dense, captured, tuned, RECIPE, SETTINGS).reused
    assert tuned.stat().st_mtime_ns == written
    with pytest.raises(QuantError, match="is not this conversion"):
        tune_model(dense, captured, tuned, RECIPE, TuneSettings(effort="thorough"))


def test_tuned_file_of_an_older_rounding_is_used(tuned, dense, captured, monkeypatch):
    monkeypatch.setattr(layer_encoder, "_TUNED_REVISION", layer_encoder._TUNED_REVISION + 1)
    report = tune_model(dense, captured, tuned, RECIPE, SETTINGS)
    assert report.reused and f"made by an older encoder of {RECIPE};" in report.text()


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_at", ["block 1 of 2", "block 2 of 2"])
def test_interrupted_tuning_continues(tuned, dense, captured, tmp_path, stop_at):
    def stop(_done, _total, text):
        if text.startswith(stop_at):
            stopped.append(text)
            if len(stopped) > 3:
                raise StopError

    stopped: list[str] = []
    with pytest.raises(StopError):
        tune_model(dense, captured, tmp_path / "a.gguf", RECIPE, TuneSettings(progress=stop))
    assert not (tmp_path / "a.gguf").exists()
    seen: list[str] = []
    settings = TuneSettings(progress=lambda _done, _total, text: seen.append(text))
    again = tune_model(dense, captured, tmp_path / "a.gguf", RECIPE, settings).path
    assert all(text.startswith("block 2") for text in seen) == (stop_at == "block 2 of 2")
    assert again.read_bytes() == tuned.read_bytes(), "the same bytes as in one go"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_model_and_capture_in_bfloat16_and_float32_go_together(t2v, captured, tmp_path):
    model = comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.bfloat16})
    capture = Capture(tmp_path, 1 << 24)
    sample(with_capture(model, capture))
    for blocks in (captured, capture.write(tmp_path / "own.blocks.safetensors")):
        report = tune_model(model, blocks, tmp_path / f"{blocks.stem}.gguf", "F16", SETTINGS)
        assert max(tensor.relative_error for tensor in report.tensors if tensor.relative_error) < 1e-2


def test_packed_model_is_refused(t2v, captured, tmp_path):
    with pytest.raises(QuantError, match="is quantized already"):
        tune_model(load_diffusion_model(t2v[1], dtype=torch.float32), captured, tmp_path / "a.gguf", RECIPE, SETTINGS)


def test_other_model_than_captured_is_refused(tiny_wan, captured, tmp_path):
    for change in ({"layers": 3}, {"layers": 2, "seed": 5}):
        other = tiny_wan["write_tiny_wan"](tmp_path / "other.safetensors", ffn_dim=512, **change)
        model = comfy.sd.load_diffusion_model(str(other), {"dtype": torch.float32})
        with pytest.raises(QuantError, match="was captured from another model"):
            tune_model(model, captured, tmp_path / "a.gguf", RECIPE, SETTINGS)


@pytest.mark.parametrize("keys", [["diffusion_model"], ["diffusion_model.blocks.0", "diffusion_model.blocks.1"]])
@pytest.mark.parametrize("first", ["compiled", "observed"])
def test_compiled_model_is_observed_under_its_own_names(dense, captured, tmp_path, keys, first):
    collector, capture, plain = Collector(), Capture(tmp_path, 1 << 24), Collector()
    model = dense.clone()
    if first == "compiled":
        set_torch_compile_wrapper(model, "eager", keys=keys)
    model = with_collector(with_capture(model, capture), collector)
    if first == "observed":
        set_torch_compile_wrapper(model, "eager", keys=keys)
    assert torch.equal(sample(model), sample(with_collector(dense, plain)))
    collected, expected = collector.result(), plain.result()
    assert collected.keys() == expected.keys() and collector.unseen == []
    assert all(torch.equal(collected[name], expected[name]) for name in expected)
    assert capture.write(tmp_path / "blocks.safetensors").read_bytes() == captured.read_bytes()


def test_what_is_no_capture_is_refused(dense, t2v, tmp_path):
    with pytest.raises(QuantError, match="not a capture"):
        tune_model(dense, t2v[0], tmp_path / "a.gguf", RECIPE, SETTINGS)


def test_patched_blocks_are_refused(dense, tmp_path):
    patched = dense.clone()
    patched.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    with pytest.raises(QuantError, match="another node patches its blocks"):
        sample(with_capture(patched, Capture(tmp_path, 1 << 24)))


def test_other_classes_are_refused():
    with pytest.raises(QuantError, match="is a Linear, which cannot be tuned block by block"):
        check_tunable(torch.nn.Linear(1, 1))


def test_full_disk_is_refused_before_the_first_block(dense, captured, tmp_path, monkeypatch):
    free = 1 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(QuantError, match="GiB free in the folder"):
        tune_model(dense, captured, tmp_path / "a.gguf", RECIPE, SETTINGS)
    assert not list(tmp_path.iterdir())
