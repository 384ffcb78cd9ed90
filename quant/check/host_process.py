"""The part of the check that needs ComfyUI, in a process of its own, because this package never imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ..errors import QuantError
from .report import CheckReport

PACK = Path(__file__).resolve().parents[2]
_RESULT = "report.json"
_MAX_SECONDS = 300

# The pack becomes a package, whatever the name of its folder. ComfyUI reads its own command line, so that is emptied.
_PROGRAM = """
import json, pathlib, sys, types
comfyui, pack, folder, result = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path[:0] = [comfyui]
import torch
from comfy.cli_args import args
args.cpu = not torch.cuda.is_available() and not torch.xpu.is_available() and not torch.backends.mps.is_available()
package = types.ModuleType("wanquant")
package.__path__ = [pack]
sys.modules["wanquant"] = package
from wanquant.ops.check import check_in_host
report = check_in_host(pathlib.Path(folder), server=False)
pathlib.Path(folder, result).write_text(json.dumps(report.json()), encoding="utf-8")
"""


def find_comfyui() -> Path | None:
    """Return ComfyUI's folder: COMFYUI_PATH, or the one in whose custom_nodes the pack is; None if there is none.

    Raises:
        QuantError: COMFYUI_PATH is not ComfyUI's folder.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not Path(named, "comfy").is_dir():
            raise QuantError(f"COMFYUI_PATH {named}: has no folder comfy; set it to the folder with ComfyUI's main.py")
        return Path(named).resolve()
    around = PACK.parent.parent
    return around if PACK.parent.name == "custom_nodes" and (around / "comfy").is_dir() else None


def check_in_process(comfyui: Path, folder: Path) -> CheckReport:
    """Load and sample the files of a folder in ComfyUI, and return the report.

    Args:
        comfyui: ComfyUI's folder.
        folder: the folder that has the files of `file_parts`.

    Raises:
        QuantError: this Python cannot run ComfyUI, or it ended or took too long.
    """
    command = [sys.executable, "-c", _PROGRAM, str(comfyui), str(PACK), str(folder), _RESULT]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise QuantError(
            f"ComfyUI at {comfyui}: took more than {_MAX_SECONDS} s; close other programs and check again"
        ) from None
    result = folder / _RESULT
    if done.returncode or not result.is_file():
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise QuantError(
            f"ComfyUI at {comfyui} does not run in {sys.executable} ({reason:.200}); use the Python that runs ComfyUI,"
            " and install ComfyUI's requirements"
        )
    return CheckReport.from_json(json.loads(result.read_text(encoding="utf-8")))
