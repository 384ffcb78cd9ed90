"""Which ComfyUI this is, and whether the pack knows it. Imports nothing that an old host may lack."""

from __future__ import annotations

import importlib
import logging
import re
from functools import cache

from ..quant import QuantError

MINIMUM_HOST = "0.24.0"
NEWEST_TESTED_HOST = "0.33.0"

logger = logging.getLogger(__name__)


def require_host(version: str | None = None) -> None:
    """Refuse a host that lacks the quantized tensors and memory manager this pack builds on; name one unknown so far.

    Args:
        version: ComfyUI's version; read from the host when None.

    Raises:
        QuantError: the host is older than `MINIMUM_HOST`.
    """
    if version is None:
        version = host_version()
    if _release(version) < _release(MINIMUM_HOST):
        raise QuantError(f"WanQuant: ComfyUI {version} is too old, {MINIMUM_HOST} or newer is needed; update ComfyUI")
    if _release(version) > _release(NEWEST_TESTED_HOST):
        _name_newer(version)


def host_version() -> str:
    """As the host gives it, "0.30.0"."""
    try:
        # Not a plain import, since the oldest hosts have no such module.
        return str(importlib.import_module("comfyui_version").__version__)
    except ModuleNotFoundError:
        return "0.2 or older"


@cache
def _name_newer(version: str) -> None:
    logger.info("WanQuant: ComfyUI %s is newer than %s, the newest it was tested with", version, NEWEST_TESTED_HOST)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: "0.30.1rc2" counts as 0.30.1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
