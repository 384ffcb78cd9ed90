"""Collecting through the host's own sampling, on a packed and on a dense model."""

from __future__ import annotations

import json
from contextlib import contextmanager

import comfy.model_prefetch
import comfy.ops
import comfy.sample
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode

from wanquant.ops.collect_importance import collecting, step_size, with_collector
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed.layout import is_packed
from wanquant.quant import QuantError, read_importance, write_importance
from wanquant.quant.conversion.convert import convert
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.quant.statistics.importance import Collector
from wanquant.tests.ops.test_sources import quantized

NAME = "blocks.1.ffn.2.weight"
STEPS = 3


class StopError(Exception):
    pass


@pytest.fixture(scope="module", params=["packed", "dense", "int8"])
def model(request, t2v, tmp_path_factory):
    if request.param == "packed":
        return load_diffusion_model(t2v[1], dtype=torch.float32)
    if request.param == "dense":
        return comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": torch.float32})
    # A format of the host's, whose products newer hosts compute together with the previous activation.
    stored, layers = quantized(load_file(t2v[0]), "int8-convrot")
    for layer, config in layers.items():
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("int8") / "int8.safetensors"
    save_file(stored, path)
    return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})


def sample(model, *, seed=0, callback=None):
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    text = [[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    empty = torch.zeros_like(noise)
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", text, text, empty, callback=callback, disable_pbar=True
        )


def is_int8(model):
    weight = model.model.diffusion_model.blocks[1].ffn[2].weight
    return isinstance(weight, QuantizedTensor) and not is_packed(weight)


def ffn_inputs(model):
    """Collect the inputs of the layer NAME from the previous layer, since its own hooks may miss the activation."""
    seen, ffn = [], model.model.diffusion_model.blocks[1].ffn
    hook = ffn[0].register_forward_hook(lambda _, __, out: seen.append(gelu(out, approximate="tanh")))
    return seen, hook


def test_every_linear_over_all_steps(model):
    collector = Collector()
    seen, hook = ffn_inputs(model)
    observed = sample(with_collector(model, collector))
    hook.remove()
    collected = collector.result()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    torch.testing.assert_close(collected[NAME], rows.square().mean(0), rtol=1e-5, atol=1e-7)
    assert collected.counts[NAME] == len(rows) == STEPS * 2 * 4 * 4
    assert collected.samples == STEPS
    assert len(collected) == 2 * 10 + 6, "ten Linears a block, and those around them"
    # The host rounds an activation that it computes together with an 8-bit product differently.
    near = 1e-3 if is_int8(model) else 0
    torch.testing.assert_close(observed, sample(model), rtol=near, atol=near)
    assert collector.unseen == []
    assert collector.result().counts == collected.counts, "only the clone collects"
    assert not any(module._forward_pre_hooks for module in model.model.diffusion_model.modules())


def test_products_of_every_linear(model):
    collector = CalibrationCollector()
    seen, hook = ffn_inputs(model)
    sample(with_collector(model, collector))
    hook.remove()
    calibration = collector.result()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    held_out = calibration.held_out[NAME]
    rows = rows[~(rows.bfloat16()[:, None] == held_out).all(2).any(1)]
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
    seen, hook = ffn_inputs(model)
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


def test_layers_that_no_input_reaches_are_told(model):
    """Skip the call of a layer, as the host does if it computes the product itself."""
    collector, transformer = Collector(), model.model.diffusion_model
    block = transformer.blocks[1]
    block.forward = lambda x, **_: x
    sample(with_collector(model, collector))
    del block.forward
    assert len(collector.unseen) == 10
    assert collector.unseen[0] == "blocks.1.cross_attn.k.weight"
    assert not any(name.startswith("blocks.1.") for name in collector.result())


def test_no_block_is_replayed_past_the_hooks(model):
    """The host captures prefetched blocks as CUDA graphs, and does not run their Python code again."""
    seen = []

    def record(executor, x, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "wrappers" in a)
        seen.append(options["prefetch_dynamic_vbars"])
        return executor(x, *args, **kwargs)

    observed = with_collector(model, Collector())
    observed.model_options["transformer_options"]["prefetch_dynamic_vbars"] = True
    observed.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "record", record)
    sample(observed)
    assert seen == [False] * STEPS


class Passes(TorchDispatchMode):
    """The number of elements that operations read or write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(t.numel() for t in (*args, out) if isinstance(t, torch.Tensor))
        return out


def test_goes_over_inputs_a_few_times():
    """Collecting makes a float32 copy, sums it, squares it in place, and sums it again."""
    inputs = torch.randn(512, 8960, dtype=torch.bfloat16)
    with Passes() as passes:
        Collector().add("ffn.2", inputs)
    assert passes.elements < 7 * inputs.numel()


def test_sums_are_kept_outside_the_hosts_allocation_graph(monkeypatch):
    """Memory that is allocated in a block must be freed when the block ends, but the sums must stay."""
    depth, depths = [0], []

    @contextmanager
    def pause():
        depth[0] += 1
        yield
        depth[0] -= 1

    class Seen(Collector):
        def add(self, *args):
            depths.append(depth[0])
            super().add(*args)

    monkeypatch.setattr(comfy.model_prefetch, "pause_malloc_graph", pause, raising=False)
    layer = comfy.ops.manual_cast.Linear(8, 8)
    with collecting(torch.nn.Sequential(layer), Seen()):
        layer(torch.ones(2, 8))
    assert depths == [1]
