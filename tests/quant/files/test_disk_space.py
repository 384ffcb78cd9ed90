"""Missing disk space, and the unfinished files of killed processes, are reported before anything is written."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from wanquant.quant import QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.files.atomic_file import AtomicFile
from wanquant.quant.files.disk_space import check_space, leftovers


def sentence(folder, name, gib):
    return (
        f"{folder / f'.{name}.tmp'}: {gib} GiB left by a process that stopped;"
        f" write {name} again to complete it, or delete this file"
    )


def test_an_unfinished_file_counts_as_room_for_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=90))
    (tmp_path / ".a.gguf.tmp").write_bytes(bytes(10))
    check_space({tmp_path / "a.gguf": 60, tmp_path / "b.gguf": 40})
    with pytest.raises(QuantError, match="and 1 more"):
        check_space({tmp_path / "a.gguf": 60, tmp_path / "b.gguf": 41})


def test_unfinished_files_are_listed_if_space_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=90))
    for name in ("b.gguf", "c.safetensors"):
        with open(tmp_path / f".{name}.tmp", "wb") as file:
            file.truncate(3 << 28)
    with pytest.raises(QuantError) as error:
        check_space({tmp_path / "a.gguf": 91})
    advice, *files = str(error.value).split("; ", 1)[1].split("; ", 1)
    assert advice == "free some space or choose another folder"
    assert files == ["1.50 GiB are in 2 files that stopped processes left unfinished, the first is .b.gguf.tmp"]


def test_only_files_of_killed_processes_are_listed(tmp_path):
    for name in (".draft.tmp", "a.gguf.tmp", ".own.gguf.tmp", "done.gguf"):
        (tmp_path / name).touch()
    with AtomicFile(tmp_path / "running.gguf", 0):
        assert leftovers([tmp_path / "own.gguf", tmp_path / "missing" / "b.gguf"]) == []
        assert leftovers([tmp_path / "b.gguf"]) == [sentence(tmp_path, "own.gguf", "0.00")]


def test_a_conversion_warns_of_them(tmp_path, source, caplog):
    (tmp_path / ".b.gguf.tmp").touch()
    report = convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast")
    assert report.warnings == (sentence(tmp_path, "b.gguf", "0.00"),)
    assert report.warnings[0] in report.text()
    assert report.warnings[0] in caplog.text
