"""Main memory, before and after loading a model."""

from __future__ import annotations

import gc
from pathlib import Path

import comfy.model_management
import numpy as np
import pytest
import torch

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.quant import QTYPES, QuantError
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.plan.wan_shapes import WanSize, transformer_shapes

MIB = 1 << 20
STATUS = Path("/proc/self/smaps_rollup")


def free_memory(monkeypatch, n_bytes):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: n_bytes)


def test_file_larger_than_memory_is_told(t2v, monkeypatch, caplog):
    load_diffusion_model(t2v[1])
    assert "free main memory" not in caplog.text
    free_memory(monkeypatch, 4 * MIB)
    load_diffusion_model(t2v[1])
    assert "0.00 GiB of main memory are free, so every step reads them from disk" in caplog.text


def test_decoded_tensors_larger_than_memory_are_refused(tmp_path, state, write_gguf, monkeypatch):
    """Files of ComfyUI-GGUF may have quantized patch embeddings, which must be dequantized for the convolution."""
    types = {"patch_embedding.weight": "Q8_0", "blocks.0.ffn.0.weight": "Q8_0"}
    flat = state | {"patch_embedding.weight": state["patch_embedding.weight"].flatten(1)}
    metadata = {
        "comfy.gguf.orig_shape.patch_embedding.weight": np.array(state["patch_embedding.weight"].shape, np.int32)
    }
    path = write_gguf(tmp_path / "a.gguf", flat, lambda name, _: types.get(name, "F32"), metadata=metadata)
    load_diffusion_model(path, dtype=torch.float32)
    free_memory(monkeypatch, 256 * 64 * 4 - 1)
    with pytest.raises(QuantError, match=r"a\.gguf: loading needs 0\.00 GiB of main memory, 0\.00 GiB are free"):
        load_diffusion_model(path, dtype=torch.float32)


@pytest.fixture
def large(tmp_path):
    """Write Wan's shapes in 120 MB of zeros: small next to 14B models, large next to Python's own objects."""
    shapes = transformer_shapes(WanSize(dim=1024, ffn_dim=4096, layers=6))
    types = {
        name: "Q8_0" if name.startswith("blocks.") and len(shape) == 2 else "F32" for name, shape in shapes.items()
    }
    specs = [TensorSpec(name, QTYPES[types[name]], shape) for name, shape in shapes.items()]
    with GGUFWriter(tmp_path / "large.gguf", {"general.architecture": "wan"}, specs) as writer:
        for spec in specs:
            writer.write(spec.name, torch.zeros(spec.qtype.packed_shape(spec.shape), dtype=torch.uint8))
    return tmp_path / "large.gguf"


def anonymous():
    """Return the bytes of memory of this process that are not mapped from a file."""
    gc.collect()
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("Anonymous:"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
def test_loading_maps_and_unloading_gives_all_back(large):
    def cycle():
        patcher = load_diffusion_model(large, dtype=torch.bfloat16)
        comfy.model_management.load_models_gpu([patcher])
        for _, module in patcher.model.diffusion_model.blocks[0].named_modules():
            if hasattr(module, "in_features"):
                module(torch.zeros(1, module.in_features, dtype=torch.bfloat16))
        loaded = anonymous()
        comfy.model_management.unload_all_models()
        return loaded

    cycle()  # For imports, and the scratch tile.
    before = anonymous()
    size = large.stat().st_size
    assert size > 100 * MIB
    loaded = [cycle() for _ in range(10)]
    assert loaded[0] - before < 0.05 * size
    assert max(loaded) - loaded[1] < 0.01 * size
    assert anonymous() - before < 0.01 * size
