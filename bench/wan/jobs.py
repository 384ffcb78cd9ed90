"""Videos of every file, prompt and seed, each a job whose result is kept, against those of the unquantized model."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...ops.conditioning import Conditioning
from ...ops.latents.compare import compare_latents
from ...ops.loading.native_model import load_any_model
from ..harness import Row, machine
from ..tasks import Kept
from .sampling import Decoder, Settings, Video, sample, similarity, unload

UNQUANTIZED = "unquantized"


class Job(NamedTuple):
    """One video: of a file, which UNQUANTIZED or its recipe names, for a prompt and a seed."""

    version: str
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        return f"{self.version}-{digest}-{self.seed}"


@dataclass(frozen=True)
class Bench:
    """A measurement in a folder; another run with the same settings goes on where it was.

    Attributes:
        files: by name; the first is the unquantized model.
    """

    folder: Path
    settings: Settings
    files: Mapping[str, Path]
    prompts: Sequence[str]
    seeds: Sequence[int]

    @property
    def jobs(self) -> list[Job]:
        """All jobs, those of a file after each other, and those of the unquantized model first."""
        return [Job(file, prompt, seed) for file in self.files for prompt in self.prompts for seed in self.seeds]

    def run(self, conditionings: Mapping[str, Conditioning]) -> list[Row]:
        """Sample what is missing, and return the results of all jobs in their order.

        Raises:
            QuantError: a file cannot be loaded.
            SystemExit: the folder has results of other settings.
        """
        reference = self.files[UNQUANTIZED]
        source = {"model": reference.name, "model_bytes": reference.stat().st_size}
        kept = Kept(self.folder / "jobs", source | self.settings.json())
        studio = _Studio(self, conditionings)
        rows, jobs = [], self.jobs
        for number, job in enumerate(jobs, 1):
            row = kept.get(job.name)
            if row is None:
                row = studio.measure(job)
                kept.put(job.name, row)
                print(f"{number} of {len(jobs)}: {job.name}", file=sys.stderr, flush=True)
            rows.append(row)
        return rows

    def picture(self, job: Job) -> Path:
        """Return the path of the picture of a video's middle frame."""
        return self.folder / "frames" / f"{job.name}.png"


@dataclass
class _Studio:
    """The model that is loaded, and the decoder."""

    bench: Bench
    conditionings: Mapping[str, Conditioning]
    _version: str = ""
    _model: Any = None
    _decoder: Decoder | None = field(default=None, init=False)

    def measure(self, job: Job) -> Row:
        """Sample a video, keep its middle frame, and return the row of its result."""
        bench = self.bench
        video = self._sampled(job)
        self._decoder = self._decoder or Decoder(bench.settings.vae)
        frames = self._decoder.frames(video.latent)
        row: Row = {**job._asdict(), "bytes": bench.files[job.version].stat().st_size}
        row["machine"] = ", ".join([*_gpu_names(), machine()])
        row |= {"seconds_a_step": video.seconds_a_step, "peak_gib": video.peak_gib}
        reference = bench.folder / "references" / f"{job._replace(version=UNQUANTIZED).name}.safetensors"
        if job.version == UNQUANTIZED:
            _save(reference, {"latent": video.latent, "frames": frames})
        else:
            expected = load_file(reference)
            compared = compare_latents(expected["latent"], video.latent)
            row |= {"latent_psnr": compared.psnr, "worst_frame_psnr": min(compared.frame_psnr)}
            row["ssim"] = similarity(expected["frames"], frames)
        bench.picture(job).parent.mkdir(exist_ok=True)
        Image.fromarray(frames[len(frames) // 2].numpy()).save(bench.picture(job))
        return row

    def _sampled(self, job: Job) -> Video:
        if self._version != job.version:
            self._model = None
        unload()  # the decoder, too
        if self._model is None:
            self._model, self._version = load_any_model(self.bench.files[job.version]), job.version
        prompts = self.conditionings[job.prompt], self.conditionings[self.bench.settings.negative or job.prompt]
        return sample(self._model, self.bench.settings, *prompts, job.seed)


def _gpu_names() -> list[str]:
    return [torch.cuda.get_device_name()] if torch.cuda.is_available() else []


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file that is complete or not there, before the job that says so."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(path)


def by_version(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the name and the results of each file."""
    for version in dict.fromkeys(row["version"] for row in rows):
        yield version, [row for row in rows if row["version"] == version]
