"""Names of files are data: on the terminal, in reports and in logs they are one line without control characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from wanquant.quant import convert
from wanquant.quant.__main__ import main
from wanquant.quant.conversion.restore import restore
from wanquant.quant.errors import PrintableLog, escaped, printable_lines
from wanquant.quant.files.disk_space import leftovers
from wanquant.quant.inspection import report_chart
from wanquant.quant.inspection.report import inspect
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.conftest import ROOT
from wanquant.tests.quant.gguf_bytes import F32, RawGGUF, pair

EVIL = "evil\x1b[31m\n\u202e"
SHOWN = r"evil\x1b[31m\n\u202e"


def is_shown(text, lines=None):
    parts = text.split("\n")
    return all(map(str.isprintable, parts)) and SHOWN in text and (lines is None or len(parts) == lines)


def test_reports(tmp_path):
    source = write_tiny_wan(tmp_path / f"{EVIL}.safetensors", layers=1, ffn_dim=256)
    converted = convert(source, tmp_path / f"{EVIL}.gguf", "Q4_0", effort="fast")
    assert is_shown(converted.text())
    assert is_shown(inspect(converted.path).text())
    assert is_shown(restore(converted.path, tmp_path / f"{EVIL}2.safetensors").text(), lines=1)


def test_leftovers_and_logs(tmp_path, caplog):
    (tmp_path / f".{EVIL}.gguf.tmp").write_bytes(b"x")
    source = write_tiny_wan(tmp_path / "a.safetensors", layers=1, ffn_dim=256)
    (left,) = leftovers([tmp_path / "a.gguf"])
    assert is_shown(left, lines=1)
    report = convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast")
    assert report.warnings == (left,)
    PrintableLog("wanquant.test").warning("%s: %d of %s", EVIL, 3, tmp_path / EVIL)
    assert [record.name for record in caplog.records][-1] == "wanquant.test"
    assert [is_shown(record.getMessage(), lines=1) for record in caplog.records] == [True] * len(caplog.records)
    assert caplog.records[-1].getMessage() == f"{SHOWN}: 3 of {tmp_path / SHOWN}"


def test_escapes():
    assert escaped("é 万 \ud800") == r"é 万 \ud800"
    assert printable_lines(["a\nb", "c"]) == "a\\nb\nc"


GOOD, BAD = RawGGUF().pack(), b"no GGUF"


def named_file(folder, name, content):
    """Write a file of any name and return its path as bytes."""
    path = os.path.join(os.fsencode(folder), name)
    with open(path, "wb") as file:
        file.write(content)
    return path


def assert_printable(out, err, encoding):
    assert b"Traceback" not in err
    assert all(map(str.isprintable, (out + err).decode(encoding).splitlines()))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("name", [b"a\xff.gguf", EVIL.encode() + b".gguf", "万.gguf".encode()])
@pytest.mark.parametrize("content", [GOOD, BAD], ids=["good", "bad"])
def test_commands_in_every_encoding(tmp_path, encoding, name, content, monkeypatch):
    streams = {which: io.TextIOWrapper(io.BytesIO(), encoding, newline="\n") for which in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for which, stream in streams.items():
            patch.setattr(sys, which, stream)
        code = main(["inspect", os.fsdecode(named_file(tmp_path, name, content))])
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams.values())
    assert (code, bool(out), bool(err)) == ((1, False, True) if content == BAD else (0, True, False))
    assert_printable(out, err, encoding)


@pytest.mark.parametrize(
    ("encoding", "name", "content"),
    [("ascii", b"a\xff.gguf", BAD), ("cp1252", "万.gguf".encode(), GOOD)],
    ids=["bad", "good"],
)
def test_the_command_line(tmp_path, encoding, name, content):
    command = [sys.executable, ROOT / "wanquant.py", "inspect", named_file(tmp_path, name, content)]
    run = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert run.returncode == (content == BAD)
    assert_printable(run.stdout, run.stderr, encoding)


def test_numbers_that_json_does_not_have(tmp_path):
    nan, infinity = (pair(key, F32, bytes(value)) for key, value in (("x", [0, 0, 192, 127]), ("y", [0, 0, 128, 255])))
    (tmp_path / "a.gguf").write_bytes(RawGGUF().with_pairs(nan, infinity).pack())
    metadata = json.loads(json.dumps(inspect(tmp_path / "a.gguf").json(), allow_nan=False))["metadata"]
    assert (metadata["x"], metadata["y"]) == ("nan", "-inf")


def test_a_file_without_tensors_has_a_chart(tmp_path):
    (tmp_path / "a.gguf").write_bytes(RawGGUF(tensors=(), data=b"").pack())
    assert report_chart.draw(inspect(tmp_path / "a.gguf")).width == 540
