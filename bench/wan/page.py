"""The page of a measurement: a table in Markdown, a chart and the middle frames of all videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from PIL import Image

from ..comparison import Spread
from ..harness import GIB, Row, new_figure, table
from .jobs import UNQUANTIZED, Bench, Job, by_version
from .sampling import SAVED

PAGE, CHART, FRAMES = "README.md", "quality.png", "frames.png"
_COLUMNS = ("file", "GiB", "latent PSNR, dB", "worst frame, dB", "SSIM", "seconds a step", "peak, GiB")
_MOST_ROWS = 6
"""Videos whose middle frames are shown."""


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each file: its errors with their deviation, and its costs, also relative to the first file's."""
    found, first = list[Row](), (0.0, 0.0)
    for version, of_file in by_version(rows):
        costs = fmean(row["seconds_a_step"] for row in of_file), max(row["peak_gib"] for row in of_file)
        first = costs if version == UNQUANTIZED else first
        seconds, peak = (f"{cost:.3g} ({cost / least:.2f}x)" for cost, least in zip(costs, first, strict=True))
        errors = ("", "", "") if version == UNQUANTIZED else _errors(of_file)
        cells = (version, f"{of_file[0]['bytes'] / GIB:.3g}", *errors, seconds, peak)
        found.append(dict(zip(_COLUMNS, cells, strict=True)))
    return found


def _errors(rows: Sequence[Row]) -> tuple[str, str, str]:
    latent, worst = (str(Spread.of([row[key] for row in rows])) for key in ("latent_psnr", "worst_frame_psnr"))
    return latent, worst, f"{fmean(row['ssim'] for row in rows):.4f}"


def text_of(rows: Sequence[Row]) -> str:
    """Return the table of all files."""
    lines = summary(rows)
    return table(list(lines[0]), [list(line.values()) for line in lines])


def write_page(bench: Bench, rows: Sequence[Row], command: str) -> Path:
    """Write page and pictures into the folder of the measurement, and return the path of the page."""
    settings, model = bench.settings, bench.files[UNQUANTIZED].name
    pictures = f"frames that {settings.vae.name} decoded" if settings.vae else "previews of the latents, without a VAE"
    _draw_chart(rows, f"{model} quantized, against the unquantized model", bench.folder / CHART)
    _draw_frames(bench, bench.folder / FRAMES)
    lines = (
        f"# {model}, quantized and not",
        f"Videos of {settings.width}x{settings.height} with {settings.frames} frames, {settings.steps} steps of"
        f" {settings.sampler} ({settings.scheduler}), cfg {settings.cfg:g}. Every file samples the same prompts"
        f" ({len(bench.prompts)}) and seeds ({len(bench.seeds)}). Errors are means over the videos, with their standard"
        f" deviation. SSIM is that of {pictures}. Peaks are those of the GPU, or of the process where there is none."
        " Costs in parentheses are relative to the unquantized model.",
        text_of(rows),
        f"Made by `{command}` on {'; '.join(dict.fromkeys(row['machine'] for row in rows))}.",
        f"![Error by size of the file]({CHART})",
        f"![The middle frame of each video, one column for each file]({FRAMES})",
        "\n".join(f"{number}. {_shown(prompt)}" for number, prompt in enumerate(bench.prompts, 1)),
    )
    path = bench.folder / PAGE
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def _shown(prompt: str) -> str:
    """Return a text as it is, and saved conditionings by their names."""
    return " + ".join(Path(part).stem for part in prompt.split("+")) if prompt.endswith(SAVED) else prompt


def _draw_chart(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the error of each file by its size."""
    figure = new_figure(7, 5)
    axis = figure.add_subplot()
    for version, of_file in by_version([row for row in rows if row["version"] != UNQUANTIZED]):
        place = of_file[0]["bytes"] / GIB, fmean(row["latent_psnr"] for row in of_file)
        axis.plot(*place, color="#0072b2", marker="o")
        axis.annotate(version, place, (6, 4), textcoords="offset points", fontsize=9)
    axis.set(xlabel="file, GiB", ylabel="PSNR of the latent, dB")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.margins(x=0.15, y=0.1)
    figure.savefig(path)


def _draw_frames(bench: Bench, path: Path) -> None:
    """Draw the middle frames: a row for each prompt and seed, a column for each file."""
    videos = [(prompt, seed) for prompt in bench.prompts for seed in bench.seeds][:_MOST_ROWS]
    height = 3 * bench.settings.height / bench.settings.width
    figure = new_figure(3 * len(bench.files), (height + 0.1) * len(videos) + 0.4)
    axes = figure.subplots(len(videos), len(bench.files), squeeze=False)
    for line, (prompt, seed) in zip(axes, videos, strict=True):
        for axis, version in zip(line, bench.files, strict=True):
            axis.imshow(Image.open(bench.picture(Job(version, prompt, seed))), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, version in zip(axes[0], bench.files, strict=True):
        axis.set_title(version, fontsize=11)
    figure.savefig(path)
