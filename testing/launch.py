"""A start of ComfyUI's main.py with the shims of host_shims.py: launch.py COMFYUI FLAGS..."""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from pathlib import Path


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, so that a killed test run leaves no server behind."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    comfyui = sys.argv.pop(1)
    here = Path(__file__).resolve().parent
    # This folder is removed because its server.py would shadow ComfyUI's.
    sys.path = [comfyui, *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    runpy.run_path(str(here / "host_shims.py"))["install"]()
    runpy.run_path(str(Path(comfyui) / "main.py"), run_name="__main__")
