"""The folders that the nodes read from and write to, under the host's own names for them."""

from __future__ import annotations

import difflib
import os
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import folder_paths

from ..quant import QuantError
from ..quant.errors import printable
from ..quant.files.shards import Shard
from ..quant.sources.t5 import SPIECE_FILE

MODELS = "diffusion_models"
CHECKPOINTS = "checkpoints"
ENCODERS = "text_encoders"
# Other GGUF packs use the same names, so that an entry in extra_model_paths.yaml works for all of them.
GGUF = "unet_gguf"
GGUF_ENCODERS = "clip_gguf"
PATCHES = "model_patches"
GGUF_PATCHES = "model_patches_gguf"
CONDITIONING = "conditioning"
IMPORTANCE = "importance"
IMPORTANCE_SUFFIXES = (".gguf", ".dat", ".safetensors")
BLOCKS_SUFFIX = ".blocks.safetensors"
"""Of what Tune to GGUF needs, in the same folder."""
LORAS = "loras"
GGUF_LORAS = "loras_gguf"
OUTPUT = "output"
_MAX_NAME_CHARS, _MAX_PATH_CHARS, _MAX_SUBFOLDERS = 200, 1000, 20
NONE = "none"
"""The list entry that chooses no file."""


def register_folders() -> None:
    """Make the host list .gguf files beside its own models and LoRAs, saved conditionings and importance matrices."""
    for name, gguf_name in ((MODELS, GGUF), (ENCODERS, GGUF_ENCODERS), (LORAS, GGUF_LORAS)):
        shared, _ = folder_paths.folder_names_and_paths[name]
        paths, extensions = folder_paths.folder_names_and_paths.get(gguf_name, (shared, set()))
        if paths is not shared:
            # The user or another pack configured these folders: keep them, ahead of the host's.
            shared = [*paths, *(path for path in shared if path not in paths)]
        folder_paths.folder_names_and_paths[gguf_name] = (shared, {*extensions, ".gguf"})
    # Many people keep them among the models, because other packs load them from there.
    patches, _ = folder_paths.folder_names_and_paths.get(PATCHES, ([], set()))
    models, _ = folder_paths.folder_names_and_paths[GGUF]
    folder_paths.folder_names_and_paths[GGUF_PATCHES] = ([*patches, *models], {".gguf"})
    parents = (folder_paths.models_dir, folder_paths.get_output_directory())
    for name, suffixes in ((CONDITIONING, {".safetensors"}), (IMPORTANCE, {*IMPORTANCE_SUFFIXES})):
        folder_paths.folder_names_and_paths[name] = ([os.path.join(p, name) for p in parents], suffixes)


def source_names() -> list[str]:
    """List the checkpoints that can be converted. The first file of a sharded one stands for all its files."""
    listed = (*folder_paths.get_filename_list(MODELS), *_checkpoints())
    dense = [name for name in listed if _has_suffix(name, ".safetensors")]
    shards = [(name, Shard.parse(name)) for name in dict.fromkeys((*dense, *folder_paths.get_filename_list(GGUF)))]
    return [name for name, shard in shards if shard is None or shard.number == 1]


def source_folder(name: str | None) -> str:
    """Return the name of the folder list that contains a checkpoint; of two files with the same name, the model's."""
    if not isinstance(name, str):  # linked, or refused by `check_names`
        return MODELS
    if _has_suffix(name, ".gguf"):
        return GGUF
    elsewhere = _find(MODELS, name) is None and bool(_checkpoints()) and _find(CHECKPOINTS, name)
    return CHECKPOINTS if elsewhere else MODELS


def source_stem(name: str) -> str:
    """Return a checkpoint's name with its subfolder, but without its suffix and shard number."""
    name = portable(name)
    shard = Shard.parse(name)
    return shard.stem if shard else without_suffix(name)


