"""The files of one command: one source or all that match a pattern, each with one recipe or several."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import QuantError
from ..sources.baked_lora import LoRA
from ..sources.checkpoint import open_checkpoint
from ..sources.opening import shard_of
from .settings import Target


def list_targets(
    source: Path,
    destination: Path,
    recipes: Sequence[str],
    target_size: float | None = None,
    add_ons: Sequence[Path] = (),
    loras: Sequence[LoRA] = (),
) -> dict[Path, list[Target]]:
    """Return the files to make of each source.

    Every source is opened once, so that a bad one is refused before the first conversion.

    Args:
        source: a file or folder, or a pattern that matches several files.
        destination: a .gguf or .safetensors file, or an existing folder. In a folder, files are named after the
            source, the add-ons and LoRAs, and the recipe or size.
        recipes: the names of the recipes; each makes one file per source.
        target_size: the size of each file in GiB; the recipes then choose the containers.
        add_ons: add-on files that are merged onto each source.
        loras: LoRAs that are added to the weights of each source.

    Raises:
        QuantError: no source, one that cannot be opened, or several results with the same file name.
    """
    sources, is_folder = matching(source), destination.is_dir()
    targets = distinct_targets(destination, recipes, target_size)
    count = len(sources) * len(targets)
    if count > 1 and not is_folder:
        raise QuantError(f"{destination}: not a folder, and {count} files are to be made; give a folder that exists")
    batch: dict[Path, list[Target]] = {}
    stems: dict[str, Path] = {}
    for path in sources:
        with open_checkpoint(path, add_ons, loras) as checkpoint:
            checkpoint.check_complete()
            stem = stem_of(path, add_ons, loras)
        other = stems.setdefault(stem, path)
        if other is not path:
            raise QuantError(
                f"{destination / stem}: would be the name for both {other} and {path}, expected different file names;"
                " convert these sources one by one"
            )
        batch[path] = [in_folder(target, destination, stem) if is_folder else target for target in targets]
    return batch


def distinct_targets(destination: Path, recipes: Sequence[str], target_size: float | None = None) -> list[Target]:
    """Return a target for each file that the recipes mean, all with this destination."""
    targets: dict[str, Target] = {}
    for target in (Target(destination, recipe, target_size) for recipe in recipes):
        # For a size, every recipe of GGUF means the same file.
        is_any_gguf = target_size is not None and not target.is_native
        targets[target.mark] = Target(destination, target_size=target_size) if is_any_gguf else target
    return list(targets.values())


def stem_of(source: Path, add_ons: Sequence[Path] = (), loras: Sequence[LoRA] = ()) -> str:
    """Return what the names of a source's files begin with: its own name, and those of what is added to it."""
    return "-".join(shard_of(part)[0] for part in (source, *add_ons, *(lora.path for lora in loras)))


def in_folder(target: Target, folder: Path, stem: str) -> Target:
    """Return a target under its name in a folder."""
    return replace(target, destination=folder / f"{stem}-{target.mark}{target.suffix}")


def matching(source: Path) -> list[Path]:
    """Return the source itself or the files that match the pattern; one shard stands for its whole series."""
    if source.exists() or not glob.has_magic(str(source)):
        return [source]
    found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    if not found:
        raise QuantError(f"{source}: no file matches; check the pattern and its folder")
    return [path for path in found if shard_of(path)[1] == 1] or found
