"""What fits on a GPU of 3 to 12 GiB, as `quant advise` says: the README's first table. Simulated, needs no GPU."""

from __future__ import annotations

import logging
from typing import Any

from . import harness

RAM_GIB = 32
GPUS = (
    (3, "Wan 2.1 T2V 14B", (832, 480, 81)),
    (4, "Wan 2.2 T2V A14B", (1280, 720, 81)),
    (6, "Wan 2.1 I2V 14B", (1280, 720, 81)),
    (8, "Wan 2.1 VACE 14B", (1280, 720, 81)),
    (12, "Wan 2.1 T2V 14B", (1280, 720, 81)),
)
"""GiB of video memory, and a demanding model and video for it."""


def rows() -> list[dict[str, Any]]:
    """Return the advice for each GPU."""
    from ..ops.budget.advise import advise
    from ..ops.budget.published import PUBLISHED

    found = []
    for vram, name, video in GPUS:
        (model,) = (each for each in PUBLISHED if each.name == name)
        report = advise(vram, RAM_GIB, [model._replace(videos=(video,))])
        found.append({"gpu_gib": vram, **report.json()["advice"][0]})
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the table."""
    from ..quant.plan.advice import Advice

    advice = Advice(**{key: value for key, value in row.items() if key != "gpu_gib"})
    video = "{}x{}x{}".format(*advice.video)
    return [
        f"{row['gpu_gib']} GiB",
        f"{advice.model}, {video}",
        f"{advice.file} GiB",
        advice.how,
        f"{advice.vram_gib} GiB",
    ]


def main() -> None:
    options = harness.arguments(__doc__, update=harness.RESULTS / "fits-simulated.json").parse_args()
    harness.import_comfyui()
    logging.getLogger().setLevel(logging.ERROR)
    found = rows()
    head = ("your GPU", "model and video", "file", "how", "predicted peak")
    result = {"machine": harness.SIMULATED, "ram_gib": RAM_GIB, "rows": found}
    harness.conclude(options, result, harness.table(head, [cells(row) for row in found]))


if __name__ == "__main__":
    main()
