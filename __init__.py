"""WanQuant: Wan video models on small GPUs, as a ComfyUI custom-node pack."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import WanQuantExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> WanQuantExtension:
    # Imported here so that tools which import the repository root (pytest, the command line) need no ComfyUI.
    from .ops.version import require_host

    require_host()
    try:
        from .nodes import WanQuantExtension
    except (ImportError, AttributeError):
        # The host reports only the message; what it has changed is in the traceback.
        logging.getLogger(__name__).exception("WanQuant does not fit this version of ComfyUI")
        raise
    return WanQuantExtension()
