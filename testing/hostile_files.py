"""Small valid files of every kind that the pack reads, and seeded mutations of them, which a reader has to refuse."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ops.conditioning import load_conditioning, save_conditioning
from ..quant import convert, read_calibration, read_importance, write_calibration, write_importance
from ..quant.conversion.restore import restore
from ..quant.files.sentencepiece import SPIECE_KEY, sentencepiece_model
from ..quant.gguf.layout import TensorSpec
from ..quant.gguf.writer import GGUFWriter
from ..quant.inspection.report import inspect
from ..quant.plan.wan_shapes import WanSize, transformer_shapes
from ..quant.qtype import QTYPES
from ..quant.sources.checkpoint import open_checkpoint
from ..quant.statistics.calibration import Calibration
from ..quant.statistics.importance import Importance
from .tiny_wan import write_random_checkpoint

_INTEGERS = (0, 1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**31, 2**53, 2**63, 2**64, 10**4000, 1e308, "", "x", "é", "\ud800", "$_$", "\0"),
    *([], {}, [[]], [0], ["F32"], [2**40, 2**40], {"dtype": "F32"}, {"data_offsets": [0, 0]}),
)
_SIDE = 32


@dataclass(frozen=True)
class Kind:
    """Files of one kind."""

    name: str
    suffix: str
    seeds: tuple[bytes, ...]
    """The contents of valid files."""
    read: Callable[[Path], object]
    """Reads a file as the pack does; raises QuantError for a bad one."""

    def mutations(self, seed: int) -> Iterator[bytes]:
        """Yield mutated files without end, the same ones for the same seed."""
        generator = random.Random(seed)
        while True:
            content = generator.choice(self.seeds)
            for _ in range(generator.choice((1, 1, 1, 2, 4))):
                content = _mutated(content, self.suffix, generator)
            yield content


def kinds(folder: Path) -> list[Kind]:
    """Return all kinds of files; those that are needed to make the seeds are written to `folder`."""
    shapes = {
        name: tuple(min(size, _SIDE) for size in shape)
        for name, shape in transformer_shapes(WanSize(128, 128, 1)).items()
    }
    plain = write_random_checkpoint(folder / "wan.safetensors", shapes, metadata={"config": '{"a": [1]}'})
    converted = convert(plain, folder / "wan.gguf", "Q4_0", effort="fast").path
    encoder = _encoder(folder / "encoder.gguf")
    restored = restore(encoder, folder / "encoder.safetensors").path
    layer = "blocks.0.ffn.0.weight"
    sums, counts = {layer: torch.ones(256)}, {layer: 4.0}
    importance = write_importance(folder / "importance.gguf", Importance(sums, counts, 1, "a"))
    calibration = Calibration(sums, counts, 1, "a", products={layer: torch.eye(256)[None]})
    calibrated = write_calibration(folder / "calibration.safetensors", calibration)
    prompt = folder / "prompt.safetensors"
    save_conditioning([[torch.ones(1, 2, 4), {"guidance": 5.0, "mask": torch.ones(2, dtype=torch.bool)}]], str(prompt))

    def contents(*paths: Path) -> tuple[bytes, ...]:
        return tuple(path.read_bytes() for path in paths)

    return [
        Kind("GGUF", ".gguf", contents(converted, encoder), _read_gguf),
        Kind("restored GGUF", ".gguf", contents(converted, encoder), _restore),
        Kind("safetensors", ".safetensors", contents(plain, restored), _read_checkpoint),
        Kind("shard index", ".safetensors.index.json", (_index(plain),), _read_index(plain)),
        Kind("importance matrix", ".gguf", contents(importance), read_importance),
        Kind("importance matrix (.dat)", ".dat", (_legacy_importance(),), read_importance),
        Kind("calibration", ".safetensors", contents(calibrated), read_calibration),
        Kind("conditioning", ".safetensors", contents(prompt), lambda path: load_conditioning(str(path))),
    ]


def _mutated(content: bytes, suffix: str, generator: random.Random) -> bytes:
    if suffix.endswith(".json") or (suffix == ".safetensors" and generator.random() < 0.7):
        return _mutated_json(content, suffix, generator)
    # The header comes first, and most of what can go wrong is there.
    start = int(len(content) * generator.random() ** 3)
    stop = start + generator.choice((1, 2, 4, 8, 64))
    kind = generator.randrange(6)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[stop:]
    if kind == 2:
        return content[:start] + content[start:stop] * generator.choice((2, 3, 100)) + content[stop:]
    if kind == 3:
        return content[:start] + generator.randbytes(stop - start) + content[stop:]
    if kind == 4:
        return content[:start] + struct.pack("<Q", generator.choice(_INTEGERS)) + content[start + 8 :]
    return content[:start] + struct.pack("<I", generator.choice(_INTEGERS) & 0xFFFFFFFF) + content[start + 4 :]


def _mutated_json(content: bytes, suffix: str, generator: random.Random) -> bytes:
    """Replace one value of the JSON, or the name of one, by another."""
    begin = 0 if suffix.endswith(".json") else 8
    end = len(content) if begin == 0 else 8 + int.from_bytes(content[:8], "little")
    try:
        tree = json.loads(content[begin:end])
    except (ValueError, RecursionError):
        return content
    places = list(_places(tree))
    if not places:
        return content
    parent, key = generator.choice(places)
    value = generator.choice(_JSON_VALUES)
    if isinstance(parent, dict) and generator.random() < 0.3:
        parent[value if isinstance(value, str) else str(value)[:5000]] = parent.pop(key)
    else:
        parent[key] = value
    text = json.dumps(tree, allow_nan=True).encode()
    if begin == 0:
        return text
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _read_gguf(path: Path) -> None:
    report = inspect(path)
    report.text()
    json.dumps(report.json())
    _read_checkpoint(path)


def _read_checkpoint(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for tensor in checkpoint.tensors.values():
            tensor.read()


def _restore(path: Path) -> None:
    restore(path, path.with_name("restored.safetensors"), overwrite=True)


def _index(checkpoint: Path) -> bytes:
    content = checkpoint.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, checkpoint.name)}).encode()


def _read_index(checkpoint: Path) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        beside = path.with_name(checkpoint.name)
        if not beside.exists():
            beside.write_bytes(checkpoint.read_bytes())
        _read_checkpoint(path)

    return read


def _encoder(path: Path) -> Path:
    """Write a T5 text encoder with a vocabulary, in llama.cpp's names."""
    metadata: dict[str, Any] = {
        "general.architecture": "t5encoder",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "a"],
        "tokenizer.ggml.scores": np.zeros(4, np.float32),
        "tokenizer.ggml.token_type": np.array([3, 3, 2, 1], np.int32),
        "tokenizer.ggml.precompiled_charsmap": np.zeros(8, np.uint8),
    }
    metadata[SPIECE_KEY] = np.frombuffer(sentencepiece_model(metadata), np.uint8)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_o", "attn_rel_b", "ffn_up", "ffn_down", "ffn_gate")
    block = dict.fromkeys(matrices, (_SIDE, _SIDE)) | dict.fromkeys(("attn_norm", "ffn_norm"), (_SIDE,))
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (4, _SIDE), "enc.output_norm.weight": (_SIDE,)}
    shapes |= {f"enc.blk.0.{name}.weight": shape for name, shape in block.items()}
    specs = [TensorSpec(name, QTYPES["F16"], shape) for name, shape in shapes.items()]
    with GGUFWriter(path, metadata, specs) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.ones(shape).half().view(torch.uint8))
        return writer.close()


def _legacy_importance() -> bytes:
    name = b"blocks.0.ffn.0.weight"
    values = np.ones(64, np.float32).tobytes()
    return struct.pack("<ii", 1, len(name)) + name + struct.pack("<iI", 4, 64) + values
