"""Shard, the name of one of the files that a checkpoint is split into, such as `wan-00001-of-00003.safetensors`.

A variant may stand before the suffix: `wan-00001-of-00003.fp16.safetensors`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ..errors import QuantError

_NAME = re.compile(
    r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>(?i:(\.\w{1,16})?\.safetensors|\.gguf)|)"
)


MAX_SHARDS = 1000
"""The most files of a checkpoint; the published ones have up to 14."""


class Shard(NamedTuple):
    """The parts of the name of a shard."""

    stem: str
    number: int
    """The number of this shard, counted from 1."""
    total: int
    suffix: str

    @classmethod
    def parse(cls, name: str) -> Shard | None:
        """Return the parts of a file name, with or without its suffix, or None if it is not that of a shard."""
        match = _NAME.fullmatch(name)
        return match and cls(match["stem"], int(match["number"]), int(match["count"]), match["suffix"])

    def series(self, folder: Path) -> list[Path]:
        """Return the paths that all shards have in a folder, whether they exist or not.

        Raises:
            QuantError: more files than a checkpoint has.
        """
        check_shards(folder, self.total)
        numbers = range(1, self.total + 1)
        return [folder / f"{self.stem}-{number:05}-of-{self.total:05}{self.suffix}" for number in numbers]


def check_shards(where: Path, shards: int) -> None:
    """Refuse a number of shards that no checkpoint has.

    Raises:
        QuantError: more than `MAX_SHARDS`.
    """
    if shards > MAX_SHARDS:
        raise QuantError(f"{where}: {shards} shards, expected at most {MAX_SHARDS}; download the checkpoint again")
