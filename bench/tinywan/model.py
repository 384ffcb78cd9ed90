"""TinyWan is the host's own Wan class, built so that it can train."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import comfy.ldm.wan.model
import comfy.model_management
import torch
from torch import Tensor

SHAPE = {"dim": 256, "ffn_dim": 768, "num_heads": 2, "num_layers": 4}

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents, timesteps in 0..1000, text) -> velocity, all float32 and on the caller's device."""


class _RMSNorm(torch.nn.RMSNorm):
    """The weight in the input's dtype: autocast leaves it, and the mixture is slow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def build(seed: int = 0, *, training: bool = False) -> torch.nn.Module:
    """New float32 weights in the host's class."""
    # The host's kernel for rotary embeddings has no backward; it has a slower one for training.
    comfy.model_management.in_training |= training
    torch.manual_seed(seed)
    operations = SimpleNamespace(
        Linear=torch.nn.Linear, Conv3d=torch.nn.Conv3d, LayerNorm=torch.nn.LayerNorm, RMSNorm=_RMSNorm
    )
    model = comfy.ldm.wan.model.WanModel(**SHAPE, operations=operations, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("modulation"):  # the host leaves them uninitialised
            torch.nn.init.normal_(parameter, std=SHAPE["dim"] ** -0.5)
    torch.nn.init.zeros_(model.head.head.weight)
    return model


def velocity(model: torch.nn.Module, arithmetic: torch.dtype = torch.float32) -> Model:
    """The model on its device as a function; `arithmetic` is float32 or bfloat16, which is faster."""
    device = next(model.parameters()).device

    def call(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(device.type, arithmetic, enabled=arithmetic != torch.float32):
            output = model(x.to(device, arithmetic), timestep.to(device), text.to(device))
        return output.float().to(x.device)

    return call
