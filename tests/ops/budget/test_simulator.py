"""The predicted peak equals that of a real forward on the CPU, and known figures for published models."""

from __future__ import annotations

import math

import comfy.ldm.modules.attention as attention
import comfy.ops
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from wanquant.ops import host
from wanquant.ops.budget import gpu_kernels
from wanquant.ops.budget.live_memory import LiveMemory
from wanquant.ops.budget.meta_wan import meta_model, meta_twin
from wanquant.ops.budget.sampling_job import SamplingJob, clip_vision_entries
from wanquant.ops.budget.simulator import Simulator, streamed_bytes
from wanquant.ops.lean import MemoryPlan, apply_lean
from wanquant.ops.lean.weights import is_untouched
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed import int8
from wanquant.quant import QuantError, convert
from wanquant.quant.native.registry import NATIVE
from wanquant.quant.plan.recipe import find_recipe, plan_types
from wanquant.quant.plan.wan_files import Source
from wanquant.quant.plan.wan_shapes import SIZES, transformer_shapes
from wanquant.quant.units import GIB
from wanquant.tests.ops.lean.folding import FoldingFFN

LATENT = (1, 16, 3, 32, 32)
LEAN = MemoryPlan(2, 256)


class FlashAttention:
    accepts_query_chunks = True

    def __call__(self, _, q, k, v, heads, *args, **kwargs):
        return attention.attention_pytorch(q, k, v, heads, *args, **kwargs)


class FusedNorms(TorchFunctionMode):
    """Hides the operations of which torch's RMS norm consists on the CPU; on GPUs it is one kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.rms_norm:
            return func(*args, **(kwargs or {}))
        output = torch.empty_like(args[0])
        with _disable_current_modes():
            return output.copy_(func(*args, **kwargs))


@torch.no_grad()
def real_peak(patcher, lean, latent=LATENT):
    """Return the peak of activations and scratch in bytes of a forward on the CPU, without its inputs."""
    model = (apply_lean(patcher, lean) if lean else patcher).clone()
    options = {"wrappers": model.wrappers, "optimized_attention_override": FlashAttention()}
    loaded = patcher.patch_model(torch.device("cpu"))
    inputs = torch.randn(latent), torch.ones(1)
    context = torch.randn(1, 512, 4096)
    with LiveMemory("cpu") as memory, FusedNorms():
        loaded.apply_model(*inputs, c_crossattn=context, transformer_options=options)
    return memory.peak.nbytes


def simulated_peak(patcher, lean, latent=LATENT):
    peak = Simulator.from_patcher(patcher).peak(SamplingJob(latent), lean)
    inputs = 8 * 4 * math.prod(latent) + 4 * 512 * 4096 + 512
    return peak.activation_bytes + peak.scratch_bytes - inputs


@pytest.fixture
def streamed(monkeypatch):
    """Makes the CPU's forward copy weights that it holds, as for weights that are streamed to a GPU."""
    monkeypatch.setattr(host, "is_lent", lambda *_: True)


