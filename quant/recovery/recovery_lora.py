"""Recovery LoRAs: files that undo a part of a GGUF's quantization error, and that any LoRA loader reads.

The LoRA holds a low-rank correction of each quantized layer, chosen for the least squared error of the layer's outputs:
see `low_rank`. A layer gets more ranks where these remove more error per byte.
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
from ..errors import QuantError, printable_lines
from ..files.atomic_file import AtomicFile
from ..files.safetensors_content import SafetensorsContent, StreamedTensor
from ..gguf.provenance import CALIBRATED, DATA_SHA256, VERSION, corrected_in
from ..gguf.reader import GGUFFile, GGUFTensor
from ..plan.recipe import required_precision
from ..progress import Progress
from ..sources.baked_lora import LoRA
from ..sources.checkpoint import Checkpoint, SourceTensor, open_checkpoint
from ..sources.model_tensors import open_model
from ..sources.names import WAN
from ..statistics.importance import Importance, check_importance
from ..units import GIB, counted
from .low_rank import DTYPE, LowRankCorrection, choose_ranks

_PREFIX = "diffusion_model."
"""The prefix of the names in a LoRA, which other loaders of LoRAs for Wan read too.

Source: comfy/lora.py model_lora_keys_unet, ComfyUI 0.30.0.
"""
# The largest rank of a layer, relative to the rank that all layers would have if it were the same for all.
_HEADROOM = 4
# Upper bounds for the header of the file: the bytes per tensor without its name, and those of the metadata.
_ENTRY_BYTES, _METADATA_BYTES = 128, 1 << 10
# The most characters of the GGUF's name in the metadata.
_MAX_NAME = 128


@dataclass(frozen=True)
class RecoveredLayer:
    """The effect of the LoRA on one layer.

    Errors are squared errors of the layer's outputs. The mean square of an input channel is its importance, or 1
    without one.
    """

    name: str
    rank: int
    error: float
    """The error without the LoRA."""
    remaining: float
    """The error with the LoRA."""


@dataclass(frozen=True)
class Recovery:
    """A report of a written recovery LoRA."""

    path: Path
    nbytes: int
    layers: tuple[RecoveredLayer, ...]
    warnings: tuple[str, ...]
    seconds: float

    @property
    def share(self) -> float:
        """The share of the squared error of all layers' outputs that the LoRA removes, from 0 to 1."""
        return 1 - sum(layer.remaining for layer in self.layers) / sum(layer.error for layer in self.layers)

    def text(self) -> str:
        ranks = sorted(layer.rank for layer in self.layers)
        layers = counted(len(ranks), "layer")
        file = f"{self.path.name} ({self.nbytes / GIB:.4f} GiB), ranks {ranks[0]} to {ranks[-1]} in {layers}"
        effect = f"removes {self.share:.1%} of the squared error of their outputs"
        return printable_lines((*self.warnings, f"{file}, {effect}; written in {self.seconds:.1f} s"))

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "share": self.share}


