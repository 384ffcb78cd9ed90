"""The oldest host that this pack runs on. Imports nothing that an old host may lack."""

from __future__ import annotations

import importlib
import re

from ..quant import QuantError

MINIMUM_HOST = "0.24.0"


def require_host(version: str | None = None) -> None:
    """Refuse a host that lacks the quantized tensors and memory manager this pack builds on.

    Args:
        version: ComfyUI's version; read from the host when None.

    Raises:
        QuantError: the host is older than `MINIMUM_HOST`.
    """
    if version is None:
        version = _installed_version()
    if _release(version) < _release(MINIMUM_HOST):
        raise QuantError(f"WanQuant: ComfyUI {version} is too old, {MINIMUM_HOST} or newer is needed; update ComfyUI")


def _installed_version() -> str:
    try:
        # Not a plain import, since the oldest hosts have no such module.
        return str(importlib.import_module("comfyui_version").__version__)
    except ModuleNotFoundError:
        return "0.2 or older"


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: "0.30.1rc2" counts as 0.30.1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