@pytest.mark.parametrize("lean", [None, LEAN], ids=["stock", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_a_real_forward(t2v, dtype, lean, streamed):
    dense = comfy.sd.load_diffusion_model(str(t2v[0]), {"dtype": dtype})
    assert simulated_peak(dense, lean) == pytest.approx(real_peak(dense, lean), rel=0.01)


def test_agrees_with_a_real_forward_of_packed_weights(t2v):
    packed = load_diffusion_model(t2v[1], dtype=torch.float32)
    # On the CPU the tile outlives its use, and dequantization by ggml or torch has temporaries.
    assert simulated_peak(packed, LEAN) == pytest.approx(real_peak(packed, LEAN), rel=0.1)


# Latents with enough tokens for products in 8-bit integers.
MANY = (1, 16, 9, 32, 32)


@pytest.mark.parametrize("lean", [None, MemoryPlan(2, 1000)], ids=["stock", "lean"])
def test_agrees_with_a_real_forward_in_int8(t2v, lean, monkeypatch):
    pytest.importorskip("comfy_kitchen.tensor.int8", reason="this ComfyUI has no INT8 arithmetic")
    models = [load_diffusion_model(t2v[1], dtype=torch.float32, precision=precision) for precision in ("exact", "int8")]
    # Making the rows has temporaries on the CPU, but not on a GPU.
    monkeypatch.setattr(int8, "int8_rows_into", without_temporaries(int8.int8_rows_into))
    exact, found = (simulated_peak(model, lean, MANY) for model in models)
    assert found == pytest.approx(real_peak(models[1], lean, MANY), rel=0.05)
    assert found != exact


def without_temporaries(make):
    """Return a function that makes 8-bit rows unseen by counters of memory, as a GPU's kernel allocates nothing."""

    def allocate_nothing(packed, *arguments):
        if packed.is_meta:
            make(packed, *arguments)
        else:
            with _disable_current_modes():
                make(packed, *arguments)

    return allocate_nothing


@pytest.mark.parametrize("lean", [None, LEAN], ids=["stock", "lean"])
@pytest.mark.parametrize("recipe", ["INT8", "INT4"])
def test_agrees_with_a_real_forward_in_formats_of_the_host(t2v, recipe, lean, streamed, tmp_path, monkeypatch):
    algorithms = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    if NATIVE[recipe].config["format"] not in algorithms:
        pytest.skip(f"this host does not know {recipe}")
    # On the CPU, a product with the activation within (0.31 on) has temporaries that a GPU's kernel has not.
    monkeypatch.setattr(comfy.ops, "linear_input_act", gpu_kernels._fold, raising=False)
    path = convert(t2v[0], tmp_path / "a.safetensors", recipe).path
    model = comfy.sd.load_diffusion_model(str(path), {"dtype": torch.bfloat16})
    assert simulated_peak(model, lean) == pytest.approx(real_peak(model, lean), rel=0.03)


@pytest.mark.parametrize("recipe", ["INT8", "FP8"])
def test_an_activation_within_a_product_counts_as_a_gpus_kernel_needs_it(t2v, recipe, tmp_path):
    """ComfyUI's kernel for INT8 applies it; kitchen's operations for the CPU would hide the product."""
    if not hasattr(comfy.ops, "linear_input_act"):
        pytest.skip("this host applies activations by themselves")
    path = convert(t2v[0], tmp_path / "a.safetensors", recipe).path
    twin = meta_twin(comfy.sd.load_diffusion_model(str(path), {"dtype": torch.bfloat16}).model)
    ffn, x = twin.diffusion_model.blocks[0].ffn, torch.empty(1, 4096, 256, dtype=torch.bfloat16, device="meta")

    def apart():
        first, activation, last = ffn
        hidden = first(x)
        return last(hidden if recipe == "INT8" else activation(hidden))

    ffn.__class__ = FoldingFFN
    gpu_kernels.use_flash_attention(twin.diffusion_model)
    assert is_untouched(ffn), "so that it runs lean"
    moments = []
    for call in (apart, lambda: ffn(x)):
        with torch.no_grad(), LiveMemory("meta") as memory:
            call()
        moments.append((memory.peak.nbytes, memory.now.flops))
    assert moments[0] == moments[1]


def simulator(size, recipe="Q4_K_M"):
    shapes = transformer_shapes(size)
    types = plan_types(find_recipe(recipe), {name: Source(shape) for name, shape in shapes.items()}).types
    model = meta_model(shapes, types)
    return Simulator(meta_twin(model), weight_bytes=streamed_bytes(model))


@pytest.mark.parametrize(("tokens", "gib"), [((21, 60, 104), 3.48), ((21, 90, 160), 8.03)])
def test_stock_forward_of_14b_without_fused_norms(tokens, gib, monkeypatch):
    """The figures were counted independently, without the sampler's latents and the prompt."""
    monkeypatch.setattr("wanquant.ops.budget.gpu_kernels._HAS_FUSED_NORMS", False)
    peak = simulator(SIZES["14B"]).peak(SamplingJob((1, 16, *tokens)), None)
    around = (8 * 16 * tokens[0] * tokens[1] * tokens[2] + 512 * 4096) * 4 / GIB
    assert (peak.activation_bytes + peak.scratch_bytes) / GIB - around == pytest.approx(gib, abs=0.02)


def test_the_history_contains_the_peak():
    simulated, job = simulator(SIZES["1.3B"]), SamplingJob(LATENT)
    for lean in (None, LEAN):
        memory = simulated.run(job, lean, record=True)
        assert max(memory.history, key=lambda moment: moment.nbytes).nbytes == memory.peak.nbytes
        assert memory.history[-1].flops == simulated.peak(job, lean).flops


def test_one_block_has_the_peak_of_all():
    shapes = transformer_shapes(SIZES["1.3B"]._replace(layers=3))
    types = plan_types(find_recipe("Q8_0"), {name: Source(shape) for name, shape in shapes.items()}).types
    model, job = meta_model(shapes, types), SamplingJob(LATENT)
    for lean in (None, LEAN):
        one, all_ = (
            Simulator(meta_twin(model), weight_bytes=0).peak(job, lean),
            Simulator(model, weight_bytes=0).peak(job, lean),
        )
        assert one.total_bytes == all_.total_bytes
        assert one.flops < all_.flops


def test_weights_are_the_two_largest_layers_and_what_cannot_be_streamed():
    shapes = transformer_shapes(SIZES["14B"])
    types = plan_types(find_recipe("Q4_K_M"), {name: Source(shape) for name, shape in shapes.items()}).types
    modulation = 4 * 5120 * (40 * 6 + 2)
    ffn_2 = types["blocks.0.ffn.2.weight"].packed_shape((5120, 13824))
    assert streamed_bytes(meta_model(shapes, types)) == modulation + 2 * (ffn_2[0] * ffn_2[1] + 4 * 5120)


def test_loras_are_counted(t2v):
    patcher = load_diffusion_model(t2v[1], dtype=torch.bfloat16)
    with_lora, rank = patcher.clone(), 8
    lora = LoRAAdapter(set(), (torch.randn(512, rank), torch.randn(rank, 256), None, None, None, None))
    with_lora.add_patches({"diffusion_model.blocks.0.ffn.0.weight": lora})
    for lean in (None, LEAN):
        plain, patched = (Simulator.from_patcher(p).peak(SamplingJob(LATENT), lean) for p in (patcher, with_lora))
        assert patched.flops - plain.flops == 2 * rank * 512 * 256
        assert patched.total_bytes >= plain.total_bytes


def test_control_videos_and_images_are_counted():
    vace = simulator(SIZES["1.3B"]._replace(layers=4, vace_layers=2))
    one, two = (vace.peak(SamplingJob(LATENT).with_control_videos(count), LEAN).activation_bytes for count in (1, 2))
    assert two - one >= 2 * 1536 * 3 * 16 * 16
    image = simulator(SIZES["1.3B"]._replace(layers=1, in_dim=36, image=True))
    one, two = (
        image.peak(SamplingJob(LATENT).with_entries(**clip_vision_entries(257 * count)), LEAN).flops for count in (1, 2)
    )
    assert two > one


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((830, 480, 81), "multiples of 16"),
        ((0, 480, 81), "size 0x480"),
        ((832, 480, 80), "frames 80"),
        ((832, 480, -3), "-3"),
    ],
)
def test_refuses_videos_that_wan_does_not_support(size, message):
    with pytest.raises(QuantError, match=message):
        SamplingJob.for_video(*size)


def test_sizes_of_the_5b_are_multiples_of_32():
    assert SamplingJob.for_video(1280, 704, 121, channels=48).latent == (1, 48, 31, 44, 80)
    with pytest.raises(QuantError, match="32"):
        SamplingJob.for_video(1280, 720, 121, channels=48)
    assert str(SamplingJob.for_video(832, 480, 81)) == "832x480, 81 frames"
