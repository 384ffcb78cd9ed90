"""Saves CONDITIONING as safetensors and loads it, with every field that the host's nodes added to the prompt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ..quant import QuantError
from ..quant.files.atomic_file import AtomicFile
from ..quant.files.safetensors_content import SafetensorsContent, StreamedTensor
from ..quant.files.safetensors_header import read_safetensors_header
from ..quant.files.strict_json import parse_json

Conditioning = list[list[Any]]
"""The host's type: a list of [prompt embedding, floating point, (batch, tokens, width); dict of further fields]."""

_KEY = "wanquant.conditioning"
_SHA256 = "wanquant.conditioning_sha256"


def save_conditioning(conditioning: Conditioning, path: str, *, checksum: bool = False) -> None:
    """Write conditioning to a safetensors file atomically; tensors keep shape and dtype.

    Args:
        conditioning: the prompts with their fields.
        path: the file, which is replaced if it exists.
        checksum: add a checksum of all fields, which `load_conditioning` can ask for.

    Raises:
        QuantError: a field holds an object such as a ControlNet, which is neither a tensor nor plain data, or the file
            cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    layout = json.dumps(_flatten(conditioning, "conditioning", tensors))
    metadata = {_KEY: layout} | ({_SHA256: _sha256(layout, tensors)} if checksum else {})
    content = SafetensorsContent((StreamedTensor.whole(*item) for item in tensors.items()), metadata)
    with AtomicFile(Path(path), content.nbytes, overwrite=True) as file:
        content.write(file)
        file.commit()


def load_conditioning(path: str, *, checksum: bool = False) -> Conditioning:
    """Read conditioning that `save_conditioning` wrote; its tensors are on the CPU.

    Args:
        path: the file.
        checksum: refuse a file without a checksum, or with another one than that of its fields.

    Raises:
        QuantError: the file is not a safetensors file, has no conditioning, or is damaged.
    """
    metadata, _ = read_safetensors_header(Path(path))
    if _KEY not in metadata:
        raise QuantError(f"{path}: no saved conditioning in this file; write one with Save Conditioning")
    fields = parse_json(metadata[_KEY], f"{path}: {_KEY}", "save the conditioning again")
    try:
        with safe_open(path, framework="pt") as file:
            loaded = _restore(fields, dict.fromkeys(file.keys(), file))
    except (SafetensorError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise QuantError(f"{path}: not the fields of a conditioning ({error}); save the conditioning again") from None
    match loaded:
        case [*prompts] if prompts and all(map(_is_prompt, prompts)):
            if checksum and metadata.get(_SHA256) != _checksum(prompts):
                raise QuantError(f"{path}: differs from its checksum, so it is damaged; save the conditioning again")
            return prompts
    raise QuantError(f"{path}: not a list of prompts with their fields; save the conditioning again")


def _checksum(conditioning: Conditioning) -> str:
    tensors: dict[str, torch.Tensor] = {}
    return _sha256(json.dumps(_flatten(conditioning, "conditioning", tensors)), tensors)


def _sha256(layout: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(layout.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_prompt(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], torch.Tensor)
        and isinstance(value[1], dict)
    )


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: ANN401
    """Return `value` as JSON, in which names replace tensors; the tensors are added to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _flatten(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"  # This includes torch.Size.
        return {kind: [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, _clip_vision_output()):  # From image to video; it is a plain set of attributes.
        return {"clip_vision": {key: _flatten(item, f"{name}.{key}", tensors) for key, item in vars(value).items()}}
    raise QuantError(
        f"{name}: a {type(value).__name__} object cannot be saved, only tensors, numbers, text, lists and dicts;"
        " add this field after loading the conditioning"
    )


def _restore(value: Any, unread: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return the value of a layout.

    Args:
        unread: the file, by the names of the tensors that are not read yet; each is in one place only.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return unread.pop(content).get_tensor(content)
    if kind == "dict":
        return {key: _restore(item, unread) for key, item in content.items()}
    if kind == "clip_vision":
        output = _clip_vision_output()()
        for key, item in content.items():
            output[key] = _restore(item, unread)
        return output
    items = [_restore(item, unread) for item in content]
    return tuple(items) if kind == "tuple" else items


def _clip_vision_output() -> type:
    # Imported late, because the demo writes its prompt without a host.
    from comfy.clip_vision import Output

    return cast("type", Output)
