"""A whole publication, as `python -m quant publish` makes it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..conversion.resources import free_memory
from ..errors import QuantError, printable_lines
from ..files.atomic_file import AtomicFile
from ..files.disk_space import temporary_of
from ..units import GIB, counted
from .card import CARD, card, front_matter_of
from .job import Result, make_folder
from .manifest import MANIFEST, SUMS, Manifest, as_text, write_text
from .plan import Plan, PlannedModel, by_reason, make_plan, split
from .processes import OnProgress, run_in_processes
from .ray_cluster import RayCluster, connected
from .request import Request


@dataclass(frozen=True)
class Publication:
    """What a publication made."""

    folder: Path
    results: Sequence[Result]
    warnings: Sequence[str]

    @property
    def ok(self) -> bool:
        return not any(result.why for result in self.results)

    def text(self) -> str:
        made = [result for result in self.results if result.entry and not result.reused]
        reused = sum(result.reused for result in self.results)
        missing = [(result.destination, result.why) for result in self.results if result.why]
        size = sum(result.entry["bytes"] for result in made if result.entry) / GIB
        return printable_lines(
            (
                f"{self.folder}: {counted(len(made), 'file')} made ({size:.3f} GiB),"
                f" {reused} reused, {len(missing)} missing",
                *(f"missing: {text}" for text in by_reason(missing)),
                *(f"warning: {text}" for text in self._notes),
            )
        )

    @property
    def _notes(self) -> list[str]:
        """All sentences on the cluster and the files, each once."""
        return list(dict.fromkeys((*self.warnings, *(text for result in self.results for text in result.warnings))))

    def json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "files": [
                {
                    "path": str(result.destination),
                    "reused": result.reused,
                    "bytes": result.entry["bytes"] if result.entry else None,
                    "why": result.why or None,
                }
                for result in self.results
            ],
            "warnings": self._notes,
        }


def publish(
    request: Request,
    *,
    workers: int | None = None,
    ray: str | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_progress: OnProgress = lambda worker, done, total, name: None,
) -> Publication:
    """Make all files of a request that are not there yet, and write the manifest, the sums and the cards.

    Args:
        request: what is to be published.
        workers: the number of worker processes; as many as cores and memory allow if None.
        ray: the address of a Ray cluster, in place of processes of this machine.
        on_plan: is called with the plan before work starts.
        on_progress: see `run_in_processes`.

    Raises:
        QuantError: the folder cannot be written or another process publishes into it, a pattern matches no file, or
            the cluster cannot be used. What is wrong with a source or a file is in the result.
    """
    request = request.absolute()
    out = request.out
    if workers is not None and workers < 1:
        raise QuantError(f"{workers} workers: expected at least 1; choose another number")
    make_folder(out)
    with AtomicFile(out / MANIFEST, 0, overwrite=True) as file:  # it also locks the folder
        token = uuid.uuid4().hex
        file.write(token.encode())
        file.flush()
        plan, manifest = make_plan(request), Manifest(out)
        on_plan(plan)
        done, models = _done_before(plan, manifest)
        commands = {
            planned.target.destination: request.command(model.source)
            for model in plan.models
            for planned in model.files
        }
        results: list[Result] = []

        def on_results(new: Sequence[Result]) -> None:
            results.extend(new)

        on_results(done)
        warnings: Sequence[str] = ()
        try:
            if ray is None:
                _in_processes(models, workers, on_progress, on_results)
            elif any(not planned.why for model in models for planned in model.files):
                warnings = _on_cluster(ray, models, (temporary_of(out / MANIFEST), token), on_progress, on_results)
        except KeyboardInterrupt:
            raise QuantError(f"{out}: interrupted; start the same command again to go on where it was") from None
        for result in results:
            manifest.add([result], commands[result.destination])
        for name, entries in manifest.models().items():
            path = out / name / CARD
            write_text(path, card(name, entries, front_matter_of(path)))
        write_text(out / SUMS, manifest.sums())
        file.restart(0)
        file.write(as_text(manifest.json()).encode())
        file.commit()
    order = {destination: number for number, destination in enumerate(commands)}
    return Publication(out, sorted(results, key=lambda result: order[result.destination]), warnings)


def _done_before(plan: Plan, manifest: Manifest) -> tuple[list[Result], list[PlannedModel]]:
    """Return the results that are known without work, and the models with the files that are left."""
    known, models = list[Result](), list[PlannedModel]()
    for model in plan.models:
        left = []
        for planned in model.files:
            entry = manifest.entry(planned.target.destination) if planned.exists else None
            if planned.why or entry:
                path, is_reused = planned.target.destination, entry is not None
                known.append(Result(path, entry, planned.why, is_reused, planned.notes))
            else:
                left.append(planned)
        if left:
            models.append(replace(model, files=left))
    return known, models


def _in_processes(
    models: Sequence[PlannedModel],
    workers: int | None,
    on_progress: OnProgress,
    on_results: Callable[[Sequence[Result]], None],
) -> None:
    files = [planned for model in models for planned in model.files]
    if not files:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        held = free_memory() / max(planned.memory for planned in files)
        is_on_cpu = models[0].options.device == "cpu"  # the memory of a GPU holds one, which keeps it busy
        workers = max(1, int(min(cores, held, len(files)))) if is_on_cpu else 1
    jobs = split(models, workers)
    # A job that is alone gets all cores, and never fewer than one core each.
    run_in_processes(jobs, workers, max(1, cores // min(workers, len(jobs))), on_progress, on_results)


def _on_cluster(
    address: str,
    models: Sequence[PlannedModel],
    token: tuple[Path, str],
    on_progress: OnProgress,
    on_results: Callable[[Sequence[Result]], None],
) -> Sequence[str]:
    """Make the files on a Ray cluster, and return sentences on the nodes that could not help."""
    seen = [model.source for model in models] + [model.calibration for model in models if model.calibration]
    with connected(address) as ray:
        cluster = RayCluster(ray, address, seen, token)
        cluster.run(split(models, cluster.cores), on_progress, on_results)
    return cluster.warnings
