"""The archive that the registry publishes, as its command line packs it: git's files without those in .comfyignore."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .hosts import ROOT


def published() -> set[str]:
    """Return the names of the archive's files, below the repository's root, which must be a git checkout."""
    tracked = _git("--cached", "--others", "--exclude-standard")
    ignored = _git("--cached", "--others", "--ignored", "--exclude-from=.comfyignore")
    return {name for name in tracked - ignored if (ROOT / name).is_file()}


def unpack_published(folder: Path) -> None:
    """Write the archive's files below a folder, as an installation does."""
    for name in published():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def _git(*arguments: str) -> set[str]:
    listed = subprocess.check_output(["git", "ls-files", "-z", *arguments], cwd=ROOT, text=True)
    return set(listed.split("\0")) - {""}
