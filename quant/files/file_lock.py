"""A lock on an open file, which the operating system releases when the file is closed or its process ends.

The package filelock is not used because it locks a second file, by its path. Here the temporary file itself is locked,
through its open descriptor. Renaming it, or the death of the process, therefore leaves no lock file behind. Taking over
the file of a killed process and locking it is a single step.
"""

from __future__ import annotations

import sys
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def try_lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or this process ends, and return False if another process has locked it.

    On a file system without locks, the result is True.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system, such as a network share, has no locks
        return True
    return True