def without_suffix(name: str) -> str:
    """Return a file name without the suffix of a model file, in small letters or capitals."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in (".safetensors", ".gguf") else name


def _has_suffix(name: str, suffix: str) -> bool:
    return name.lower().endswith(suffix)


def _checkpoints() -> list[str]:
    """Return the files in the host's folder of whole checkpoints, in which the transformer has a prefix."""
    known = CHECKPOINTS in folder_paths.folder_names_and_paths
    return list(folder_paths.get_filename_list(CHECKPOINTS)) if known else []


def model_path(folder: str, name: str) -> str:
    """Return the full path of a listed file, whose name may come from a graph saved on another operating system.

    Raises:
        QuantError: there is no such file. The message suggests the most similar name.
    """
    path = _find(folder, name)
    if path is None:
        raise QuantError(_absence(folder, name))
    return read_path(path)


def check_names(*named: tuple[str, str | None]) -> bool | str:
    """Return True if every (folder, name) pair is a file, else a message about the first that is not.

    A name is None while it is linked, and is not checked then. The result is for `validate_inputs`. The host does not
    check a combo that is an argument there, and by itself would accept only its own system's path separators.
    """
    known = ((folder, name) for folder, name in named if name is not None)
    try:
        return next((_absence(folder, name) for folder, name in known if _find(folder, name) is None), True)
    except QuantError as error:
        return str(error)


def _find(folder: str, name: str) -> str | None:
    listed = folder_paths.get_filename_list(folder)
    same = (other for other in listed if portable(other) == portable(name))
    known = name if name in listed else next(same, None)
    return known and folder_paths.get_full_path(folder, known)


def portable(name: str) -> str:
    """Return a name in the form of Linux: Windows has another separator, and macOS decomposes accents.

    Raises:
        QuantError: it is not a text, since a prompt over the API may have null, a number or a table in its place.
    """
    if not isinstance(name, str):
        raise QuantError(f"{name!r:.40} in place of the name of a file, expected text: choose or type a name")
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _absence(folder: str, name: str) -> str:
    where = " or ".join(folder_paths.get_folder_paths(folder))
    listed = {portable(other): other for other in folder_paths.get_filename_list(folder)}
    if portable(name) in listed:
        return printable(f"{name!r} in {where} is a broken link: repair it, or choose another file")
    # Compare file names only, because the same file is often in another subfolder.
    by_stem = {Path(other).name.lower(): listed[other] for other in listed}
    near = difflib.get_close_matches(portable(name).rpartition("/")[2][:_MAX_NAME_CHARS].lower(), by_stem, n=1)
    hint = f"the nearest name there is {by_stem[near[0]]!r}" if near else "no file there has a similar name"
    shown = printable(repr(name), _MAX_NAME_CHARS)
    return printable(
        f"{shown} is not in {where}, and {hint}: choose a file, or put this one there and press R to refresh"
    )


def stat_token(folder: str, name: str | None) -> str:
    """Return a cache key for a node that reads a file. It changes whenever the file does.

    A name is None while it is linked. Its key changes whenever a file changes that any node has read.
    """
    if name is None:
        return _READS.token()
    path = _find(folder, name)
    return "missing" if path is None else path_token(path)


def path_token(path: str | None) -> str:
    """Return a cache key like `stat_token` for a path, which is None while it is linked.

    It changes with the other parts of a split file too, and with a tokenizer beside it.
    """
    return _READS.token() if path is None else " ".join((path, *map(_status, files_of(path))))


def files_of(path: str) -> tuple[Path, ...]:
    """Return the files that are read with a path: the parts of a split file, and a tokenizer beside it, if any."""
    shard = Shard.parse(portable(path).rpartition("/")[2])
    parts = shard.series(Path(path).parent) if shard else [Path(path)]
    return (*parts, Path(path).parent / SPIECE_FILE)


