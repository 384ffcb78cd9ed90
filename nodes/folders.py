"""Which folders the nodes read from and write to, in the host's own terms."""

from __future__ import annotations

import difflib
import os
import re
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import folder_paths

from ..quant import QuantError

MODELS = "diffusion_models"
ENCODERS = "text_encoders"
# The names that existing GGUF packs use, so that entries in extra_model_paths.yaml serve both.
GGUF = "unet_gguf"
GGUF_ENCODERS = "clip_gguf"
CONDITIONING = "conditioning"
IMPORTANCE = "importance"
LORAS = "loras"
OUTPUT = "output"
NONE = "none"
"""What a list offers where no file need be chosen."""

_SHARD = re.compile(r"-(\d{5})-of-\d{5}(?=\.(safetensors|gguf)$)")


def register_folders() -> None:
    """Make the host list .gguf files beside its own diffusion models, saved conditionings and importance matrices."""
    for name, gguf_name in ((MODELS, GGUF), (ENCODERS, GGUF_ENCODERS)):
        shared, _ = folder_paths.folder_names_and_paths[name]
        paths, extensions = folder_paths.folder_names_and_paths.get(gguf_name, (shared, set()))
        if paths is not shared:
            # Configured by the user or by another pack: its folders stay, ahead of the host's.
            shared = [*paths, *(path for path in shared if path not in paths)]
        folder_paths.folder_names_and_paths[gguf_name] = (shared, {*extensions, ".gguf"})
    parents = (folder_paths.models_dir, folder_paths.get_output_directory())
    for name, suffixes in ((CONDITIONING, {".safetensors"}), (IMPORTANCE, {".gguf", ".dat", ".safetensors"})):
        folder_paths.folder_names_and_paths[name] = ([os.path.join(p, name) for p in parents], suffixes)


def source_names() -> list[str]:
    """Checkpoints that can be converted: of one in several files the first, which stands for all."""
    dense = [name for name in folder_paths.get_filename_list(MODELS) if name.endswith(".safetensors")]
    shards = [(name, _SHARD.search(name)) for name in (*dense, *folder_paths.get_filename_list(GGUF))]
    return [name for name, shard in shards if shard is None or int(shard[1]) == 1]


def source_folder(name: str | None) -> str:
    """The kind of folder that lists a checkpoint."""
    return GGUF if name is not None and name.endswith(".gguf") else MODELS


def source_stem(name: str) -> str:
    """A checkpoint's name, subfolder included, without the suffix and the number of a shard."""
    return _SHARD.sub("", portable(name)).removesuffix(".safetensors").removesuffix(".gguf")


def model_path(folder: str, name: str) -> str:
    """Full path of a listed file, by its name in a graph that may have been saved on another system.

    Raises:
        QuantError: no such file, with the nearest name there is.
    """
    path = _find(folder, name)
    if path is None:
        raise QuantError(_absence(folder, name))
    return path


def check_names(*named: tuple[str, str | None]) -> bool | str:
    """What `validate_inputs` answers for (folder, name) pairs: True, or why one leads to no file.

    A linked name, still unknown, is None.

    Declaring a combo in `validate_inputs` takes its check over from the host, which knows the separators of one system.
    """
    known = ((folder, name) for folder, name in named if name is not None)
    return next((_absence(folder, name) for folder, name in known if _find(folder, name) is None), True)


def _find(folder: str, name: str) -> str | None:
    listed = folder_paths.get_filename_list(folder)
    same = (other for other in listed if portable(other) == portable(name))
    known = name if name in listed else next(same, None)
    return known and folder_paths.get_full_path(folder, known)


def portable(name: str) -> str:
    """A name as Linux writes it: Windows has another separator, macOS decomposes accents."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _absence(folder: str, name: str) -> str:
    where = " or ".join(folder_paths.get_folder_paths(folder))
    listed = {portable(other): other for other in folder_paths.get_filename_list(folder)}
    if portable(name) in listed:
        return f"{name!r} in {where} is a link that leads nowhere: repair it, or choose another file"
    # The same file often lies in another subfolder.
    by_stem = {Path(other).name.lower(): listed[other] for other in listed}
    near = difflib.get_close_matches(Path(portable(name)).name.lower(), by_stem, n=1)
    hint = f"the nearest name there is {by_stem[near[0]]!r}" if near else "no file there has a similar name"
    return f"{name!r} is not in {where}, and {hint}: choose a file, or put this one there and press R to refresh"


def stat_token(folder: str, name: str) -> str:
    """Changes whenever the file does: what a node's cache is keyed by."""
    path = _find(folder, name)
    if path is None:
        return "missing"
    stat = os.stat(path)
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"


def written_token(path: str) -> str:
    """Changes whenever the file that a node wrote does; for a file that is gone, always: it has to be made again."""
    return f"{path} {os.stat(path).st_mtime_ns if os.path.exists(path) else time.time_ns()}"


def destinations() -> dict[str, str]:
    """Folders a conversion may write to: a label that means the same on every machine -> the path."""
    labels = {OUTPUT: os.path.join(folder_paths.get_output_directory(), MODELS)}
    for path in folder_paths.get_folder_paths(MODELS):
        inside = Path(path).is_relative_to(folder_paths.models_dir)
        label = Path(path).relative_to(folder_paths.models_dir).as_posix() if inside else path
        if path != labels[OUTPUT]:
            labels[label] = path
    return labels


def output_path(folder: str, name: str, suffix: str) -> str:
    """Full path of a file to be written below `folder`; its folder is made.

    Raises:
        QuantError: `name` leads out of the folder or names another kind of file, or the system refuses it.
    """
    name = portable(name)
    path = os.path.abspath(os.path.join(folder, name))
    # Resolved, so that a symbolic link below the folder leads out too.
    inside = Path(path).resolve().is_relative_to(Path(folder).resolve())
    if os.path.isabs(name) or not inside or path == os.path.abspath(folder):
        raise QuantError(f"output name {name!r}: leads out of {folder}; give a name below that folder")
    if not path.endswith(suffix):
        raise QuantError(f"output name {name!r}: does not end in {suffix}; give a name like model{suffix}")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileNotFoundError):
            os.stat(path)  # names that are too long fail here, not later and without advice
    except OSError as error:
        raise QuantError(f"{path}: cannot be written: {error.strerror}; choose another name or folder") from None
    return path
