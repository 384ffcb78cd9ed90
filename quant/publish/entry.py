"""What the manifest says of one file, from its conversion's report."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ..conversion.convert import ConversionReport
from ..conversion.settings import Target
from ..gguf.provenance import CALIBRATION_SHA256, SOURCE_SHA256, baked_into
from ..inspection.report import FileReport, sqnr_db
from ..plan.recipe import find_recipe

Entry = dict[str, Any]
_OF_HOST = " (ComfyUI)"
"""What follows the name of a format of ComfyUI that is also a type of GGUF."""
_EXACT = ("F32", "F16", "BF16", "U8")


def entry_of(report: ConversionReport, target: Target, sha256: str) -> Entry:
    """Return what is known of a finished file, as plain values.

    Args:
        report: of its conversion, which may have reused it.
        target: what was asked for.
        sha256: of the whole file.
    """
    metadata = report.metadata
    return {
        "file": report.path.name,
        "bytes": report.nbytes,
        "sha256": sha256,
        "mtime_ns": report.path.stat().st_mtime_ns,
        "recipe": target.recipe if target.target_size is None or target.is_native else None,
        "target_gib": target.target_size,
        "experimental": find_recipe(target.recipe).experimental and target.target_size is None,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "sqnr_db": total_sqnr_db(report),
        "types": dict(Counter(tensor.qtype.removesuffix(_OF_HOST) for tensor in report.tensors)),
        "kind": report.kind,
        "effort": str(metadata.get("wanquant.effort", "")),
        "calibration_sha256": str(metadata.get(CALIBRATION_SHA256) or metadata.get("wanquant.importance", "")) or None,
        "loras": list(baked_into(metadata)),
        "source": {
            "name": str(metadata.get("wanquant.source_name", "")),
            "bytes": report.source_bytes,
            "sha256": str(metadata.get(SOURCE_SHA256, "")),
            "dtype": str(metadata.get("wanquant.source_dtype", "")),
            "in_channels": _in_channels(report),
        },
        "wanquant": str(metadata.get("wanquant.version", "")),
        "notes": list(report.notes),
    }


def total_sqnr_db(report: FileReport) -> float | None:
    """Return the signal-to-noise ratio of the quantized tensors in dB, or None without one.

    It is that of the mean of their squared relative errors, in which every weight counts once.
    """
    quantized = [
        tensor for tensor in report.tensors if tensor.relative_error is not None and tensor.qtype not in _EXACT
    ]
    n_elements = sum(tensor.n_elements for tensor in quantized)
    noise = sum(tensor.n_elements * (tensor.relative_error or 0.0) ** 2 for tensor in quantized)
    return round(sqnr_db(math.sqrt(noise / n_elements)), 2) if noise else None


def _in_channels(report: FileReport) -> int | None:
    """Return the latent channels that a diffusion model takes, which tell what it makes a video from."""
    embedding = (tensor for tensor in report.tensors if tensor.name == "patch_embedding.weight")
    return next((tensor.shape[1] for tensor in embedding if len(tensor.shape) > 1), None)
