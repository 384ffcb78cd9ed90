"""Main memory of a Wan 2.2 pair of experts, sampled one after the other under limits on the process (Linux).

The files are mapped. The first limit is on all other memory: whatever the process allocates beyond `--allowance` fails.
The second is that of a machine with `--ram` GiB: a control group whose memory includes the pages of files that the
system keeps. Where it is full, the system drops such pages, and reads them again. At first the files are on disk only.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..quant.plan.recipe import RECIPES
from ..quant.plan.wan_files import tensor_specs
from ..quant.plan.wan_shapes import SIZES
from ..testing.hosts import ROOT
from . import harness
from .load import write_model

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

LATENT, PROMPT = (1, 16, 1, 8, 8), (1, 16, 4096)
# The folder of all control groups, and the files in each with its limit and with what it holds: of versions 1 and 2.
GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
)


@contextmanager
def limited_ram(nbytes: int) -> Iterator[Path]:
    """Keep this process and the pages of files that it reads within `nbytes`.

    Yields:
        The file that tells how many bytes they are.
    """
    # Of the hybrid of both, memory is in version 1.
    root, limit, usage = next((group for group in GROUPS if group[0].is_dir()), GROUPS[-1])
    group, me = root / f"wanquant-{os.getpid()}", str(os.getpid())
    paths = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    home = root / next(path for kind, path in sorted(paths, reverse=True) if kind in ("memory", "")).lstrip("/")
    try:
        group.mkdir()
        (group / limit).write_text(str(nbytes))
        (group / "cgroup.procs").write_text(me)
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        hint = "run as root, outside a container"
        raise SystemExit(f"{group}: expected a control group with a limit of memory, got {error}; {hint}") from None
    try:
        yield group / usage
    finally:
        (home / "cgroup.procs").write_text(me)
        group.rmdir()


def forget(file: Path) -> None:
    """Let the system drop the pages of a file, so that the next reader reads from disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """Return the bytes that this process has made the system read from disk."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return next(int(value) for key, value in lines if key == "read_bytes")


def status() -> dict[str, int]:
    """Return the bytes of this process: allocated (VmData, with private maps), and resident by kind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[key].split()[0]) << 10 for key in ("VmData", "RssAnon", "RssFile")}


def sample(expert: ModelPatcher) -> dict[str, float]:
    """Sample one step, and return its seconds and the GiB that it read from disk."""
    import comfy.sample

    before = bytes_read()
    noise, prompts = torch.zeros(LATENT), [[[torch.zeros(PROMPT), {}]]] * 2
    started = time.monotonic()
    out = comfy.sample.sample(expert, noise, 1, 1.0, "euler", "simple", *prompts, noise, disable_pbar=True, seed=0)
    if not out.isfinite().all():
        raise SystemExit("the sampled latent holds NaN or infinity, expected finite numbers")
    read = round((bytes_read() - before) / harness.GIB, 2)
    return {"seconds": round(time.monotonic() - started, 1), "read_gib": read}


def measure(files: list[Path], allowance: float, usage: Path) -> dict[str, Any]:
    """Load both experts and sample each twice within `allowance` GiB of allocations, and return what they took.

    Args:
        usage: of `limited_ram`.
    """
    from ..ops.budget.expert_pair import load_expert_pair

    mapped, before = sum(file.stat().st_size for file in files), status()
    limit = before["VmData"] + mapped + round(allowance * harness.GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    # ComfyUI runs its nodes in inference mode.
    with (
        torch.inference_mode(),
        harness.sampled(lambda: status()["RssAnon"], 0.05) as anonymous,
        harness.sampled(lambda: int(usage.read_text()), 0.05) as held,
    ):
        *experts, _ = load_expert_pair(*files)
        steps = [sample(expert) for expert in experts for _ in range(2)]
    sizes = {"mapped_gib": mapped, "before_gib": before["RssAnon"], "peak_anonymous_gib": max(anonymous)}
    sizes["peak_gib"] = max(held)
    return {"steps": steps} | {key: round(nbytes / harness.GIB, 2) for key, nbytes in sizes.items()}


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "experts-ram.json")
    parser.add_argument("--recipe", default="Q4_K_M", choices=RECIPES)
    parser.add_argument("--blocks", type=int, default=40, help="transformer blocks of each file; 40 are a whole 14B")
    parser.add_argument("--allowance", type=float, default=2, help="GiB that the process may allocate beside the files")
    parser.add_argument("--ram", type=float, default=14.9, help="GiB of main memory; 14.9 are 16 GB")
    options = parser.parse_args()
    folder = ROOT / "out" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    harness.import_comfyui()
    specs = tensor_specs(SIZES["14B"]._replace(layers=options.blocks), RECIPES[options.recipe])
    files = [folder / f"expert-{name}.gguf" for name in ("high", "low")]
    try:
        with limited_ram(round(options.ram * harness.GIB)) as usage:
            for file in files:
                forget(write_model(file, specs))
            found = measure(files, options.allowance, usage)
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    row = {"recipe": options.recipe, "blocks": options.blocks, "ram_gib": options.ram}
    row |= {"allowance_gib": options.allowance, **found}
    text = f"""{harness.machine()}
two experts of {options.blocks} blocks in {options.recipe}: {found["mapped_gib"]} GiB mapped
allocations beside these: limited to {options.allowance} GiB more than the {found["before_gib"]} before loading
peak of the memory that is not mapped: {found["peak_anonymous_gib"]} GiB
peak with the pages of files that the system keeps: {found["peak_gib"]} of {options.ram} GiB
steps, two of each expert: {found["steps"]}"""
    harness.conclude(options, {"machine": harness.machine(), "rows": [row]}, text)


if __name__ == "__main__":
    main()
