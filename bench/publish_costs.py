"""What publishing costs at true sizes, calculated from the measured rates of one core."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from ..quant.plan.wan_shapes import SIZES, transformer_shapes
from ..quant.qtype import QTYPES
from .harness import GIB, RESULTS, table

MODELS = 100
SHARED_FOLDER = 10e9 / 8 / GIB
"""The GiB/s of 10 Gbit/s, which a file server often has."""
_CLUSTERS = ((1, 1), (10, 1), (100, 1), (100, 16))
"""(nodes, cores of each)."""


@dataclass(frozen=True)
class Cost:
    """The cost of one 14B model in some types, at effort `best`."""

    types: int
    core_hours: float
    written_gib: float
    read_gib: float

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both, which read the model once."""
        hours, written = self.core_hours + other.core_hours, self.written_gib + other.written_gib
        return Cost(self.types + other.types, hours, written, self.read_gib)


def gguf_cost() -> Cost:
    """Return the cost of the measured types of GGUF."""
    rows = _measured("convert-1.3B.json", "encoders")
    return _cost([(row["best_mws"], QTYPES[row["type"]].bits_per_weight) for row in rows])


def native_cost() -> Cost:
    """Return the cost of ComfyUI's own formats."""
    return _cost([(row["best_mws"], row["bits"]) for row in _measured("convert-native.json", "native")])


def _measured(name: str, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / name).read_text())[part]
    return rows


def _cost(types: list[tuple[float, float]]) -> Cost:
    """Return the cost of types, given the million weights per second and the bits per weight of each."""
    weights = sum(map(math.prod, transformer_shapes(SIZES["14B"]).values()))
    hours = sum(weights / rate / 1e6 / 3600 for rate, _ in types)
    return Cost(len(types), hours, sum(weights * bits / 8 for _, bits in types) / GIB, 2 * weights / GIB)


def model_rows() -> str:
    """Return what one model costs: in GGUF, in ComfyUI's own formats, and in both."""
    costs = (gguf_cost(), native_cost(), gguf_cost() + native_cost())
    parts = {
        "files": [str(cost.types) for cost in costs],
        "encoding, hours of one core": [f"{cost.core_hours:.1f}" for cost in costs],
        "written, GiB": [f"{cost.written_gib:.0f}" for cost in costs],
        "read, GiB": [f"{cost.read_gib:.1f}" for cost in costs],
    }
    return "".join(f"| {' | '.join((name, *cells))} |\n" for name, cells in parts.items())


def cluster_rows() -> str:
    """Return how long 100 models take on clusters, in both kinds of files: encoders, shared folder, and what limits."""
    cost, lines = gguf_cost() + native_cost(), []
    for nodes, cores in _CLUSTERS:
        # Cores beyond one for a model take slices of its recipes, and each slice reads the model again.
        slices = max(1, nodes * cores / MODELS)
        hours = MODELS * cost.core_hours / (nodes * cores)
        moved = MODELS * (slices * cost.read_gib + cost.written_gib)
        of_folder = moved / SHARED_FOLDER / 3600
        limit = "encoders" if hours > of_folder else "shared folder"
        where = f"{nodes} nodes, {cores} {'core' if cores == 1 else 'cores'} each" if nodes > 1 else "1 core"
        cells = (where, f"{hours:.1f}", f"{moved / 1024:.0f}", f"{of_folder:.1f}", limit)
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def text() -> str:
    """Return both tables."""
    model = table(("one 14B model", "GGUF", "ComfyUI's formats", "both"), ())
    cluster = table(("100 models on", "encoding, h", "moved, TiB", "10 Gbit/s folder, h", "limit"), ())
    return f"{model}\n{model_rows()}\n{cluster}\n{cluster_rows()}"
