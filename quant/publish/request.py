"""The request for a publication: its sources, its recipes, and the command that they come from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..conversion.batch import distinct_targets, in_folder, matching
from ..conversion.settings import Target
from ..errors import QuantError
from ..plan.recipe import RECIPES
from ..safetensors.header import read_any_header
from .job import Options

ALL = tuple(name for name, recipe in RECIPES.items() if not recipe.experimental)
"""The recipes that `all` means."""


@dataclass(frozen=True)
class Request:
    """What is to be published."""

    sources: Sequence[Path]
    """Files, folders of shards, or patterns."""
    out: Path
    recipes: Sequence[str]
    target_sizes: Sequence[float] = ()
    """GiB; each recipe then says which container its files of these sizes have, as in a conversion."""
    calibrations: Path | None = None
    """A folder with the calibration `STEM.safetensors` of each source."""
    options: Options = field(default_factory=Options)

    def absolute(self) -> Request:
        """Return the request with absolute paths, which mean the same on other machines of a cluster."""
        add_ons = tuple(path.absolute() for path in self.options.add_ons)
        loras = tuple(lora._replace(path=lora.path.absolute()) for lora in self.options.loras)
        return replace(
            self,
            sources=[path.absolute() for path in self.sources],
            out=self.out.absolute(),
            calibrations=self.calibrations.absolute() if self.calibrations else None,
            options=replace(self.options, add_ons=add_ons, loras=loras),
        )

    def paths(self) -> list[Path]:
        """Return the path of each source, once.

        A pattern that also matches the results of earlier runs does not make them sources.

        Raises:
            QuantError: a pattern that no file matches.
        """
        paths = dict[Path, None]()
        for source in self.sources:
            found = matching(source)
            paths.update(dict.fromkeys([path for path in found if not self._is_result(path)] or found))
        return list(paths)

    def _is_result(self, path: Path) -> bool:
        """Return whether a file is where a publication puts its results, and is one."""
        folder = path.parent
        if folder.parent.resolve() != self.out.resolve() or not path.name.startswith(f"{folder.name}-"):
            return False
        with suppress(QuantError):
            return "wanquant.version" in read_any_header(path).metadata
        return False

    def targets(self, stem: str) -> list[Target]:
        """Return the files of a source, in a folder of its own."""
        folder = self.out / stem
        sizes: Sequence[float | None] = list(dict.fromkeys(self.target_sizes)) or (None,)
        return [
            in_folder(target, folder, stem) for size in sizes for target in distinct_targets(folder, self.recipes, size)
        ]

    def command(self, source: Path) -> str:
        """Return the command that makes the files of a source, with the names of files but not their folders."""
        options = self.options
        recipes = "all" if tuple(self.recipes) == ALL else ",".join(self.recipes)
        words = ["python", "-m", "quant", "publish", _argument(source), "OUT", "--recipe", recipes]
        if self.target_sizes:
            words += ["--target-size", ",".join(f"{size:g}" for size in self.target_sizes)]
        words += ["--calibrate-from", _argument(self.calibrations)] if self.calibrations else []
        words += [] if options.effort == "best" else ["--effort", options.effort]
        words += [] if options.device == "cpu" else ["--device", options.device]
        words += ["--allow-non-finite"] if options.allow_non_finite else []
        words += [word for path in options.add_ons for word in ("--module", _argument(path))]
        words += [word for lora in options.loras for word in ("--lora", f"{_argument(lora.path)}:{lora.strength:g}")]
        return shlex.join(words)


def _argument(path: Path) -> str:
    """Return the name of a file as an argument that is not taken for an option."""
    return f"./{path.name}" if path.name.startswith("-") else path.name
