"""The destination appears complete or not at all, no matter how the writer ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanquant.quant import QuantError
from wanquant.quant.files import atomic_file
from wanquant.quant.files.atomic_file import AtomicFile

ROOT = Path(__file__).resolve().parents[3]


def write(path: Path, content: bytes = b"new", *, overwrite: bool = False) -> Path:
    with AtomicFile(path, len(content), overwrite=overwrite) as file:
        file.write(content)
        return file.commit()


def test_commit_leaves_only_the_complete_file(tmp_path: Path):
    assert write(tmp_path / "a") == tmp_path / "a"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new"}


def test_nothing_is_left_without_commit(tmp_path: Path):
    with AtomicFile(tmp_path / "a", 3) as file:
        file.write(b"new")
        assert [path.name for path in tmp_path.iterdir()] == [".a.tmp"]
    assert not any(tmp_path.iterdir())


def test_rewind_moves_to_the_beginning(tmp_path: Path):
    with AtomicFile(tmp_path / "a", 4) as file:
        file.write(b"0000")
        file.rewind()
        file.write(b"12")
        assert file.commit().read_bytes() == b"1200"


def test_an_existing_destination_is_replaced_only_with_overwrite(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(QuantError, match="exists already"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    write(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_unusable_destinations_are_refused(tmp_path: Path):
    with pytest.raises(QuantError, match="folder does not exist"):
        write(tmp_path / "missing" / "a")
    with pytest.raises(QuantError, match="exists already"):
        write(tmp_path, overwrite=True)
    with pytest.raises(QuantError, match=r"not a usable path \(File name too long"):
        write(tmp_path / ("n" * 253))


def test_an_unwritable_folder_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user writes everywhere")
        with pytest.raises(QuantError, match="cannot be written: Permission denied"):
            write(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_larger_than_the_free_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(QuantError, match=r"3\.00 GiB needed, 1\.00 GiB free"), AtomicFile(tmp_path / "a", 3 << 30):
        pass
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path: Path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(QuantError, match="No space left"), AtomicFile(tmp_path / "a", 0) as file:
        os.dup2(os.open("/dev/full", os.O_WRONLY), file._file.fileno())
        file.write(bytes(1 << 20))
    assert not any(tmp_path.iterdir())


def test_a_destination_that_appears_or_is_in_use_gets_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
from quant.files.atomic_file import AtomicFile
with AtomicFile(Path(sys.argv[1]), 0) as file:
    file.write(b"first")
    file.flush()
    print("open", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is writing `a` and has written 5 bytes to its temporary file."""
    with subprocess.Popen([sys.executable, "-c", HANG, tmp_path / "a"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            yield process
        finally:
            process.kill()


def test_a_second_writer_of_a_destination_is_refused(tmp_path: Path, writer: subprocess.Popen[bytes]):
    with pytest.raises(QuantError, match="another process is writing it; wait"):
        write(tmp_path / "a")
    assert (tmp_path / ".a.tmp").read_bytes() == b"first"
    with AtomicFile(tmp_path / "b", 0), pytest.raises(QuantError, match="another process is writing it; wait"):
        write(tmp_path / "b")


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path, writer: subprocess.Popen[bytes], resume: bool):
    writer.kill()
    writer.wait()
    with AtomicFile(tmp_path / "a", 0, resume=resume) as file:
        assert file.read(9) == (b"first" if resume else b"")
        file.restart(2 if resume else 0)
        file.write(b"new")
        file.commit()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"finew" if resume else b"new"}


def test_a_temporary_file_that_is_gone_once_it_is_locked_is_not_written(tmp_path: Path, monkeypatch):
    def committed_meanwhile(_file: object) -> bool:
        os.replace(tmp_path / ".a.tmp", tmp_path / "a")
        return True

    monkeypatch.setattr(atomic_file, "try_lock", committed_meanwhile)
    (tmp_path / ".a.tmp").write_bytes(b"theirs")
    with pytest.raises(QuantError, match="another process is writing it"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"theirs"


def test_the_space_of_an_unfinished_file_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".a.tmp").write_bytes(bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50))
    with AtomicFile(tmp_path / "a", 150):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="it has no pipes in folders")
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("a pipe", os.mkfifo),
        ("a folder", os.mkdir),
        ("a link", lambda path: path.symlink_to("victim")),
        ("a link", lambda path: path.symlink_to("/dev/full")),
    ],
)
def test_a_temporary_name_that_is_taken_is_named_with_its_kind(tmp_path: Path, kind, make):
    (tmp_path / "victim").write_bytes(b"precious")
    make(tmp_path / ".a.tmp")
    with pytest.raises(QuantError, match=rf"\.a\.tmp: is {kind}, which is not written through; delete it"):
        write(tmp_path / "a")
    assert (tmp_path / "victim").read_bytes() == b"precious"
