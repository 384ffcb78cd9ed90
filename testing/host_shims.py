"""Shims to import ComfyUI where torchvision does not match a CPU build of torch, or where torchaudio is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version

# As torchvision 0.28.0 declares them in csrc/ops/nms.cpp and csrc/ops/quantized/cpu/qnms_kernel.cpp.
OPERATORS = ("torchvision::nms", "torchvision::qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def install() -> None:
    """Install the shims that this machine needs; none where the real packages can be imported."""
    # Only a +cpu build can mismatch. Elsewhere ComfyUI must import torch first, because it chooses the allocator.
    if version("torch").endswith("+cpu"):
        _match_torchvision()
    if importlib.util.find_spec("torchaudio") is None:
        for name in ("torchaudio", "torchaudio.functional"):
            stub = types.ModuleType(name)
            stub.__spec__ = ModuleSpec(name, None, is_package=True)
            stub.__path__ = []
            sys.modules[name] = stub
        # Enough for the audio encoder and a sound of its own sample rate.
        vars(stub)["resample"] = _same_rate
        vars(sys.modules["torchaudio"])["functional"] = stub


def _same_rate(waveform: object, original: int, new: int) -> object:
    """Stand in for torchaudio.functional.resample between equal rates."""
    if original != new:
        raise RuntimeError(
            f"this stand-in for torchaudio cannot resample from {original} to {new} Hz; install torchaudio"
        )
    return waveform


def _match_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if OPERATORS[0] not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch = importlib.import_module("torch")
        for operator in OPERATORS:
            torch.library.define(operator, SCHEMA)
        importlib.import_module("torchvision")
