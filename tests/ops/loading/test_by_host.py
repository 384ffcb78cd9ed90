"""A file that makes the host's own code fail is refused like any other bad file."""

from __future__ import annotations

import pytest
import torch

from wanquant.ops.loading.by_host import built_by_host
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError, convert
from wanquant.testing.tiny_wan import write_tiny_wan


@pytest.mark.parametrize("config", ["[", "3", '{"transformer": 3}', "[" * 100_000, '{"transformer": {"unknown": 1}}'])
def test_metadata_that_the_host_cannot_use(tmp_path, config):
    source = write_tiny_wan(tmp_path / "a.safetensors", layers=1, metadata={"config": config})
    path = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast").path
    with pytest.raises(QuantError, match=r"a\.gguf: ComfyUI cannot build a model from this file \("):
        load_diffusion_model(path)


@pytest.mark.parametrize(
    "error", [QuantError("another sentence"), torch.OutOfMemoryError("no room"), KeyboardInterrupt()]
)
def test_errors_that_do_not_come_from_the_file_pass(tmp_path, error):
    with pytest.raises(type(error)) as raised, built_by_host(tmp_path):
        raise error
    assert raised.value is error
