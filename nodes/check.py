"""The Check Installation node."""

from __future__ import annotations

import time
from pathlib import Path

import comfy.utils
from comfy_api.latest import io, ui

from ..ops.host_version import host_version
from ..quant.check.report import CheckReport, Step
from ..quant.check.run import check_installation
from ..quant.errors import PrintableLog

logger = PrintableLog(__name__)

_STEPS = 8


class WanQuantCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantCheck",
            display_name="Check Installation",
            category="WanQuant",
            description="Converts, loads and samples a tiny Wan with random weights in seconds, and says what this"
            " machine uses and what is missing for more speed. Nothing is downloaded.",
            search_aliases=["diagnose", "self test", "installation", "triton", "int8 backend", "not working"],
            is_output_node=True,
            inputs=[],
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def fingerprint_inputs(cls) -> int:
        return time.time_ns()  # what is installed may have changed

    @classmethod
    def execute(cls) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(_STEPS)

        def done() -> None:
            bar.update(1)

        def in_host(folder: Path) -> CheckReport:
            # Imported late, because this check is wanted most where an update of ComfyUI broke what it imports.
            try:
                from ..ops.check import check_in_host
            except (ImportError, AttributeError) as error:
                reason = f"ComfyUI {host_version()} lacks what loading needs ({error}); update WanQuant"
                return CheckReport([Step("load", reason, ok=False)])
            return check_in_host(folder, server=True, done=done)

        report = check_installation(in_host, done)
        for step in report.steps:
            if not step.ok:
                logger.error("WanQuant: check of %s failed: %s", step.name, step.text)
        return io.NodeOutput(report.text(), ui=ui.PreviewText(report.text()))
