"""Add-ons as sources."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QuantError
from wanquant.quant.sources.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "vace_blocks.0.before_proj.weight",
        "vace_patch_embedding.weight",
        "control_adapter.conv.weight",
        "blocks.0.audio_cross_attn.kv_linear.weight",
        "blocks.0.cross_attn.ip_adapter.registers",
        "blocks.0.self_attn.ref_adapter.to_k_ref.weight",
        "proj_model.proj.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_add_ons_are_detected_by_their_tensor_names(tmp_path, name, prefix):
    save_file(
        {prefix + name: torch.zeros(2, 2), prefix + "vace_blocks.1.after_proj.bias": torch.zeros(2)}, tmp_path / "a"
    )
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert checkpoint.tensors.keys() == {name, "vace_blocks.1.after_proj.bias"}
    save_file(
        {prefix + name: torch.zeros(2, 2), prefix + "blocks.0.self_attn.q.weight": torch.zeros(2)}, tmp_path / "b"
    )
    with pytest.raises(QuantError, match="not a Wan model"):
        open_checkpoint(tmp_path / "b")
