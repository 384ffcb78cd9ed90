"""A file that makes the host's own code fail is refused like any other bad file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.ops.loading.by_host import built_by_host
from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QuantError, convert, open_gguf
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
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


def with_metadata(path, metadata):
    """Write a GGUF again with other metadata."""
    file = open_gguf(path)
    specs = [TensorSpec(name, tensor.qtype, tensor.shape) for name, tensor in file.tensors.items()]
    with GGUFWriter(path, metadata, specs, overwrite=True) as writer:
        for name, tensor in file.tensors.items():
            writer.write(name, tensor.data)
        return writer.close()


@pytest.mark.parametrize("key", ["general.type", "general.architecture"])
@pytest.mark.parametrize("value", [np.array([1, 2]), ["wan", "imatrix"], 5, True])
def test_metadata_of_other_types_change_nothing(tmp_path, key, value):
    source = write_tiny_wan(tmp_path / "a.safetensors", layers=1)
    path = with_metadata(convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast").path, {key: value})
    assert load_diffusion_model(path).model.diffusion_model.num_layers == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("modulo by zero"), OverflowError("too large"), RecursionError()])
def test_every_error_of_arithmetic_is_one_of_the_file(tmp_path, error):
    with pytest.raises(QuantError, match="ComfyUI cannot build a model from this file"), built_by_host(tmp_path):
        raise error


@pytest.mark.parametrize(("name", "shape"), [("head.modulation", (3,)), ("patch_embedding.weight", (64,))])
def test_tensors_with_fewer_dimensions(tmp_path, name, shape):
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1)
    save_file(load_file(path) | {name: torch.ones(shape)}, path)
    with pytest.raises(QuantError, match="ComfyUI cannot build a model from this file"):
        load_diffusion_model(convert(path, tmp_path / "a.gguf", "Q4_0", effort="fast").path)
