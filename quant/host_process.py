"""Calls of what needs ComfyUI, in a process of its own, because this package never imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .errors import QuantError

PACK = Path(__file__).resolve().parents[1]
_MAX_SECONDS = 300

# The pack becomes a package, whatever the name of its folder. ComfyUI reads its own command line, so that is emptied.
_PROGRAM = """
import importlib, json, pathlib, sys, types
comfyui, pack, module, function, arguments, result = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path[:0] = [comfyui]
import torch
from comfy.cli_args import args
args.cpu = not torch.cuda.is_available() and not torch.xpu.is_available() and not torch.backends.mps.is_available()
package = types.ModuleType("wanquant")
package.__path__ = [pack]
sys.modules["wanquant"] = package
value = getattr(importlib.import_module("wanquant." + module), function)(*json.loads(arguments))
pathlib.Path(result).write_text(json.dumps(value), encoding="utf-8")
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


def call_in_comfyui(comfyui: Path, module: str, function: str, *arguments: object) -> Any:  # noqa: ANN401 (JSON)
    """Call a function of the pack in a process that can import ComfyUI, and return its result.

    Args:
        comfyui: ComfyUI's folder.
        module: below the pack, such as "ops.check".
        arguments: what JSON can hold, as the result.

    Raises:
        QuantError: this Python cannot run ComfyUI, or it ended or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="wanquant-", ignore_cleanup_errors=True) as folder:
        result = Path(folder, "result.json")
        names = (str(comfyui), str(PACK), module, function, json.dumps(arguments), str(result))
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROGRAM, *names],
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_MAX_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise QuantError(
                f"ComfyUI at {comfyui}: took more than {_MAX_SECONDS} s; close other programs and try again"
            ) from None
        if done.returncode or not result.is_file():
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise QuantError(
                f"ComfyUI at {comfyui} does not run in {sys.executable} ({reason:.200}); use the Python that runs"
                " ComfyUI, and install ComfyUI's requirements"
            )
        return json.loads(result.read_text(encoding="utf-8"))
