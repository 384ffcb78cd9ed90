"""Time of a sampling step with two LoRAs of rank 64 over one without, at 1.3B's layer shapes on the CPU.

The LoRAs are on every Linear of the blocks. The steps of all models take turns in one process, and the least processor
time of each counts. `peer` columns are ComfyUI-GGUF's. The cost of LoRAs does not depend on the number of tokens, but
that of the step does. With many tokens the ratio is below the variation between steps, so `loras` is the LoRAs' share
of a step, timed alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.conversion.convert import convert
from . import harness
from .step import Step, packed_model, peer_model, run, step_of

RANK, COUNT = 64, 2


def loras(model: torch.nn.Module) -> list[dict[str, Tensor]]:
    """Return LoRA files as published for Wan: bfloat16, both factors of every Linear in the blocks."""
    generator = torch.Generator().manual_seed(0)
    files: list[dict[str, Tensor]] = [{} for _ in range(COUNT)]
    for name, module in model.named_modules():
        if name.startswith("blocks.") and hasattr(module, "in_features"):
            for tensors in files:
                up, down = torch.zeros(module.out_features, RANK), torch.empty(RANK, module.in_features)
                tensors[f"diffusion_model.{name}.lora_B.weight"] = up.normal_(0, 0.01, generator=generator).bfloat16()
                tensors[f"diffusion_model.{name}.lora_A.weight"] = down.normal_(0, 0.01, generator=generator).bfloat16()
    return files


def with_loras(patcher: Any) -> Any:
    import comfy.sd

    for tensors in loras(patcher.model.diffusion_model):
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, 0.5, 0)
    return patcher


def give_to_weights(patcher: Any) -> Any:
    """Attach its patches to each weight, as ComfyUI-GGUF's patcher does."""
    import comfy.utils

    for key, patches in patcher.patches.items():
        weight = comfy.utils.get_attr(patcher.model, key)
        weight.patches = [(patches, key)]
    patcher.patches = {}
    return patcher


def loras_alone(patcher: Any) -> Step:
    """Return a call that applies the LoRAs of one step to scratch weights."""
    from ..ops.packed.linear import packed_modules

    layers = [
        (function, torch.zeros(module.weight.shape, dtype=torch.bfloat16))
        for _, module in packed_modules(patcher.model)
        for function in module.weight_function
    ]

    def once() -> None:
        for function, weight in layers:
            function(weight)

    return torch.inference_mode()(once)


def measure(source: Path, recipe: str, latent: torch.Size, seconds: float, peer: Path | None) -> dict[str, object]:
    file = source.with_name(f"{source.stem}-{recipe}.gguf")
    convert(source, file, recipe, effort="fast")
    models = [packed_model(file), with_loras(packed_model(file))]
    if peer:
        models += [peer_model(peer, file), give_to_weights(with_loras(peer_model(peer, file)))]
    steps = [step_of(model, latent) for model in models]
    alone, without, with_them, *others = harness.fastest(
        seconds, loras_alone(models[1]), *steps, clock=time.process_time
    )
    row: dict[str, object] = {"recipe": recipe, "tokens": latent[2:].numel() // 4}
    row |= {"seconds": round(without / 1e3, 2), "with_loras": round(with_them / without, 3)}
    row |= {"loras": round(alone / without, 4)}
    if others:
        row |= {"peer_seconds": round(others[0] / 1e3, 2), "peer_with_loras": round(others[1] / others[0], 3)}
    return row


def main() -> None:
    columns = ("recipe", "tokens", "seconds", "with_loras", "loras", "peer_seconds", "peer_with_loras")
    run(__doc__ or "", measure, columns, recipes=["Q4_K_M"], frames=[3, 9], blocks=1, seconds=30)


if __name__ == "__main__":
    main()
