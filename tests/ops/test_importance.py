"""Collecting through the host's own sampling, on a packed and on a dense model."""

from __future__ import annotations

import time

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch

from wanquant.ops.importance import step_size, with_collector
from wanquant.ops.loader import load_diffusion_model
from wanquant.quant import QuantError, read_importance, write_importance
from wanquant.quant.calibration import CalibrationCollector
from wanquant.quant.convert import convert
from wanquant.quant.importance import Collector

NAME = "blocks.1.ffn.2.weight"
STEPS = 3


class StopError(Exception):
    pass


@pytest.fixture(scope="module", params=["packed", "dense"])
def model(request, t2v):
    if request.param == "packed":
        return load_diffusion_model(t2v[1], dtype=torch.float32)
    return comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32})


def sample(model, *, seed=0, callback=None):
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    text = [[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    empty = torch.zeros_like(noise)
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", text, text, empty, callback=callback, disable_pbar=True
        )


def layer_inputs(model, name):
    """What reaches one layer while the block runs."""
    seen = []
    module = model.model.diffusion_model.get_submodule(name.removesuffix(".weight"))
    return seen, module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))


def test_every_linear_over_all_steps(model):
    collector = Collector()
    seen, hook = layer_inputs(model, NAME)
    observed = sample(with_collector(model, collector))
    hook.remove()
    collected = collector.result()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    torch.testing.assert_close(collected[NAME], rows.square().mean(0), rtol=1e-5, atol=1e-7)
    assert collected.counts[NAME] == len(rows) == STEPS * 2 * 4 * 4
    assert collected.samples == STEPS
    assert len(collected) == 2 * 10 + 6, "ten Linears a block, and those around them"
    assert torch.equal(observed, sample(model)), "the result is the same"
    assert collector.result().counts == collected.counts, "only the clone collects"
    assert not any(module._forward_pre_hooks for module in model.model.diffusion_model.modules())


def test_products_of_every_linear(model):
    collector = CalibrationCollector()
    seen, hook = layer_inputs(model, NAME)
    sample(with_collector(model, collector))
    hook.remove()
    calibration = collector.result()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    expected = torch.stack([part.t() @ part for part in rows.split(256, 1)])
    torch.testing.assert_close(calibration.products[NAME], expected, rtol=1e-4, atol=1e-5)
    assert calibration.samples == STEPS
    query, key = (calibration.products[f"blocks.0.self_attn.{name}.weight"] for name in "qk")
    assert torch.equal(query, key), "they have the same inputs, which a file keeps once"


def test_file_is_that_of_the_model(model, t2v, tmp_path):
    collector = Collector()
    sample(with_collector(model, collector))
    path = write_importance(tmp_path / "i.gguf", collector.result())
    report = convert(t2v[0], tmp_path / "a.gguf", "Q4_0", effort="fast", importance=read_importance(path))
    assert report.warnings == ()
    assert report.metadata["quantize.imatrix.chunks_count"] == STEPS


def test_interrupted_run_leaves_what_it_saw(model, tmp_path):
    def stop(step, *_):
        if step == 1:
            raise StopError

    collector = Collector()
    with pytest.raises(StopError):
        sample(with_collector(model, collector), callback=stop)
    partial = read_importance(write_importance(tmp_path / "i.gguf", collector.result()))
    assert partial.samples == 2
    assert not any(module._forward_pre_hooks for module in model.model.diffusion_model.modules())
    sample(with_collector(model, collector))
    assert collector.result().samples == 2 + STEPS, "the next run adds to it"


def test_interruption_within_an_evaluation(model):
    def fail(*_):
        raise StopError

    collector = Collector()
    hook = model.model.diffusion_model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(StopError):
        sample(with_collector(model, collector))
    hook.remove()
    partial = collector.result()
    assert partial.samples == 0
    assert "blocks.0.ffn.2.weight" in partial and NAME not in partial
    assert not any(module._forward_pre_hooks for module in model.model.diffusion_model.modules())


def test_inputs_with_nan_are_refused(model):
    collector = Collector()
    hook = model.model.diffusion_model.blocks[0].register_forward_pre_hook(lambda _, inputs: inputs[0].fill_(torch.nan))
    sample(with_collector(model, collector))
    hook.remove()
    with pytest.raises(QuantError, match=r"blocks\.0\.self_attn\.q\.weight: its inputs hold NaN"):
        collector.result()


def test_steps_count_by_their_size(model):
    collector = Collector()
    seen, hook = layer_inputs(model, NAME)
    model = with_collector(model, collector, by_step_size=True)
    sample(model)
    hook.remove()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    schedule = ((sigmas[:-1] - sigmas[1:]) / sigmas[0]).square()
    total = sum(weight * x.reshape(-1, x.shape[-1]).square().mean(0) for weight, x in zip(schedule, seen, strict=True))
    torch.testing.assert_close(collector.result()[NAME], total / schedule.sum(), rtol=1e-4, atol=1e-7)


def test_step_sizes():
    sigmas = torch.tensor([10.0, 8.0, 5.0, 0.0])
    assert [step_size(torch.tensor([s]), sigmas) for s in (10.0, 8.01, 5.0)] == pytest.approx([0.2, 0.3, 0.5])
    assert step_size(torch.tensor([3.0]), None) == 1.0


def test_costs_little_time():
    """One block's widths of Wan 1.3B: the sums beside the products of the same inputs, both timed here."""
    width, inner, tokens = 1536, 8960, 512
    collector = Collector()
    narrow, wide = torch.randn(tokens, width), torch.randn(tokens, inner)
    square, up = torch.randn(width, width), torch.randn(inner, width)

    def products():
        for _ in range(8):
            torch.nn.functional.linear(narrow, square)
        torch.nn.functional.linear(narrow, up), torch.nn.functional.linear(wide, up.t())

    def sums():
        for index in range(9):
            collector.add(f"{index}", narrow)
        collector.add("ffn.2", wide)

    def quickest(work):
        def timed():
            start = time.process_time()
            work()
            return time.process_time() - start

        work()
        return min(timed() for _ in range(3))

    assert quickest(sums) < 0.03 * quickest(products)
