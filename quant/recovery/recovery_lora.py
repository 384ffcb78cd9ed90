"""Recovery LoRA: what quantization took from a model, as much as fits a size, in a LoRA that any loader takes.

The part of each layer is the low-rank matrix that leaves its outputs the least squared error, given the mean squares of
its inputs; the ranks are those that take away most error for their bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device import usable_device
from ..errors import QuantError
from ..files.atomic_file import AtomicFile
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..gguf.provenance import DATA_SHA256, VERSION
from ..gguf.reader import GGUFFile, GGUFTensor, open_gguf
from ..plan.recipe import required_precision
from ..progress import Progress
from ..sources.checkpoint import Checkpoint, SourceTensor, open_checkpoint
from ..sources.names import WAN
from ..statistics.importance import check_importance
from ..units import GIB
from .low_rank import DTYPE, Part, fit

_PREFIX = "diffusion_model."
"""Source: comfy/lora.py model_lora_keys_unet, ComfyUI 0.30.0; other loaders of Wan's LoRAs read it too."""
# A layer may get this many times the rank that all would have if they shared the size alike.
_HEADROOM = 4
# Of the file's header: around each tensor's name, at its beginning, and of the GGUF's name there.
_ENTRY_BYTES, _METADATA_BYTES, _MAX_NAME = 128, 1 << 10, 128


@dataclass(frozen=True)
class RecoveredLayer:
    """The squared error of a layer's outputs, for inputs of the importance given or of mean square 1."""

    name: str
    rank: int
    error: float
    remaining: float
    """With the LoRA."""


@dataclass(frozen=True)
class Recovery:
    """The written file."""

    path: Path
    nbytes: int
    layers: tuple[RecoveredLayer, ...]
    warnings: tuple[str, ...]
    seconds: float

    @property
    def share(self) -> float:
        """Of the squared error of all layers' outputs, what the LoRA takes away."""
        return 1 - sum(layer.remaining for layer in self.layers) / sum(layer.error for layer in self.layers)

    def text(self) -> str:
        ranks = sorted(layer.rank for layer in self.layers)
        what = f"{self.path.name} ({self.nbytes / GIB:.4f} GiB), ranks {ranks[0]} to {ranks[-1]} in {len(ranks)} layers"
        effect = f"takes away {self.share:.1%} of the squared error of their outputs"
        return "\n".join((*self.warnings, f"{what}, {effect}; written in {self.seconds:.1f} s"))

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "share": self.share}


class _Layer(NamedTuple):
    """A matrix of both files."""

    packed: GGUFTensor
    source: SourceTensor

    def error(self, device: torch.device) -> Tensor:
        """Float32 (rows, columns): source minus quantized."""
        weight = self.source.read().to(device).float().view(self.source.shape)
        error = weight - self.packed.qtype.dequantize(self.packed.data.to(device)).view(weight.shape)
        if not error.norm() <= weight.norm():
            raise QuantError(
                f"{self.packed.path}: tensor {self.packed.name}: has nothing of the source's, or one holds NaN or"
                " infinity; give the checkpoint that it was made from"
            )
        return error


def recover(
    file: str | Path,
    source: str | Path,
    destination: str | Path,
    size: float,
    *,
    importance: Mapping[str, Tensor] | None = None,
    add_ons: Sequence[str | Path] = (),
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Recovery:
    """Writes a LoRA that, at strength 1, brings a quantized model nearer to its source; one layer at a time.

    Args:
        file: a GGUF of a Wan model, by any converter.
        source: what it was made from, as `open_checkpoint` takes it.
        destination: path of a .safetensors file.
        size: GiB that the LoRA takes at most.
        importance: (n,) weight of each input column in the squared error, by tensor name: see `read_importance`.
        add_ons: files of add-ons that were merged onto the source.
        device: where the arithmetic runs.

    Raises:
        QuantError: unusable paths, a size too small for rank 1 anywhere, files or an importance of other models.
    """
    started = time.monotonic()
    destination, device = Path(destination), usable_device(device)
    if destination.suffix.lower() != ".safetensors":
        raise QuantError(f"{destination}: not a .safetensors name; choose a destination that ends in .safetensors")
    packed = open_gguf(file)
    with (
        open_checkpoint(source, add_ons) as checkpoint,
        AtomicFile(destination, int(size * GIB), overwrite=overwrite) as output,
    ):
        warnings = check_importance(importance, checkpoint.tensors)
        layers = _layers(packed, checkpoint)
        room = int(size * GIB) - _overhead(layers)
        parts = _best_parts(layers, importance or {}, room, device, progress)
        tensors = sorted((entry for part in parts for entry in _named(part)), key=lambda entry: entry[0])
        if not tensors:
            raise QuantError(f"{destination}: {size:g} GiB hold not even rank 1 of one layer; give a larger size")
        content = SafetensorsContent((StreamedTensor.whole(*entry) for entry in tensors), _metadata(packed))
        content.write(output)
        path = output.commit()
    summaries = tuple(RecoveredLayer(p.name, len(p.gains), p.error, p.remaining) for p in parts)
    return Recovery(path, content.nbytes, summaries, warnings, time.monotonic() - started)


def _layers(packed: GGUFFile, checkpoint: Checkpoint) -> list[_Layer]:
    """The quantized matrices, in the order of the source."""
    layers = []
    for name, source in checkpoint.tensors.items():
        tensor = packed.tensors.get(name)
        if tensor is None or tensor.qtype.block_size == 1 or required_precision(name, source) == "exact":
            continue
        if tensor.shape != source.shape:
            raise QuantError(f"{packed.path}: tensor {name}: shape {tensor.shape}, in the source {source.shape}")
        layers.append(_Layer(tensor, source))
    if not layers or checkpoint.architecture != WAN:
        raise QuantError(
            f"{packed.path}: not a quantized Wan model of {checkpoint.path}; give a GGUF and what it was made from"
        )
    return layers


def _named(part: Part) -> Iterator[tuple[str, Tensor]]:
    layer = _PREFIX + part.name.removesuffix(".weight")
    if len(part.gains):
        yield f"{layer}.lora_A.weight", part.down.contiguous()
        yield f"{layer}.lora_B.weight", part.up.contiguous()


def _overhead(layers: Sequence[_Layer]) -> int:
    """What the header of the file takes at most."""
    return _METADATA_BYTES + sum(2 * (len(_PREFIX + layer.source.name) + _ENTRY_BYTES) for layer in layers)


def _metadata(packed: GGUFFile) -> dict[str, str]:
    known = {DATA_SHA256: str(packed.metadata[DATA_SHA256])} if DATA_SHA256 in packed.metadata else {}
    return {"wanquant.version": VERSION, "wanquant.recovers": packed.path.name[:_MAX_NAME], **known}


def _best_parts(
    layers: Sequence[_Layer],
    importance: Mapping[str, Tensor],
    room: int,
    device: torch.device,
    progress: Progress | None,
) -> list[Part]:
    """Those that fit `room` bytes, one layer after the other."""
    rank = _HEADROOM * room // sum(sum(layer.source.shape) * DTYPE.itemsize for layer in layers) + _HEADROOM
    done, total = 0, sum(layer.source.nbytes for layer in layers)
    parts: list[Part] = []
    for layer in layers:
        if progress is not None:
            progress(done, total, layer.source.name)
        done += layer.source.nbytes
        # What does not fit now would not fit later: more layers only raise the price of a byte.
        error = layer.error(device)
        weights = importance.get(layer.source.name, torch.ones(error.shape[1])).to(device, torch.float32)
        parts = fit([*parts, Part.of(layer.source.name, error, weights, max(1, rank))], room)
    return parts
