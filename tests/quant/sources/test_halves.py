"""Halves of one matrix in two tensors, and reads beyond a tensor's own bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.sources.files import HashedFile
from wanquant.quant.sources.tensors import StoredTensor
from wanquant.testing.tiny_wan import write_tiny_wan

HALF = "face_adapter.fuser_blocks.0.linear1_"


def opened(tmp_path, key, value):
    state = load_file(write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=256))
    halves = {f"{HALF}k.weight": key, f"{HALF}v.weight": value}
    save_file(state | halves | {"zzz.behind": torch.full((64,), 7.0)}, tmp_path / "wan.safetensors")
    return open_checkpoint(tmp_path / "wan.safetensors")


def test_halves_of_other_heights_are_one_matrix(tmp_path):
    key, value = torch.randn(4, 8), torch.randn(2, 8)
    with opened(tmp_path, key, value) as checkpoint:
        joined = checkpoint.tensors[f"{HALF}kv.weight"]
        assert joined.shape == (6, 8)
        assert torch.equal(joined.read().view(6, 8), torch.cat([key, value]))


@pytest.mark.parametrize("value", [torch.ones(4, 2), torch.ones(4, 16), torch.ones(8), torch.tensor(1.0)])
def test_halves_with_other_rows_are_refused(tmp_path, value):
    with pytest.raises(QuantError, match=r"linear1_v\.weight: .*expected the same type and rows of the same length"):
        opened(tmp_path, torch.ones(4, 8), value)


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (8, 9), (-1, 4), (4, 3)])
@pytest.mark.parametrize("method", ["read", "peek"])
def test_no_byte_of_another_tensor_is_read(tmp_path, method, start, stop):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(32)))
    tensor = StoredTensor("x", "U8", (8,), 16, 8, HashedFile(path))
    assert getattr(tensor, method)(2, 8).tolist() == [18, 19, 20, 21, 22, 23]
    with pytest.raises(QuantError, match="tensor x: U8 of shape"):
        getattr(tensor, method)(start, stop)
