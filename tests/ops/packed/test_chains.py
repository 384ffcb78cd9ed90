"""Nodes that users chain after the loader: they act as on a dequantized MODEL, or refuse with a clear message."""

from __future__ import annotations

import comfy.hooks
import comfy.model_management
import comfy.sample
import pytest
import torch
from safetensors.torch import save_file

from wanquant.ops.packed.layout import is_packed
from wanquant.ops.packed.linear import packed_modules
from wanquant.quant import QuantError
from wanquant.tests.ops.packed.patching import lora

nodes = pytest.importorskip("nodes")  # The host's.
LATENT = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))


def extra(module, name):
    return getattr(pytest.importorskip(f"comfy_extras.{module}"), name)


def first(result):
    """Return the first output of a node, which may use either of the host's two interfaces."""
    return (result if isinstance(result, tuple) else result.result)[0]


def text(seed):
    return [[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(seed)), {}]]


def sample(model, positive=None, steps=2, cfg=3.0, sampler="euler"):
    """Sample as KSampler does."""
    noise = comfy.sample.prepare_noise(LATENT, 0)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive or text(1), text(2), LATENT, disable_pbar=True
    )


@pytest.fixture(scope="module", autouse=True)
def loras(t2v, tmp_path_factory):
    """Write LoRA files for LoraLoaderModelOnly and CreateHookLora: 1, 2, 3, and one for few steps."""
    import folder_paths
    from safetensors.torch import load_file

    folder, state = tmp_path_factory.mktemp("loras"), load_file(t2v[0])
    for seed in (1, 2, 3):
        save_file(lora(state, seed=seed), folder / f"{seed}.safetensors")
    few = lora(state, rank=16, seed=4, bias=True)
    few["diffusion_model.blocks.0.norm3.diff"] = torch.full((256,), 0.1)
    few["diffusion_model.blocks.0.self_attn.norm_q.diff"] = torch.full((256,), 0.1)
    few["diffusion_model.patch_embedding.diff"] = torch.full_like(state["patch_embedding.weight"], 0.01).float()
    save_file(few, folder / "4steps.safetensors")
    folder_paths.add_model_folder_path("loras", str(folder))


@pytest.fixture(autouse=True)
def unload():
    yield
    comfy.model_management.unload_all_models()


def with_loras(model, *names, strength=0.5):
    for name in names:
        model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{name}.safetensors", strength)[0]
    return model


def shifted(model):
    return extra("nodes_model_advanced", "ModelSamplingSD3")().patch(model, 5.0)[0]


def easy_cache(model):
    return first(extra("nodes_easycache", "EasyCacheNode").execute(model, 10.0, 0.0, 1.0, False))


def context_windows(model):
    node = extra("nodes_context_windows", "WanContextWindowsManualNode")
    return first(node.execute(model, 9, 4, "standard_static", 1, False, "pyramid", False))


def skip_layer(model):
    node = extra("nodes_slg", "SkipLayerGuidanceDiT")
    return first(node.execute(model, 3.0, 0.0, 1.0, double_layers="1", single_layers=""))


def nag(model):
    return first(extra("nodes_nag", "NAGuidance").execute(model, 5.0, 0.5, 1.5))


def merge(model):
    """Merge a model with itself under a LoRA, which reads its weights dequantized and packed."""
    return extra("nodes_model_merging", "ModelMergeSimple")().merge(model, with_loras(model, "3"), 0.25)[0]


def multi_gpu(model):
    return first(extra("nodes_multigpu", "MultiGPUCFGSplitNode").execute(model, 2))


def other_device(model):
    """Return the clone that the multi-GPU nodes make for each further device."""
    return model.deepclone_multigpu(torch.device("cpu"))


CHAINS = {
    "three_loras": lambda model: with_loras(model, "1", "2", "3"),
    "lora_then_shift": lambda model: shifted(with_loras(model, "1")),
    "easy_cache": lambda model: easy_cache(with_loras(model, "1")),
    "context_windows": lambda model: context_windows(with_loras(model, "1")),
    "skip_layer_guidance": skip_layer,
    "nag": lambda model: nag(with_loras(model, "1")),
    "merge": merge,
    "merge_then_lora": lambda model: with_loras(merge(model), "1"),
    "multi_gpu": lambda model: multi_gpu(with_loras(model, "1")),
}


@pytest.mark.parametrize("name", CHAINS)
def test_same_as_the_dequantized_model(name, model, decoded):
    chain = CHAINS[name]
    expected, actual = (sample(chain(start)) for start in (decoded, model))
    assert not torch.equal(sample(decoded), expected)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)
    assert all(is_packed(module.weight) for _, module in packed_modules(model.model))


def test_lora_for_few_steps(model, decoded):
    expected, actual = (
        sample(shifted(with_loras(start, "4steps", strength=1.0)), steps=4, cfg=1.0, sampler="lcm")
        for start in (decoded, model)
    )
    torch.testing.assert_close(actual, expected, atol=5e-3, rtol=5e-3)


def test_further_device(model):
    expected = sample(with_loras(model, "1"))
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(other_device(with_loras(model, "1"))), expected)


def test_torch_compile(model):
    torch._dynamo.reset()
    expected = sample(with_loras(model, "1"), steps=1, cfg=1.0)
    comfy.model_management.unload_all_models()
    compiled = first(extra("nodes_torch_compile", "TorchCompileModel").execute(with_loras(model, "1"), "eager"))
    torch.testing.assert_close(sample(compiled, steps=1, cfg=1.0), expected, atol=1e-4, rtol=1e-4)


def test_lora_hooks(model, decoded):
    hook = extra("nodes_hooks", "CreateHookLora")().create_hook("2.safetensors", 0.5, 0.0)[0]
    positive = extra("nodes_hooks", "ConditioningSetProperties")().set_properties(text(1), 1.0, "default", hooks=hook)[
        0
    ]
    expected, actual = (sample(with_loras(start, "1"), positive) for start in (decoded, model))
    assert not torch.equal(sample(with_loras(decoded, "1")), expected)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)


def test_model_save_is_refused(model, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    with pytest.raises(QuantError, match="cannot be saved as safetensors"):
        extra("nodes_model_merging", "ModelSave")().save(with_loras(model, "1"), "saved")
    assert not list(tmp_path.rglob("*.safetensors"))
