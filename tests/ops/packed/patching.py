"""Shared by tests of patches on a whole model: LoRA files, loading as the host does it, and reading the result."""

from __future__ import annotations

import comfy.sd
import torch

from wanquant.ops.packed.linear import packed_modules

CPU = torch.device("cpu")
LAYERS = ("self_attn.q", "self_attn.o", "cross_attn.v", "ffn.0", "ffn.2")
KEY = "diffusion_model.blocks.0.ffn.0.weight"


def lora(state, *, rank=8, seed=0, bias=False, **extra):
    """Return a LoRA as published for Wan, for five layers of each block."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in state.items():
        if name.startswith("blocks.") and any(name.endswith(f".{layer}.weight") for layer in LAYERS):
            stem = "diffusion_model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) / 16
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) / 16
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank) / 2)
            if bias:
                tensors[f"{stem}.diff_b"] = torch.randn(weight.shape[0], generator=generator)
            for suffix, make in extra.items():
                tensors[f"{stem}.{suffix}"] = make(weight)
    return tensors


def with_lora(patcher, tensors, strength=1.0):
    return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]


def load(patcher, memory=None):
    """Load as the host's memory manager does: everything, or as much as `memory` bytes hold."""
    patcher.patch_model(CPU, load_weights=False)
    patcher.partially_load(CPU, 1 << 40 if memory is None else memory)
    return patcher


def forward(patcher):
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in [(1, 16, 2, 8, 8), (1, 7, 4096)])
    with torch.no_grad():
        return patcher.model.diffusion_model(x, torch.tensor([500.0]), text)


def functions(patcher):
    return [f for _, module in packed_modules(patcher.model) for f in module.weight_function]


def blocks(patcher):
    return {key: module.weight._qdata.clone() for key, module in packed_modules(patcher.model)}
