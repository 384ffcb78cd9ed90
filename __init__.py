"""WanQuant: Wan video models on small GPUs, as a ComfyUI custom-node pack."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import WanQuantExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> WanQuantExtension:
    # Imported here so that tools which import the repository root (pytest, the command line) need no ComfyUI.
    from .ops.host_version import require_host

    require_host()
    from .nodes import WanQuantExtension

    return WanQuantExtension()
