"""The parts of the check that need no ComfyUI: a conversion, its error, dequantization and 8-bit products."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..conversion.convert import convert_all
from ..conversion.settings import Settings, Target
from ..errors import QuantError
from ..gguf.provenance import VERSION
from ..gguf.reader import open_gguf
from ..inspection.verify import verify
from ..kernels import eager
from ..kernels.optional import FUSED, GGML
from ..qtype import QTYPES
from ..torch_op import dequantize_into
from .report import Finding, Part
from .tiny_wan import write_random_wan

SOURCE, QUANTIZED, NATIVE = "tiny-wan.safetensors", "tiny-wan-Q4_K_M.gguf", "tiny-wan-INT8.safetensors"
"""The files that `file_parts` make in their folder."""

_LEAST_SQNR = {QUANTIZED: 15.0, NATIVE: 30.0}
"""In dB; far below what the converter reaches on random weights, far above what wrong codes do."""
_MIB = 1 << 20
_UPDATE = "INT8 models and `int8` need 8-bit products; update ComfyUI to 0.27 or newer"
_TOKENS, _COLUMNS, _ROWS = 64, 256, 128  # of the 8-bit product
_MAX_INT8_ERROR = 0.05


def accelerator() -> torch.device:
    """Return the device that models run on: the first GPU that PyTorch finds, else the CPU."""
    for kind in ("cuda", "xpu", "mps"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            return torch.device(kind)
    return torch.device("cpu")


def file_parts(folder: Path, device: torch.device) -> Sequence[Part]:
    """Return the parts that make the files of the check in a folder and compare them with their source."""
    return (
        ("system", partial(_system, device)),
        ("convert", partial(_convert, folder)),
        ("compare", partial(_compare, folder)),
        ("dequantize", partial(_dequantize, folder, device)),
    )


def product_parts(device: torch.device) -> Sequence[Part]:
    """Return the part that multiplies 8-bit integers as ComfyUI does."""
    return (("8-bit products", partial(_products, device)),)


def _system(device: torch.device) -> Finding:
    name = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else ""
    text = f"WanQuant {VERSION}, Python {platform.python_version()}, PyTorch {torch.__version__}, {device.type}{name}"
    if device.type != "cpu":
        return Finding(text)
    if shutil.which("nvidia-smi"):
        remedy = f"PyTorch {torch.__version__} does not use the NVIDIA GPU of this machine; install its build for CUDA"
    else:
        remedy = "PyTorch finds no GPU, so models run on the CPU; install its build for your GPU, if there is one"
    return Finding(text, (remedy,))


def _convert(folder: Path) -> Finding:
    source = write_random_wan(folder / SOURCE)
    targets = {"Q4_K_M": folder / QUANTIZED, "INT8": folder / NATIVE}
    convert_all(source, [Target(path, recipe) for recipe, path in targets.items()], Settings())
    sizes = ", ".join(f"{recipe} {path.stat().st_size / _MIB:.1f} MiB" for recipe, path in targets.items())
    return Finding(f"a tiny Wan of {source.stat().st_size / _MIB:.1f} MiB with random weights became {sizes}")


def _compare(folder: Path) -> Finding:
    found = []
    for name, least in _LEAST_SQNR.items():
        sqnr = verify(folder / name, folder / SOURCE).by_role[-1].sqnr_db
        if sqnr < least:
            raise QuantError(
                f"{name}: {sqnr:.1f} dB from its source, expected at least {least:.0f}; the conversion computes wrongly"
                " here: update WanQuant and PyTorch"
            )
        found.append(f"{Path(name).stem.removeprefix('tiny-wan-')} {sqnr:.1f} dB")
    return Finding(f"signal-to-noise ratio of the weights: {', '.join(found)}")


def _dequantize(folder: Path, device: torch.device) -> Finding:
    """Dequantize a tensor of each type on the device and on the CPU, and compare the bits with torch operations."""
    tensors = {t.qtype.name: t.data for t in open_gguf(folder / QUANTIZED).tensors.values() if t.qtype.block_size > 1}
    ran = {}
    for where in dict.fromkeys((device, torch.device("cpu"))):
        names: dict[str, list[str]] = {}
        for name, packed in tensors.items():
            shape = QTYPES[name].unpacked_shape(tuple(packed.shape))
            expected, out = torch.empty(shape), torch.empty(shape, device=where)
            eager.dequantize(QTYPES[name], packed, expected)
            names.setdefault(dequantize_into(packed.to(where), name, out), []).append(name)
            if not torch.equal(out.cpu(), expected):
                raise QuantError(f"{name} on {where}: other values than by torch operations; update WanQuant")
        ran[where] = "; ".join(f"{library} ({', '.join(types)})" for library, types in names.items())
    text = ", and ".join(f"on {where.type} by {what}" for where, what in ran.items())
    return Finding(f"{text}; the bits are equal", _faster(device))


def _faster(device: torch.device) -> tuple[str, ...]:
    """Return what would make dequantization faster; the paths have run before."""
    found = []
    if device.type in ("cuda", "xpu") and FUSED.missing:
        found.append(
            f"Triton cannot be used ({FUSED.missing}), so weights are dequantized by several slower operations; install"
            " triton, or triton-windows on Windows"
        )
    if GGML.missing:
        found.append(
            f"ggml's C code cannot be used ({GGML.missing}), so effort fast and the CPU are slower;"
            " pip install 'libggml-python>=0.20,<0.21'"
        )
    lost = ((path.title, ", ".join(sorted(path.lost))) for path in (FUSED, GGML) if path.lost)
    return (*found, *(f"{title} failed for {types}, as the log says; update WanQuant" for title, types in lost))


def _products(device: torch.device) -> Finding:
    try:
        import comfy_kitchen
        from comfy_kitchen.registry import registry

        release = version("comfy-kitchen")
    except (ImportError, PackageNotFoundError):
        return Finding("none, because comfy-kitchen is not installed", (_UPDATE,))
    if not hasattr(comfy_kitchen, "int8_linear"):
        return Finding(f"none in comfy-kitchen {release}", (_UPDATE,))
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # the kernels of GPUs take no float32
    x = torch.randn(_TOKENS, _COLUMNS, generator=generator).to(device, dtype)
    codes = torch.randint(-127, 128, (_ROWS, _COLUMNS), generator=generator).to(torch.int8).to(device)
    scale = torch.full((_ROWS, 1), 0.01, device=device)
    arguments = {"x": x, "weight": codes, "weight_scale": scale, "bias": None, "out_dtype": x.dtype}
    backend = registry.get_capable_backend("int8_linear", arguments)
    expected = torch.nn.functional.linear(x.cpu().float(), codes.cpu() * 0.01)
    error = float((comfy_kitchen.int8_linear(**arguments).cpu().float() - expected).norm() / expected.norm())
    if not error < _MAX_INT8_ERROR:
        raise QuantError(
            f"8-bit products of comfy-kitchen {release} ({backend}): a relative error of {error:.3f}, expected at most"
            f" {_MAX_INT8_ERROR}; update comfy-kitchen, and leave `int8` off until then"
        )
    text = f"comfy-kitchen {release}, backend {backend}, relative error {error:.4f}"
    return Finding(text, _faster_products(comfy_kitchen.list_backends(), backend, device))


def _faster_products(backends: dict[str, dict[str, object]], backend: str, device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu" or backend != "eager":
        return ()
    off = {name: b.get("unavailable_reason") or (b.get("disabled") and "turned off") for name, b in backends.items()}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(off.items()) if reason)
    remedy = "install PyTorch for CUDA 13 or newer, or start ComfyUI with --enable-triton-backend"
    return (f"8-bit products run on PyTorch operations ({reasons or 'no other backend takes them'}); {remedy}",)
