"""Reports of files as records, text, JSON and chart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.quant.inspection import report_chart as chart
from wanquant.quant.inspection.report import FileReport, TensorSummary, inspect
from wanquant.quant.inspection.report_chart import draw, draw_bytes
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.conftest import ROOT


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return convert(write_tiny_wan(folder / "wan.safetensors"), folder / "wan.gguf", "Q4_0", effort="fast")


@pytest.fixture
def language_model(tmp_path):
    specs = [TensorSpec("token_embd.weight", QTYPES["F16"], (8, 32))]
    metadata = {"general.architecture": "gemma3", "tokenizer.ggml.tokens": ["a", "b"] * 500, "note": "x" * 500}
    with GGUFWriter(tmp_path / "gemma.gguf", metadata, specs) as writer:
        writer.write("token_embd.weight", torch.zeros(8, 64, dtype=torch.uint8))
    return tmp_path / "gemma.gguf"


def test_totals_cover_all_tensors(converted):
    report = inspect(converted.destination)
    assert report.kind == "Wan diffusion model"
    assert report.nbytes == converted.destination.stat().st_size
    assert sum(total.count for total in report.by_type) == len(report.tensors)
    q4_0 = next(total for total in report.by_type if total.qtype == "Q4_0")
    assert (q4_0.count, 8 * q4_0.nbytes / q4_0.n_elements) == (40, 4.5)
    assert report.tensors == converted.tensors
    assert all(tensor.relative_error is not None for tensor in report.tensors)


def test_text_and_json_have_types_metadata_and_errors(converted):
    assert "written in" in converted.text()
    for line in ("Q4_0          40", "wanquant.recipe: Q4_0", "dB  blocks."):
        assert line in inspect(converted.destination).text()
    plain = json.loads(json.dumps(converted.json(), allow_nan=False))
    assert plain["types"][0].keys() == {"qtype", "count", "nbytes", "weights"}
    assert plain["source_bytes"] == converted.source.stat().st_size


def test_other_models_are_described(language_model):
    text = inspect(language_model).text()
    assert "not a Wan diffusion model: general.architecture is gemma3" in text
    assert "tokenizer.ggml.tokens: array of 1000" in text
    assert "(500 characters)" in text
    assert max(map(len, text.splitlines())) < 130


@pytest.mark.parametrize("which", ["converted", "language_model"])
def test_chart_is_an_rgb_image_540_pixels_wide(which, request):
    subject = request.getfixturevalue(which)
    image = draw(subject if which == "converted" else inspect(subject))
    assert image.mode == "RGB" and image.width == 540
    assert len(image.getcolors(1 << 20)) > 10


def test_text_of_charts_is_11_pixels_high_in_a_node(converted):
    """A node that converts has 440 x 205 pixels for its picture, and GGUF Info is as high as its chart."""
    letters = 10 / 72 * chart._DPI
    whole, part = draw(converted), draw_bytes(converted)
    assert letters * 440 / whole.width >= 11
    assert letters * min(440 / part.width, 205 / part.height) >= 11


def test_chart_shows_every_layer_of_every_block(converted, monkeypatch):
    drawn = {}
    monkeypatch.setattr(chart, "_draw_map", lambda _figure, _axis, layers, title, value: drawn.update({title: layers}))
    draw(converted)
    assert len(drawn) == 2, "bytes and error"
    for layers in drawn.values():
        assert list(layers)[:2] == ["self_attn.q", "self_attn.k"] and list(layers)[-1] == "ffn.2"
        assert {len(layer) for layer in layers.values()} == {4}


def test_message_of_the_chart_names_what_is_largest():
    head, bias, *layers = (
        TensorSummary("head.head.weight", "F16", (4, 4), 32, None),
        TensorSummary("blocks.0.ffn.0.bias", "F32", (8,), 0, 0.9),  # tuning changes it on purpose
        TensorSummary("blocks.0.self_attn.q.weight", "Q4_0", (8, 8), 24, 0.1),
        TensorSummary("blocks.0.ffn.0.weight", "Q4_0", (8, 16), 72, 0.2),
        TensorSummary("blocks.1.ffn.0.weight", "Q8_0", (8, 16), 72, 0.0),
    )
    assert message(head, bias, *layers) == ["ffn has 72 % of the bytes,", "blocks.0.ffn.0 has the largest error"]
    assert message(head) == ["head has 100 % of the bytes"]
    assert message() == ["The file holds no weights"]


def message(*tensors):
    report = FileReport(Path("wan.gguf"), 1000, {}, tensors)
    return chart._message(report, chart._layers(report))


def test_only_the_chart_imports_matplotlib():
    code = "import sys, quant, quant.inspection.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
