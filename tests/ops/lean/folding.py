"""An FFN that calls its second product as ComfyUI's does from 0.31 on."""

from __future__ import annotations

import comfy.ops
import torch


class FoldingFFN(torch.nn.Sequential):
    """Applies the activation within the second product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return comfy.ops.linear_input_act(self[2], self[0](x), "gelu_tanh")