class _Layer(NamedTuple):
    """A matrix that both files hold."""

    packed: GGUFTensor
    source: SourceTensor

    def error(self, device: torch.device) -> Tensor:
        """Return the source minus the quantized weight: float32, (out_features, in_features)."""
        weight = self.source.read().to(device).float().view(self.source.shape)
        error = weight - self.packed.qtype.dequantize(self.packed.data.to(device)).view(weight.shape)
        if not error.norm() <= weight.norm():
            raise QuantError(
                f"{self.packed.path}: tensor {self.packed.name}: does not resemble the source's tensor, or one of them"
                " holds NaN or infinity; give the checkpoint that the GGUF was made from"
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
    loras: Sequence[LoRA] = (),
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Recovery:
    """Write a LoRA that, at strength 1, brings a quantized model closer to its source.

    Layers are processed one at a time. The destination appears complete or not at all.

    Args:
        file: path of a GGUF of a Wan model, made by any converter.
        source: path of the checkpoint that the GGUF was made from, as for `open_checkpoint`.
        destination: path of the .safetensors file.
        size: the largest size of the LoRA in GiB.
        importance: floating point, (in_features,), by tensor name: the mean square of each input channel, by which the
            squared error of a weight counts. See `read_importance`. A file with corrected biases needs the matrix that
            it was made with.
        add_ons: add-on files that were merged onto the source.
        loras: LoRAs that were added to the weights of the source.
        device: the device that computes the corrections.
        overwrite: replace an existing destination.
        progress: is called with the source bytes done, the source bytes in total and the name of the tensor.

    Raises:
        QuantError: unusable paths or device, a size too small for rank 1 of any layer, or a source or importance
            matrix of another model.
    """
    started = time.monotonic()
    destination, device = Path(destination), usable_device(device)
    if destination.suffix.lower() != ".safetensors":
        raise QuantError(f"{destination}: not a .safetensors name; choose a destination that ends in .safetensors")
    packed = open_model(file)
    with (
        open_checkpoint(source, add_ons, loras) as checkpoint,
        AtomicFile(destination, int(size * GIB), overwrite=overwrite) as output,
    ):
        warnings = (*check_importance(importance, checkpoint.tensors), *_doubt(packed))
        layers = _layers(packed, checkpoint)
        means = _means(packed, layers, importance)
        nbytes = int(size * GIB) - _header_bytes(layers)
        nbytes -= sum(layer.source.shape[0] * DTYPE.itemsize for layer in layers if layer.source.name in means)
        corrections = _corrections(layers, importance or {}, means, nbytes, device, progress)
        named = (entry for each in corrections for entry in _named(each, means.get(each.name)))
        tensors = sorted(named, key=lambda entry: entry[0])
        if not tensors:
            raise QuantError(
                f"{destination}: {size:g} GiB are too small for rank 1 of a single layer; give a larger size"
            )
        content = SafetensorsContent((StreamedTensor.whole(*entry) for entry in tensors), _metadata(packed))
        content.write(output)
        path = output.commit()
    summaries = tuple(RecoveredLayer(each.name, each.rank, each.error, each.remaining) for each in corrections)
    return Recovery(path, content.nbytes, summaries, warnings, time.monotonic() - started)


def _doubt(packed: GGUFFile) -> list[str]:
    """Return a warning if the share of the error that the LoRA removes says too much."""
    if packed.metadata.get(CALIBRATED) is not True:
        return []
    return [
        f"{packed.path.name} was rounded for the outputs of its layers, so that its errors make up for each other:"
        " the LoRA gains much less than the share that it removes"
    ]


def _layers(packed: GGUFFile, checkpoint: Checkpoint) -> list[_Layer]:
    """Return the quantized matrices in the order of the source."""
    layers = []
    for name, source in checkpoint.tensors.items():
        tensor = packed.tensors.get(name)
        if tensor is None or tensor.qtype.block_size == 1 or required_precision(name, source) == "exact":
            continue
        if tensor.shape != source.shape:
            raise QuantError(
                f"{packed.path}: tensor {name}: shape {tensor.shape}, expected {source.shape} as in the source;"
                " give the checkpoint that the GGUF was made from"
            )
        layers.append(_Layer(tensor, source))
    if not layers or checkpoint.architecture != WAN:
        raise QuantError(
            f"{packed.path}: not a quantized Wan model made from {checkpoint.path};"
            " give a GGUF and the checkpoint that it was made from"
        )
    return layers


def _means(packed: GGUFFile, layers: Sequence[_Layer], importance: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the mean inputs of the layers whose bias already makes up for the mean error: float32 (in_features,)."""
    corrected, means = corrected_in(packed.metadata), {}
    for layer in layers:
        name = layer.source.name
        if f"{name.removesuffix('.weight')}.bias" not in corrected:
            continue
        mean = importance.mean(name) if isinstance(importance, Importance) else None
        if mean is None:
            raise QuantError(
                f"{packed.path}: the bias of {name} makes up for the error of its weight, but no mean input is known;"
                " give the importance matrix or calibration that the file was made with"
            )
        means[name] = mean
    return means


def _named(correction: LowRankCorrection, mean: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    layer = _PREFIX + correction.name.removesuffix(".weight")
    if correction.rank:
        yield f"{layer}.lora_A.weight", correction.down.contiguous()
        yield f"{layer}.lora_B.weight", correction.up.contiguous()
        if mean is not None:
            # What the LoRA adds on average, the bias holds already.
            yield f"{layer}.diff_b", -(correction.up.float() @ (correction.down.float() @ mean)).to(DTYPE)


def _header_bytes(layers: Sequence[_Layer]) -> int:
    """Return an upper bound for the bytes of the file's header."""
    return _METADATA_BYTES + sum(3 * (len(_PREFIX + layer.source.name) + _ENTRY_BYTES) for layer in layers)


def _metadata(packed: GGUFFile) -> dict[str, str]:
    known = {DATA_SHA256: str(packed.metadata[DATA_SHA256])} if DATA_SHA256 in packed.metadata else {}
    return {"wanquant.version": VERSION, "wanquant.recovers": packed.path.name[:_MAX_NAME], **known}


def _corrections(
    layers: Sequence[_Layer],
    importance: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    nbytes: int,
    device: torch.device,
    progress: Progress | None,
) -> list[LowRankCorrection]:
    """Return the corrections of all layers, which need at most `nbytes` in total."""
    rank = _HEADROOM * nbytes // sum(sum(layer.source.shape) * DTYPE.itemsize for layer in layers) + _HEADROOM
    done, total = 0, sum(layer.source.nbytes for layer in layers)
    corrections: list[LowRankCorrection] = []
    for layer in layers:
        if progress is not None:
            progress(done, total, layer.source.name)
        done += layer.source.nbytes
        error = layer.error(device)
        mean_squares = importance.get(layer.source.name, torch.ones(error.shape[1])).to(device, torch.float32)
        if layer.source.name in means:
            mean_squares = (mean_squares - means[layer.source.name].to(device).square()).clamp(min=0)
        correction = LowRankCorrection.of(layer.source.name, error, mean_squares, max(1, rank))
        # A rank that is dropped now would also be dropped at the end, because more layers only add competition.
        corrections = choose_ranks([*corrections, correction], nbytes)
    return corrections
