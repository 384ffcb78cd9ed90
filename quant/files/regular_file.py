"""Paths and files that may be anything: only regular files are opened, and no link is followed for writing."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TypeVar

from ..errors import QuantError

# Without O_NONBLOCK, opening a pipe waits for its other end. Windows has neither flag.
_NONBLOCK, _NOFOLLOW = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_NOFOLLOW", 0)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}


_File = TypeVar("_File", BufferedReader, BufferedRandom)


def check_path(path: Path, *beside: Path) -> None:
    """Refuse a path that the system cannot look up; whether there is a file does not matter.

    Args:
        beside: paths derived from it, which have longer names.

    Raises:
        QuantError: a character or a length that the file system does not allow, a loop of links, or no permission.
    """
    for each in (path, *beside):
        try:
            os.stat(each)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise QuantError(f"{path}: not a usable path ({_reason(error)}); choose another one") from None


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; links to one are followed.

    Raises:
        QuantError: there is none, it is a folder, pipe or device, or the system refuses it.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NONBLOCK))  # noqa: SIM115
    except FileNotFoundError:
        raise QuantError(f"{path}: no such file; check its path") from None
    except (OSError, ValueError) as error:
        raise QuantError(f"{path}: cannot be read ({_reason(error)}); check its path and permissions") from None
    return _regular(path, file)


def create_or_open(path: Path) -> BufferedRandom:
    """Open a file for reading and writing, and create it if there is none.

    Raises:
        OSError: the system refuses it.
        QuantError: the name is taken by a link, a folder, a pipe or a device, or the file has a second name.
    """
    flags = os.O_CREAT | _NOFOLLOW | _NONBLOCK
    _check_kind(path)  # the flags prevent a race, but Windows has none, and their errors name no kind
    file = _regular(path, open(path, "r+b", opener=lambda name, mode: os.open(name, mode | flags, 0o666)))  # noqa: SIM115
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise QuantError(f"{path}: has a second name as a hard link, which writing would change too; delete it")
    return file


def _check_kind(path: Path) -> None:
    """Refuse a name that is taken by anything but a file."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise QuantError(f"{path}: is {kind}, which is not written through; delete it")


def _regular(path: Path, file: _File) -> _File:
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise QuantError(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file; choose another path")
    return file


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
