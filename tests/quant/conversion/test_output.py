"""Existing destinations: the result of the same conversion is reused, others are only replaced on request."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert

FFN = "blocks.0.ffn.0.weight"


def test_result_of_the_same_conversion_is_reused(tmp_path, source):
    first = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    written = first.destination.stat()
    again = convert(source, tmp_path / "a.gguf", "q8_0", effort="fast", overwrite=True)
    assert not first.reused and again.reused
    assert again.tensors == first.tensors
    assert again.destination.stat() == written


def test_touched_source_is_recognized_by_its_content(tmp_path, source):
    copy = shutil.copy(source, tmp_path / "copy.safetensors")
    convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast")
    os.utime(copy, (1, 1))
    assert convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast").reused
    with open(copy, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    with pytest.raises(QuantError, match="exists, but is not this conversion"):
        convert(copy, tmp_path / "a.gguf", "Q8_0", effort="fast")


def test_other_files_are_only_replaced_on_request(tmp_path, source):
    destination = tmp_path / "a.gguf"
    destination.write_text("precious")
    with pytest.raises(QuantError, match=r"a\.gguf: exists, but is not this conversion"):
        convert(source, destination, "Q8_0", effort="fast")
    assert destination.read_text() == "precious"
    convert(source, destination, "Q8_0", effort="fast", overwrite=True)
    for change in ({"recipe": "Q4_0"}, {"effort": "best"}, {"importance": {FFN: torch.ones(256)}}):
        with pytest.raises(QuantError, match="exists, but is not this conversion"):
            convert(source, destination, **({"recipe": "Q8_0", "effort": "fast"} | change))
