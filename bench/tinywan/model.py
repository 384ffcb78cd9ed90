"""TinyWan as a model: ComfyUI's own Wan class, built so that it can be trained."""

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
    """RMS norm that casts its weight to the input's dtype, as autocast does not and mixed dtypes are slow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def build(seed: int = 0, *, training: bool = False) -> torch.nn.Module:
    """Return a newly initialized float32 model of ComfyUI's class."""
    # ComfyUI's kernel for rotary embeddings has no backward pass; it has a slower one for training.
    comfy.model_management.in_training |= training
    torch.manual_seed(seed)
    operations = SimpleNamespace(
        Linear=torch.nn.Linear, Conv3d=torch.nn.Conv3d, LayerNorm=torch.nn.LayerNorm, RMSNorm=_RMSNorm
    )
    model = comfy.ldm.wan.model.WanModel(**SHAPE, operations=operations, dtype=torch.float32)
    _initialize(model)
    for block in model.blocks[1:]:
        _attend_to_neighboring_frames(block.self_attn)
    return model


def _initialize(model: torch.nn.Module) -> None:
    """Initialize as Wan's own code does, by Xavier, except that the embedding keeps the scale of words.

    Source: `init_weights`, https://github.com/Wan-Video/Wan2.1/blob/main/wan/modules/model.py
    """
    for name, parameter in model.named_parameters():
        if name.endswith("modulation"):
            torch.nn.init.normal_(parameter, std=SHAPE["dim"] ** -0.5)
        elif name.endswith("bias") or name.startswith("head.head"):
            torch.nn.init.zeros_(parameter)
        elif name.startswith(("text_embedding", "patch_embedding")):
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_normal_(parameter)


def _attend_to_neighboring_frames(attention: torch.nn.Module) -> None:
    """Make the first head attend to the same place one frame before, and the second to one frame after.

    A head that attends to both frames equally, or to nothing, has a zero gradient toward either. Rotary embeddings
    rotate pairs of channels of q and k by position times frequency. So a constant q that is ahead by the angle of one
    frame scores best with the k of the next frame.
    """
    widths = [attention.head_dim - 4 * (attention.head_dim // 6)] + 2 * [2 * (attention.head_dim // 6)]
    frequencies = torch.cat([10000 ** -(torch.arange(0, width, 2) / width) for width in widths])
    size = 2.0 * (frequencies > 0.05)  # lower ones hardly differ between neighboring frames
    in_time = torch.arange(len(frequencies)) < widths[0] // 2
    angles = torch.tensor([[-1.0], [1.0]]) * frequencies * in_time
    with torch.no_grad():
        attention.q.bias.copy_(torch.stack([size * angles.cos(), size * angles.sin()], -1).flatten())
        attention.k.bias.copy_(torch.stack([size, 0 * size], -1).repeat(2, 1, 1).flatten())


def velocity(model: torch.nn.Module, arithmetic: torch.dtype = torch.float32) -> Model:
    """Return the model as a function; `arithmetic` is float32, or bfloat16, which is faster."""
    device = next(model.parameters()).device

    def call(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(device.type, arithmetic, enabled=arithmetic != torch.float32):
            output = model(x.to(device, arithmetic), timestep.to(device), text.to(device))
        return output.float().to(x.device)

    return call
