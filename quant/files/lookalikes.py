"""Files that are often found under the name of a model, recognized by how they begin."""

from __future__ import annotations

import re

HEAD_BYTES = 64
"""How many bytes of a file tell what it is."""
_LOOKALIKES = (
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "a web page, so the download failed; download it again"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer; run `git lfs pull` or download the file itself"),
    (re.compile(rb"PK\x03\x04"), "a zip archive or a PyTorch pickle; save the model as .safetensors and convert that"),
    (re.compile(rb"tjgg|fmgg|lmgg"), "a GGML file from before GGUF; get the model as GGUF"),
    (re.compile(rb"\s*(\{\s*[\"}]|\[)"), "JSON, such as a configuration; choose the file of the weights or its index"),
)


def lookalike(head: bytes) -> str | None:
    """Return what a file is that begins with these bytes, and what to do; None if that is unknown."""
    return next((kind for pattern, kind in _LOOKALIKES if pattern.match(head)), None)
