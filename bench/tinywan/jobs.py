"""Errors of files of TinyWan networks, measured in several processes, and kept in a folder for a later run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wanquant.bench.tasks import Kept
from wanquant.bench.tinywan.encodings import Workshop, methods_of
from wanquant.bench.tinywan.reference import Errors, Reference, checkpoint_hash, load_model, prompts


@dataclass(frozen=True)
class Sample(Errors):
    """The errors of one file."""

    nbytes: int
    weight_sqnr: float
    """SQNR of all quantized weights, in dB."""
    output_sqnr: float
    """SQNR in dB of the outputs of the quantized layers, averaged, for the inputs in the unquantized model.

    It counts the errors of weights alone, also where a format quantizes the inputs.
    """

    @property
    def means(self) -> dict[str, float]:
        return {"layers": self.output_sqnr, **super().means}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Sample:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


Key = tuple[int, str, str]
"""A file: the network by the order of its channels, the recipe, and the method."""


@dataclass(frozen=True)
class Bench:
    """The settings of a measurement.

    Attributes:
        clips: per network.
        captions: that the statistics are collected from.
        folder: where the errors of each file are kept. Another run with the same settings takes them from there.
    """

    clips: int
    captions: int
    folder: Path | None = None

    def measure(self, keys: Sequence[Key], jobs: int = 1) -> dict[Key, Sample]:
        """Measure files, `jobs` at the same time, each in a process with one thread.

        Raises:
            SystemExit: the folder has the errors of other settings.
        """
        found = {key: sample for key in keys if (sample := self._kept(key))}
        groups = _groups([key for key in keys if key not in found], jobs)
        if jobs == 1:
            measured = map(self._measure, groups)
            return found | {key: sample for group in measured for key, sample in group.items()}
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return found | {key: sample for group in pool.map(self._measure, groups) for key, sample in group.items()}

    def _measure(self, keys: Sequence[Key]) -> dict[Key, Sample]:
        """Measure files of one network."""
        samples, order = {}, keys[0][0]
        reference = Reference.sample(self.clips, order)
        with Workshop.open(prompts(self.captions), order) as workshop:
            products = reference.products(workshop.source)
            for key in keys:
                _, recipe, method = key
                file = methods_of(recipe)[method](workshop, recipe)
                samples[key] = Sample(
                    **vars(reference.errors(load_model(file.weights, file.inputs))),
                    nbytes=file.nbytes,
                    weight_sqnr=file.weight_sqnr(workshop.source),
                    output_sqnr=file.output_sqnr(workshop.source, products),
                )
                self._keep(key, samples[key])
        return samples

    @property
    def _results(self) -> Kept | None:
        settings = {"checkpoint": checkpoint_hash(), "clips": self.clips, "captions": self.captions}
        return Kept(self.folder, settings) if self.folder else None

    def _kept(self, key: Key) -> Sample | None:
        found = self._results.get(_name(key)) if self._results else None
        return Sample.from_json(found) if found else None

    def _keep(self, key: Key, sample: Sample) -> None:
        if self._results:
            self._results.put(_name(key), asdict(sample))


def _name(key: Key) -> str:
    order, recipe, method = key
    return f"{order:02}-{recipe}-{method.replace(' ', '')}"


def _groups(keys: Sequence[Key], jobs: int) -> Iterator[list[Key]]:
    """Yield lists of files of one network, as few as keep `jobs` processes busy: each collects the statistics anew."""
    orders = list(dict.fromkeys(order for order, _, _ in keys))
    parts = -(-jobs // max(1, len(orders)))
    for order in orders:
        of_order = [key for key in keys if key[0] == order]
        yield from (of_order[part::parts] for part in range(min(parts, len(of_order))))
