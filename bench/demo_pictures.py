"""The demo's pictures: the runs side by side, frame by frame and moving."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

from wanquant.testing.comparison import Run

LABEL = 28
"""Height in pixels of the text above a picture."""
_SIDE, _GAP = 240, 8
"""Pixels of a frame in the moving picture, and between two of them."""
_AMPLIFIED = 6


def still(runs: Sequence[Run]) -> Image.Image:
    """Draw every frame of every run: a column for each run, with its SQNR."""
    columns = [_frames(run) for run in runs]
    width, height = columns[0][0].size
    sheet = Image.new("RGB", (width * len(runs), LABEL + height * len(columns[0])), "white")
    for x, (run, frames) in enumerate(zip(runs, columns, strict=True)):
        _text(sheet, (width * x + 6, 6), f"{run.name}, {run.sqnr_db(runs[0]):.1f} dB" if x else "bfloat16", 14)
        for y, frame in enumerate(frames):
            sheet.paste(frame, (width * x, LABEL + height * y))
    return sheet


def moving(runs: Sequence[Run]) -> list[Image.Image]:
    """Draw the runs over time, and below each its difference from the first run, amplified.

    Returns:
        one picture per frame.
    """
    columns = [_frames(run) for run in runs]
    return [_moment(runs, [column[frame] for column in columns]) for frame in range(len(columns[0]))]


def _moment(runs: Sequence[Run], frames: Sequence[Image.Image]) -> Image.Image:
    step, caption = _SIDE + _GAP, 46
    sheet = Image.new("RGB", (step * len(runs) - _GAP, caption + 2 * _SIDE + LABEL), "white")
    for index, (run, frame) in enumerate(zip(runs, frames, strict=True)):
        x = step * index
        _text(sheet, (x + 4, 2), f"{run.name}, {run.nbytes / 1e6:.1f} MB" if index else "bfloat16", 18)
        _text(sheet, (x + 4, 24), f"{run.sqnr_db(runs[0]):.1f} dB" if index else f"{run.nbytes / 1e6:.1f} MB", 15)
        sheet.paste(_large(frame), (x, caption))
        if index:
            difference = ImageChops.difference(frame, frames[0]).convert("L")
            sheet.paste(_large(difference.point(lambda value: min(255, _AMPLIFIED * value))), (x, caption + _SIDE))
    left = f"Differences from\nbfloat16,\n{_AMPLIFIED} times amplified"
    ImageDraw.Draw(sheet).multiline_text((4, caption + _SIDE + 90), left, "black", ImageFont.load_default(18))
    _text(sheet, (4, caption + 2 * _SIDE + 6), "TinyWan: a Wan of 5.4 million parameters, trained on moving shapes", 15)
    return sheet


def _large(picture: Image.Image) -> Image.Image:
    return picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _frames(run: Run) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in run.outputs["frames"]]


def _text(sheet: Image.Image, place: tuple[int, int], text: str, size: int) -> None:
    ImageDraw.Draw(sheet).text(place, text, "black", ImageFont.load_default(size))
