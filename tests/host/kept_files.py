"""The files in tests/kept/, which a release made and no later one makes anew, and the source of the two GGUFs.

Version 0.1.0 (commit 9a49d7f) ran `graph.json` once, in ComfyUI 0.30.0 on an x86 CPU. The folder has what it was given,
a conditioning and a calibration of four weights, and what it gave: two GGUFs and `latent.safetensors`. The latter has
the latents `plain` and `calibrated` of both. The source is not kept, since `write_source` writes the same bytes again.

A test that fails on these files has found an update that stops somebody's graph. The update is changed, not the files.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wanquant.quant.plan.wan_shapes import WanSize, transformer_shapes
from wanquant.testing.hosts import ROOT
from wanquant.testing.tiny_wan import write_random_checkpoint

FOLDER = ROOT / "tests" / "kept" / "0.1.0"
SOURCE = "tiny-wan.safetensors"
SOURCE_SHA256 = "230a1b38248af9e0bea522bb02b85cfc339a7c8e0c9af147b75d707118324b22"

GRAPH = FOLDER / "graph.json"
LATENTS = FOLDER / "latent.safetensors"
PROMPT = FOLDER / "tiny-prompt.safetensors"
CALIBRATION = FOLDER / "tiny-calibration.safetensors"
CONVERTED = {"plain": FOLDER / "tiny-wan-Q2_K.gguf", "calibrated": FOLDER / "tiny-wan-calibrated.gguf"}

_DIM = 256  # rows of one super-block
_DENSE = ("blocks.", "patch_embedding.")


def write_source(path: Path) -> None:
    """Write a Wan 2.1 of one block in bfloat16, with the same bytes for good."""
    shapes = transformer_shapes(WanSize(dim=_DIM, ffn_dim=_DIM, layers=1)) | {"text_embedding.0.weight": (_DIM, _DIM)}
    metadata = {"config": json.dumps({"transformer": {"text_dim": _DIM}})}
    write_random_checkpoint(path, shapes, metadata=metadata, draw=_values)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SOURCE_SHA256, "not the source of the kept files any more"


def _values(name: str, shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    """Return values that bfloat16 holds exactly: integers from -15 to 15, times a power of 2.

    They come from a hash of the name, as a random generator may give other values in its next version. Outside the
    block, seven of eight weights are 0, so that the kept files compress well.
    """
    n = math.prod(shape)
    drawn, kept = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * n), np.uint8).reshape(2, n)
    codes = (drawn & 15).astype(np.int8) + (drawn >> 4).astype(np.int8) - 15
    if len(shape) > 1 and not name.startswith(_DENSE):
        codes[kept >= 32] = 0
    values = torch.from_numpy(codes.astype(np.float32)).view(shape)
    if len(shape) == 1:
        return 1 + values / 64 if name.endswith(".weight") else values / 512
    return values / 128 if name.startswith(_DENSE) else values / 64
