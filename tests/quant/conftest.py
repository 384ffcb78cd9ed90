"""Fixtures of the quantization tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from wanquant.quant.kernels.optional import GGML
from wanquant.testing.libggml import LibGGML, load
from wanquant.testing.tiny_wan import write_tiny_wan

_PREFIX = "model.diffusion_model."


@pytest.fixture(scope="session")
def libggml() -> LibGGML:
    return load()


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode with torch operations, as if libggml-python were not installed."""
    monkeypatch.setattr(GGML, "quantize", lambda *_: False)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan checkpoint of one transformer block in bfloat16, with a name prefix and metadata."""
    path = tmp_path_factory.mktemp("source") / "wan.safetensors"
    return write_tiny_wan(path, layers=1, ffn_dim=512, prefix=_PREFIX, metadata={"config": '{"a": 1}'})


@pytest.fixture
def state(source: Path) -> dict[str, Tensor]:
    """The tensors of `source` under their names without the prefix."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(source).items()}
