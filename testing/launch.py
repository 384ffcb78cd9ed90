"""A start of ComfyUI's main.py with the shims of host_shims.py: launch.py COMFYUI LOG FLAGS...

LOG gets what custom nodes log, and nothing that ComfyUI logs.
"""

from __future__ import annotations

import logging
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


def keep_messages_of_nodes(path: str) -> None:
    """Write the messages of custom nodes to a file, too; ComfyUI's own log does not say who wrote a line."""
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.addFilter(lambda record: "custom_nodes" in record.name)
    logging.getLogger().addHandler(handler)


if __name__ == "__main__":
    comfyui, pack_log = sys.argv.pop(1), sys.argv.pop(1)
    keep_messages_of_nodes(pack_log)
    here = Path(__file__).resolve().parent
    # This folder is removed because its server.py would shadow ComfyUI's.
    sys.path = [comfyui, *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    runpy.run_path(str(here / "host_shims.py"))["install"]()
    runpy.run_path(str(Path(comfyui) / "main.py"), run_name="__main__")
