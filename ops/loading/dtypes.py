"""The dtypes that the host's command line asks for, such as `--fp8_e4m3fn-unet`, and what a GGUF does with them.

A flag says in which dtype the host keeps weights. A GGUF keeps its packed weights, so the flag would round only the
few tensors that were left unquantized because they matter most: norms, modulations and the patch embedding. They stay
in float32 instead, which holds all their values, and the model computes in the dtype that the flag leads to.
"""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

LOSSLESS = torch.float32
"""The dtype that holds the values of all unquantized tensors."""


def flagged_model_dtype() -> torch.dtype | None:
    """Return the dtype for weights of diffusion models that a flag gives, or None if there is no such flag.

    Source: comfy/model_management.py unet_dtype, which returns float32 if it may choose nothing, ComfyUI 0.30.0.
    """
    dtype: torch.dtype = comfy.model_management.unet_dtype(supported_dtypes=[])
    return None if dtype is torch.float32 else dtype


def compute_dtype(patcher: ModelPatcher, flagged: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which the host would compute with weights of the dtype `flagged`, or of its own choice.

    A dtype that the model does not support, such as float64 for Wan, is replaced by float32.
    """
    model = patcher.model
    if flagged is None:
        chosen: torch.dtype = model.get_dtype_inference()
        return chosen
    supported = model.model_config.supported_inference_dtypes
    cast: torch.dtype | None = comfy.model_management.unet_manual_cast(flagged, patcher.load_device, supported)
    wanted = cast or flagged
    return wanted if wanted in supported else torch.float32