def read_path(path: str, *suffixes: str) -> str:
    """Return a path that a node is about to read, and remember the state of its file for nodes with linked inputs.

    Args:
        suffixes: those of the files that the node reads. A typed path must end in one, because it could be any file.

    Raises:
        QuantError: the path has another suffix.
    """
    if suffixes and not portable(path).lower().endswith(suffixes):
        raise QuantError(f"{path}: not a name that ends in {' or '.join(suffixes)}; connect the path of such a file")
    _READS.add(path)
    return path


def _status(part: Path) -> str:
    try:
        status = part.stat()
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


class _Reads:
    """The state of each file that a node has read, and how often any of them was found changed.

    The host asks a node for its cache key before the values of linked inputs are known.
    """

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._changes = 0

    def add(self, path: str) -> None:
        self._states[path] = path_token(path)

    def token(self) -> str:
        now = {path: path_token(path) for path in self._states}
        self._changes += now != self._states
        self._states = now
        return f"linked {self._changes}"


_READS = _Reads()


def written_token(path: str) -> str:
    """Return a cache key for a node that writes a file. It changes with the file, and always if the file is missing."""
    return f"{path} {os.stat(path).st_mtime_ns if os.path.exists(path) else time.time_ns()}"


def destinations() -> dict[str, str]:
    """Return the folders that nodes may write to, by labels that mean the same on every machine."""
    labels = {OUTPUT: os.path.join(folder_paths.get_output_directory(), MODELS)}
    for path in folder_paths.get_folder_paths(MODELS):
        inside = Path(path).is_relative_to(folder_paths.models_dir)
        label = Path(path).relative_to(folder_paths.models_dir).as_posix() if inside else path
        if path != labels[OUTPUT]:
            labels[label] = path
    return labels


def within(folder: str, name: str) -> str:
    """Return a default name for a file below `folder`: `name`, or its last part if a linked subfolder leads outside."""
    return name if _leads_inside(folder, name) else os.path.basename(name)


def destination(label: str) -> str:
    """Return one of `destinations`.

    Raises:
        QuantError: there is none with this label.
    """
    folders = destinations()
    if not isinstance(label, str) or label not in folders:
        raise QuantError(f"folder {label!r:.80} is unknown, expected one of {', '.join(folders)}: choose one")
    return folders[label]


def output_path(folder: str, name: str, suffix: str) -> str:
    """Return the full path of a file to write below `folder`, and create the folder that will contain it.

    Raises:
        QuantError: `name` is not a text, has unprintable characters or too many of them, is outside `folder`, lacks
            `suffix`, or is refused by the operating system.
    """
    name = portable(name)
    if not name.isprintable() or len(name) > _MAX_PATH_CHARS or name.count("/") > _MAX_SUBFOLDERS:
        raise QuantError(
            f"output name {printable(repr(name), _MAX_NAME_CHARS)} of {len(name)} characters: expected up to"
            f" {_MAX_PATH_CHARS} printable ones and {_MAX_SUBFOLDERS} subfolders: give a shorter name of letters and"
            " digits"
        )
    path = os.path.abspath(os.path.join(folder, name))
    if os.path.isabs(name) or not _leads_inside(folder, name) or path == os.path.abspath(folder):
        raise QuantError(f"output name {name!r} is outside {folder}: give a name below that folder")
    if not _has_suffix(path, suffix):
        raise QuantError(f"output name {name!r} does not end in {suffix}: give a name like model{suffix}")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileNotFoundError):
            os.stat(path)  # raises for a name that is too long, while advice can still be given
    except OSError as error:
        raise QuantError(f"{path}: cannot be written: {error.strerror}; choose another name or folder") from None
    return path


def _leads_inside(folder: str, name: str) -> bool:
    """Return whether a name below a folder leads into it, after links are resolved."""
    try:
        return Path(os.path.realpath(os.path.join(folder, name))).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise QuantError(f"name {name!r:.80} cannot be used ({reason}): choose another name") from None
