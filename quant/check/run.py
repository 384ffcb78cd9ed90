"""The whole check of the installation, as `python -m quant check` runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import QuantError
from ..host_process import call_in_comfyui, find_comfyui
from .parts import accelerator, file_parts, product_parts
from .report import CheckReport, Step, run_parts

_WITHOUT_COMFYUI = (
    "loading, sampling and the memory mode: no ComfyUI was found; set COMFYUI_PATH to its folder, or run the node"
    " Check Installation"
)


def check_installation(
    in_host: Callable[[Path], CheckReport] | None = None, done: Callable[[], None] = lambda: None
) -> CheckReport:
    """Convert, load, sample and compare a tiny Wan in a temporary folder, with nothing to download.

    Args:
        in_host: checks in ComfyUI what the folder has; if None, that is done in another process, if ComfyUI is found.
        done: called after each step that needs no ComfyUI.
    """
    report, device = CheckReport(), accelerator()
    with tempfile.TemporaryDirectory(prefix="wanquant-check-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        parts = file_parts(folder, device)
        for step in run_parts(parts):
            report.steps.append(step)
            done()
        report.name_skipped(parts)
        if report.ok:
            found = in_host(folder) if in_host else _elsewhere(folder)
            report.steps += found.steps
            report.not_checked += found.not_checked
    products = product_parts(device)
    if not {name for name, _ in products} & {step.name for step in report.steps}:
        report.steps += run_parts(products)
    return report


def _elsewhere(folder: Path) -> CheckReport:
    try:
        comfyui = find_comfyui()
        if not comfyui:
            return CheckReport(not_checked=[_WITHOUT_COMFYUI])
        return CheckReport.from_json(call_in_comfyui(comfyui, "ops.check", "check_elsewhere", str(folder)))
    except QuantError as error:
        return CheckReport([Step("ComfyUI", str(error), ok=False)])
