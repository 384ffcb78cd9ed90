"""The inputs, outputs and progress bar that the nodes that write files share."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from html import escape

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.utils import ExecutionContext, get_executing_context
from server import PromptServer
from tqdm import tqdm  # type: ignore[import-untyped]

from .. import quant
from ..ops.host_version import MINIMUM_HOST, host_version
from ..ops.loading.native_support import SINCE, lacking, problems
from ..quant.conversion.convert import ConversionReport
from ..quant.errors import PrintableLog, printable
from ..quant.plan.recipe import GGUF_RECIPES
from ..quant.progress import Progress
from ..quant.safetensors.header import read_native_header
from ..quant.statistics.importance import Importance
from .folders import BLOCKS_SUFFIX, IMPORTANCE, MODELS, NONE, destinations
from .pictures import picture_tensor, text_and_picture

logger = PrintableLog(__name__)

# The search for the least error needs this much memory on an accelerator, which loaded models may fill.
_ENCODER_BYTES = 1 << 30
# As in the host's own progress bar: thousands of small tensors must not flood the websocket.
_SECONDS_BETWEEN_NAMES = 0.1
# What the first seconds took says little about the rest.
_SECONDS_BEFORE_TIME_LEFT = 3.0


# The order of the list: what is fast on most GPUs comes before what is fast on new ones.
_NATIVE_RECIPES = ("INT8", "W4A8", "W4A8_G32", "W6A8", "INT4", "FP8", "NVFP4", "MXFP8")
_OF_GGUF = (
    "Q8_0 is nearly lossless, Q4_K_M the usual choice. IQ3_XXS and below need a calibration to be worth having, and"
    " IQ1_M, the smallest, is experimental."
)
_OF_NATIVE = """Small files on any GPU (.gguf): F16 to IQ1_M.
Fast on RTX 20 to 50 (.safetensors): INT8 and INT4; from RTX 30 on also W4A8 and W6A8.
Fast on RTX 40 and 50 (.safetensors): FP8; on RTX 50 also NVFP4 and MXFP8."""


def recipe_input(*, native: bool = True) -> io.Combo.Input:
    """Return the choice of the recipe, with ComfyUI's own formats or without.

    With them, the tooltip names those that this host cannot use. So no translation for English may hide it.
    """
    options, tooltip = list(GGUF_RECIPES), f"Trades size for quality: {_OF_GGUF}"
    if native:
        options += _NATIVE_RECIPES
        tooltip = "\n".join((tooltip, _OF_NATIVE, *filter(None, [missing_recipes()])))
    return io.Combo.Input("recipe", options=options, default="Q4_K_M", tooltip=tooltip)


def missing_recipes() -> str:
    """Return which recipes this host cannot use, and which ComfyUI can; empty if it can use all."""
    needed = [f"{recipe} (needs {SINCE.get(recipe, MINIMUM_HOST)} or newer)" for recipe in lacking()]
    return f"This ComfyUI, {host_version()}, cannot use {', '.join(needed)}." if needed else ""


def with_suffix(name: str, suffix: str) -> str:
    """Return the name of a file with this suffix, in place of that of another recipe."""
    stem, last = os.path.splitext(name)
    return stem + suffix if last.lower() in {".gguf", ".safetensors"} - {suffix} else name


def folder_input() -> io.Combo.Input:
    return io.Combo.Input(
        "folder",
        options=list(destinations()),
        default=MODELS,
        advanced=True,
        tooltip="Where to write the file: a model folder, or output for ComfyUI's output folder.",
    )


def overwrite_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "overwrite", default=False, tooltip="Replace a file of the same name that was made with other settings."
    )


def effort_input() -> io.Combo.Input:
    return io.Combo.Input(
        "effort",
        options=["best", "fast", "thorough"],
        default="best",
        advanced=True,
        tooltip="best searches for the least error. fast writes the same bytes as ggml's own encoders, in less time."
        " thorough takes longer than best for less error, with a calibration only.",
    )


def device_input(what: str = "the weights are quantized") -> io.Combo.Input:
    return io.Combo.Input(
        "device",
        options=["default", "cpu"],
        default="default",
        advanced=True,
        tooltip=f"Where {what}. default is the GPU if there is one.",
    )


def importance_input(tooltip: str) -> io.Combo.Input:
    found = [name for name in folder_paths.get_filename_list(IMPORTANCE) if not name.endswith(BLOCKS_SUFFIX)]
    return io.Combo.Input(
        "importance",
        options=[NONE, *found],
        default=NONE,
        optional=True,
        tooltip=f"An importance matrix of this model: {tooltip}",
    )


def target_size_input() -> io.Float.Input:
    return io.Float.Input(
        "target_size",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.01,
        optional=True,  # because graphs saved before it was added lack it
        tooltip="Size of the file in GiB: the types are chosen for the least error at that size. A recipe of ComfyUI's"
        " own formats mixes those that load wherever it does; any other recipe makes a GGUF. 0 uses the recipe alone.",
    )


def report_outputs() -> list[io.Output]:
    return [
        io.String.Output(display_name="path", tooltip="Connect to the path of Load Diffusion Model (Quantized)."),
        io.Image.Output(display_name="report"),
        io.String.Output(display_name="summary"),
    ]


def encoder_device(choice: str) -> torch.device:
    """Return the device chosen in a `device_input`, after freeing memory there for the encoder."""
    device = comfy.model_management.get_torch_device() if choice == "default" else torch.device(choice)
    comfy.model_management.free_memory(_ENCODER_BYTES, device)
    return device


def read_importance(path: str) -> Importance:
    """Read an importance matrix, or a calibration (.safetensors), which contains one."""
    return quant.read_calibration(path) if path.lower().endswith(".safetensors") else quant.read_importance(path)


def progress_bar() -> Progress:
    """Return a callback that shows a bar, the tensor's name and the time left on the running node.

    It lets the user interrupt the node.
    """
    bar = comfy.utils.ProgressBar(1)
    running, started, last_shown = get_executing_context(), time.monotonic(), 0.0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal last_shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)
        if time.monotonic() - last_shown > _SECONDS_BETWEEN_NAMES:
            last_shown = time.monotonic()
            _show(running, name + _time_left(last_shown - started, done / total))

    return progress


def _time_left(seconds: float, share: float) -> str:
    """Return the time left after so many seconds for this share of the work, once it can be told."""
    if seconds < _SECONDS_BEFORE_TIME_LEFT or not share:
        return ""
    return f", {tqdm.format_interval(seconds * (1 - share) / share)} left"


def _show(running: ExecutionContext | None, text: str) -> None:
    """Show a text on the node until the run ends, or until the node gives its own, which web/text.js keeps."""
    if running:
        # The page shows this text as HTML, and it may repeat names from a file.
        PromptServer.instance.send_progress_text(escape(printable(text), quote=False), running.node_id)


def report_output(report: ConversionReport, node: type[io.ComfyNode], name: str = "") -> io.NodeOutput:
    """Return the values of `report_outputs`, which the host also shows below the node.

    The report also warns of a file that this host cannot use.

    Args:
        name: the name that was asked for; the report says if the file has another suffix.
    """
    is_native = report.path.suffix.lower() == ".safetensors"
    unusable = problems(read_native_header(report.path)) if is_native else []
    for problem in unusable:
        logger.warning("%s: %s", report.path, problem)
    report = replace(report, warnings=(*report.warnings, *unusable))
    asked, got = os.path.splitext(name)[1].lower(), report.path.suffix
    if asked and asked != got.lower():
        report = replace(report, notes=(f"this recipe is written as {got}, not as {asked}", *report.notes))
    # Only pictures need matplotlib, which takes a while to load.
    from ..quant.inspection.report_chart import draw, draw_bytes

    chart, summary = picture_tensor(draw(report)), report.text()
    shown = text_and_picture(summary, picture_tensor(draw_bytes(report)), node)
    return io.NodeOutput(str(report.destination), chart, summary, ui=shown)
