"""Sources whose GGUF this pack could not read: they are refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QTYPES, QuantError, convert, open_gguf
from wanquant.quant.conversion.restore import restore
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.testing.tiny_wan import write_tiny_wan


@pytest.fixture
def source(tmp_path):
    path = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=256)
    state = load_file(path)

    def write(tensors=None, metadata=None):
        save_file(state | (tensors or {}), path, metadata)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "shape", "five_d", "problem"),
    [
        ("extra\nname", (4,), False, "unprintable characters"),
        ("extra\x1b[31m", (4,), False, "unprintable characters"),
        ("extra\u202e", (4,), False, "unprintable characters"),
        ("x", (1,) * 9, False, "up to 8 integers"),
        ("x", (1,) * 6, True, "6 dimensions, expected at most 5"),
    ],
)
def test_tensors(source, tmp_path, name, shape, five_d, problem):
    with pytest.raises(QuantError, match=rf"{problem}.*; change the names or the metadata of the source"):
        convert(source({name: torch.ones(shape)}), tmp_path / "wan.gguf", "Q4_0", effort="fast", five_d=five_d)
    assert [path.name for path in tmp_path.iterdir()] == ["wan.safetensors"]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"a\nb": "x"}, "unprintable characters"),
        ({"a\x1b[31m": "x"}, "unprintable characters"),
        ({"k" * 70_000: "x"}, "bytes long, expected 1 to"),
        ({f"k{number}": "" for number in range(16_380)}, r"16[34]\d\d items, expected at most"),
    ],
)
def test_metadata(source, tmp_path, metadata, problem):
    with pytest.raises(QuantError, match=rf"{problem}.*; change the names or the metadata of the source"):
        convert(source(metadata=metadata), tmp_path / "wan.gguf", "Q4_0", effort="fast")
    assert [path.name for path in tmp_path.iterdir()] == ["wan.safetensors"]


def test_names_of_modules_with_preferences(source, tmp_path):
    preference = torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)
    with pytest.raises(QuantError, match="unprintable characters"):
        convert(source({"blocks.0.x\n.comfy_attention.config": preference}), tmp_path / "wan.gguf", "Q4_0")


def test_what_the_reader_takes_is_written(source, tmp_path):
    path = source({"extra name é": torch.arange(8.0).view(1, 1, 1, 2, 2, 2)}, {"k" * 65_000: "a\nb"})
    converted = open_gguf(convert(path, tmp_path / "wan.gguf", "Q4_0", effort="fast").path)
    assert converted.tensors["extra name é"].dequantize().tolist() == torch.arange(8.0).view(1, 1, 1, 2, 2, 2).tolist()
    assert converted.metadata["wanquant.source_metadata." + "k" * 65_000] == "a\nb"


def test_metadata_that_no_safetensors_header_holds(tmp_path):
    """A GGUF may have more text than a header of safetensors."""
    spec = TensorSpec("x", QTYPES["F32"], (1,))
    metadata = {"general.architecture": "wan", "wanquant.source_metadata.workflow": "x" * (17 << 20)}
    with GGUFWriter(tmp_path / "a.gguf", metadata, [spec]) as writer:
        writer.write("x", torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(QuantError, match=r"a safetensors header of 17825[0-9]+ bytes, .*; shorten the metadata"):
        restore(tmp_path / "a.gguf", tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
