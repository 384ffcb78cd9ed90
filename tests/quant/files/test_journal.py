"""Conversions that are killed midway, in their own processes, and resumed."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wanquant.quant import QuantError, open_gguf
from wanquant.quant.conversion.convert import convert, convert_all
from wanquant.quant.conversion.settings import Settings, Target
from wanquant.quant.files.journal import Journal, JournalEntry
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.conftest import ROOT

RECIPES = ("Q8_0", "Q4_0")
# A program that converts, and kills itself once it has reported a number of tensors.
STOP = """
import os, signal, sys
from pathlib import Path
from quant.conversion.convert import convert_all
from quant.conversion.settings import Settings, Target
source, folder, tensors = sys.argv[1:4]
seen = set()
def progress(done, total, name):
    seen.add(name)
    if len(seen) > int(tensors):
        os.kill(os.getpid(), signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
targets = [Target(Path(folder, recipe + ".gguf"), recipe) for recipe in sys.argv[4:]]
convert_all(source, targets, Settings(effort="fast"), progress=progress)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("source") / "wan.safetensors", layers=1, ffn_dim=512)


def killed(source: Path, folder: Path, tensors: int, *recipes: str) -> None:
    command = [sys.executable, "-c", STOP, source, folder, str(tensors), *recipes]
    # Windows has one way to end a process, and returns the signal's number as the exit code.
    assert subprocess.run(command, cwd=ROOT).returncode in (-getattr(signal, "SIGKILL", 0), signal.SIGTERM)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The bytes of the files of uninterrupted conversions."""
    folder = tmp_path_factory.mktemp("whole")
    targets = [Target(folder / f"{recipe}.gguf", recipe) for recipe in RECIPES]
    reports = convert_all(source, targets, Settings(effort="fast"))
    return {report.path.stem: report.path.read_bytes() for report in reports}


def test_a_killed_conversion_resumes_to_the_same_bytes(tmp_path, source, whole, caplog):
    killed(source, tmp_path, 30, *RECIPES)
    assert names(tmp_path) == {f".{recipe}.gguf.{end}" for recipe in RECIPES for end in ("tmp", "journal")}
    done = [len(Journal(tmp_path / f".{recipe}.gguf.journal").read()) for recipe in RECIPES]
    assert min(done) >= 20
    # The journal of one file lacks its last tensors and ends in a line that was cut off.
    journal = tmp_path / ".Q4_0.gguf.journal"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:9]) + '{"relative_er')
    calls = []
    targets = [Target(tmp_path / f"{recipe}.gguf", recipe) for recipe in RECIPES]
    convert_all(source, targets, Settings(effort="fast"), progress=lambda *call: calls.append(call))
    assert f"Q8_0.gguf: resumed after {done[0]} of" in caplog.text
    assert "Q4_0.gguf: resumed after 9 of" in caplog.text
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == whole
    assert calls[-1][0] == calls[-1][1]


def test_bytes_that_the_disk_lost_are_written_again(tmp_path, source, whole, caplog):
    killed(source, tmp_path, 30, "Q8_0")
    temporary = tmp_path / ".Q8_0.gguf.tmp"
    with open(temporary, "r+b") as file:
        file.seek(temporary.stat().st_size // 2)
        file.write(bytes(64))
    convert(source, tmp_path / "Q8_0.gguf", "Q8_0", effort="fast")
    assert "resumed after" in caplog.text and "resumed after 0 of" not in caplog.text
    assert (tmp_path / "Q8_0.gguf").read_bytes() == whole["Q8_0"]


def test_another_conversion_starts_anew_and_says_so(tmp_path, source, whole, caplog):
    killed(source, tmp_path, 30, "Q8_0")
    (tmp_path / ".Q8_0.gguf.tmp").rename(tmp_path / ".Q4_0.gguf.tmp")
    (tmp_path / ".Q8_0.gguf.journal").rename(tmp_path / ".Q4_0.gguf.journal")
    convert(source, tmp_path / "Q4_0.gguf", "Q4_0", effort="fast")
    assert "starting anew" in caplog.text and "resumed" not in caplog.text
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == {"Q4_0": whole["Q4_0"]}


def test_a_full_disk_leaves_nothing_and_is_reported(tmp_path, source):
    """The system's own limit on the size of files is set to 1 MB."""
    resource = pytest.importorskip("resource", reason="this system has no limit for files")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    command = [sys.executable, "-m", "quant", "convert", source, tmp_path / "a.gguf", "--recipe", "Q8_0"]
    process = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"{tmp_path / 'a.gguf'}: cannot be written: File too large")
    assert not names(tmp_path)


def test_checksum_of_the_data_is_in_the_file(tmp_path, source):
    report = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    header = min(tensor.offset for tensor in open_gguf(report.path).tensors.values())
    digest = hashlib.sha256(report.path.read_bytes()[header:]).hexdigest()
    assert report.metadata["wanquant.data_sha256"] == digest
    assert digest in report.text()


def test_journal_ends_at_the_first_damaged_line(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert journal.read() == []
    entries = [JournalEntry(0.1, "a"), JournalEntry(0.2, "b")]
    journal.restart(entries)
    journal.append(JournalEntry(0.3, "c"))
    assert journal.read() == [*entries, JournalEntry(0.3, "c")]
    journal.path.write_text(journal.path.read_text().replace("0.2", "?"))
    assert journal.read() == entries[:1]
    journal.delete()
    assert journal.read() == [] and not names(tmp_path)


def test_a_folder_in_place_of_the_journal_is_noticed_first(tmp_path):
    source = write_tiny_wan(tmp_path / "a.safetensors", layers=1)
    (tmp_path / ".a.gguf.journal" / "x").mkdir(parents=True)
    calls = []
    with pytest.raises(QuantError, match=r"\.a\.gguf\.journal: is a folder, expected a file or none"):
        convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast", progress=lambda *call: calls.append(call))
    assert not calls
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.gguf.journal", "a.safetensors"]


def test_a_name_that_is_too_long_only_for_the_journal(tmp_path, source):
    with pytest.raises(QuantError, match=r"not a usable path \(File name too long\); choose another one"):
        convert(source, tmp_path / f"{'n' * 243}.gguf", "Q8_0", effort="fast")
    with pytest.raises(QuantError, match="File name too long"):
        Journal(tmp_path / ("n" * 256)).check()
