"""The destination appears complete or not at all, whatever ends the writer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanquant.quant import QuantError
from wanquant.quant.atomic_file import AtomicFile

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, content: bytes = b"new", *, overwrite: bool = False) -> Path:
    with AtomicFile(path, len(content), overwrite=overwrite) as file:
        file.write(content)
        return file.commit()


def test_commit(tmp_path: Path):
    assert write(tmp_path / "a") == tmp_path / "a"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new"}


def test_nothing_without_commit(tmp_path: Path):
    with AtomicFile(tmp_path / "a", 3) as file:
        file.write(b"new")
        assert [path.name for path in tmp_path.iterdir()] == [f".a.{os.getpid()}.tmp"]
    assert not any(tmp_path.iterdir())


def test_rewind(tmp_path: Path):
    with AtomicFile(tmp_path / "a", 4) as file:
        file.write(b"0000")
        file.rewind()
        file.write(b"12")
        assert file.commit().read_bytes() == b"1200"


def test_existing_destination(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(QuantError, match="exists already"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    write(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_unusable_destinations(tmp_path: Path):
    with pytest.raises(QuantError, match="folder does not exist"):
        write(tmp_path / "missing" / "a")
    with pytest.raises(QuantError, match="exists already"):
        write(tmp_path, overwrite=True)
    with pytest.raises(QuantError, match="cannot be written: File name too long"):
        write(tmp_path / ("n" * 250))


def test_unwritable_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user writes everywhere")
        with pytest.raises(QuantError, match="cannot be written: Permission denied"):
            write(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(QuantError, match=r"needs 3\.00 GiB, 1\.00 GiB are free"), AtomicFile(tmp_path / "a", 3 << 30):
        pass
    assert not any(tmp_path.iterdir())


def test_disk_that_fills_up_meanwhile(tmp_path: Path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(QuantError, match="No space left"), AtomicFile(tmp_path / "a", 0) as file:
        os.dup2(os.open("/dev/full", os.O_WRONLY), file._file.fileno())
        file.write(bytes(1 << 20))
    assert not any(tmp_path.iterdir())


def test_destination_taken_or_in_use_meanwhile_gets_a_name_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with AtomicFile(tmp_path / "a.gguf", 3) as file:
        (tmp_path / "a.gguf").write_bytes(b"theirs")
        file.write(b"one")
        assert file.commit() == tmp_path / "a-1.gguf"

    def in_use(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", in_use)
    assert write(tmp_path / "a.gguf", b"two", overwrite=True) == tmp_path / "a-2.gguf"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.gguf": b"theirs",
        "a-1.gguf": b"one",
        "a-2.gguf": b"two",
    }


HANG = """
import sys, time
from pathlib import Path
from quant.atomic_file import AtomicFile
with AtomicFile(Path(sys.argv[1]), 0) as file:
    print("open", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_is_deleted_and_a_living_one_is_spared(tmp_path: Path):
    writers = [
        subprocess.Popen([sys.executable, "-c", HANG, tmp_path / "a"], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    dead, living = writers
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"open\n"
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        (tmp_path / ".b.1.tmp").write_bytes(b"of another destination")
        assert {path.name for path in tmp_path.iterdir()} == {f".a.{dead.pid}.tmp", f".a.{living.pid}.tmp", ".b.1.tmp"}
        write(tmp_path / "a")
        assert {path.name for path in tmp_path.iterdir()} == {f".a.{living.pid}.tmp", ".b.1.tmp", "a"}
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_left_by_a_process_of_the_same_id(tmp_path: Path):
    (tmp_path / f".a.{os.getpid()}.tmp").write_bytes(b"stale")
    write(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_writers_of_one_destination_in_one_process(tmp_path: Path):
    with AtomicFile(tmp_path / "a", 0), pytest.raises(QuantError, match="wait for the other job"):
        write(tmp_path / "a")
