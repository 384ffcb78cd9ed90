"""Starts ComfyUI's main.py, even where torchvision or torchaudio cannot be had: launch.py COMFYUI FLAGS..."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    comfyui = sys.argv.pop(1)
    here = Path(__file__).resolve().parent
    # Not this folder: its server.py would shadow the host's.
    sys.path = [comfyui, *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    runpy.run_path(str(here.parent / "host_shims.py"))["install"]()
    runpy.run_path(str(Path(comfyui) / "main.py"), run_name="__main__")
