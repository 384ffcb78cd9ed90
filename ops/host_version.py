"""The version of ComfyUI, and whether the pack supports it. This file imports nothing that an old host may lack."""

from __future__ import annotations

import importlib
import re
from functools import cache

from ..quant import QuantError
from ..quant.errors import PrintableLog

MINIMUM_HOST = "0.24.0"
NEWEST_TESTED_HOST = "0.33.0"

logger = PrintableLog(__name__)


def require_host(version: str | None = None) -> None:
    """Refuse a host without the quantized tensors and memory manager that this pack needs; log an untested version.

    Args:
        version: ComfyUI's version; if None, it is read from the host.

    Raises:
        QuantError: the host is older than `MINIMUM_HOST`.
    """
    if version is None:
        version = host_version()
    if _release(version) < _release(MINIMUM_HOST):
        raise QuantError(f"WanQuant: ComfyUI {version} is too old, {MINIMUM_HOST} or newer is needed; update ComfyUI")
    if _release(version) > _release(NEWEST_TESTED_HOST):
        _log_untested(version)


def host_version() -> str:
    """Return ComfyUI's version as it states it, such as "0.30.0"."""
    try:
        # The oldest hosts lack this module.
        return str(importlib.import_module("comfyui_version").__version__)
    except ModuleNotFoundError:
        return "0.2 or older"


@cache
def _log_untested(version: str) -> None:
    logger.info(
        "WanQuant: ComfyUI %s is newer than %s, the newest version that WanQuant was tested with",
        version,
        NEWEST_TESTED_HOST,
    )


def _release(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version; "0.30.1rc2" counts as 0.30.1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
