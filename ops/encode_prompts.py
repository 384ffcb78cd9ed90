"""Prompts encoded once: the text encoder is loaded only for a text that was not encoded before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch

from ..quant import QuantError
from ..quant.errors import PrintableLog
from ..quant.gguf.provenance import VERSION
from .conditioning import Conditioning
from .conditioning_cache import ConditioningCache
from .host_version import host_version
from .loading.native_text_encoder import load_any_text_encoder

_REVISION = 1
"""Counts how often the embeddings that the same encoder file gives have changed between releases."""

logger = PrintableLog(__name__)


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder in a file, which is not loaded yet."""

    path: str
    files: tuple[Path, ...]
    """All files that are read with it: the parts of a split one, and a tokenizer beside it."""
    clip_type: str
    """The name of a `comfy.sd.CLIPType`: the model family that the prompts are for."""
    dtype: torch.dtype | None = None
    """The dtype of matrix products; if None, that of the encoder."""
    embeddings: tuple[str, ...] = ()
    """The folders of textual inversion embeddings."""

    def key(self, text: str) -> str:
        """Return a SHA-256 of all that decides how a text is encoded, but of the contents of files only size and time.

        The flags of the host, such as --fp16-text-enc, are part of it.
        """
        device = comfy.model_management.text_encoder_device()
        dtypes = (str(self.dtype), str(comfy.model_management.text_encoder_dtype(device)))
        revisions = (host_version(), VERSION, _REVISION)
        named = _below(self.embeddings) if "embedding:" in text else []
        parts = (text, self.path, _states(self.files), self.clip_type, dtypes, _states(named), revisions)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def load(self) -> comfy.sd.CLIP:
        """Load the encoder.

        Raises:
            QuantError: as `load_any_text_encoder` raises it.
        """
        clip_type = comfy.sd.CLIPType[self.clip_type]
        return load_any_text_encoder(self.path, clip_type, list(self.embeddings), dtype=self.dtype)


def encode_prompts(encoder: TextEncoder, texts: Sequence[str], cache: ConditioningCache) -> list[Conditioning]:
    """Return the conditioning of each text, from the cache if it is there.

    The encoder is loaded once for all texts that are not, and released again. A result that cannot be kept is returned
    nevertheless, and logged.

    Raises:
        QuantError: the encoder cannot be loaded.
    """
    keys = {text: encoder.key(text) for text in texts}
    found = {text: cache.load(key) for text, key in keys.items()}
    missing = [text for text, conditioning in found.items() if conditioning is None]
    if missing:
        encoded = _encode(encoder, missing)
        _keep(encoder, encoded, keys, cache)
        found.update(encoded)
    else:
        logger.info("WanQuant: these prompts were encoded before, so %s was not loaded", Path(encoder.path).name)
    return [conditioning for text in texts if (conditioning := found[text]) is not None]


def _encode(encoder: TextEncoder, texts: Iterable[str]) -> dict[str, Conditioning]:
    clip = encoder.load()
    try:
        return {text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts}
    finally:
        comfy.model_management.unload_model_and_clones(clip.patcher, all_devices=True)


def _keep(
    encoder: TextEncoder, encoded: dict[str, Conditioning], keys: dict[str, str], cache: ConditioningCache
) -> None:
    for text, conditioning in encoded.items():
        if encoder.key(text) != keys[text]:  # a file changed meanwhile, and nobody knows which state was read
            continue
        try:
            cache.save(keys[text], conditioning)
        except QuantError as error:
            logger.warning("WanQuant: this prompt will be encoded again next time (%s)", error)


def _below(folders: Iterable[str]) -> list[Path]:
    return sorted(path for folder in folders for path in Path(folder).rglob("*"))


def _states(files: Iterable[Path]) -> list[tuple[str, int, int] | None]:
    """Return path, size in bytes and time in nanoseconds of each file, or None where there is none."""
    return [_state(path) for path in files]


def _state(path: Path) -> tuple[str, int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return str(path), status.st_size, status.st_mtime_ns
