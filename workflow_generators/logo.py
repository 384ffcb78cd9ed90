"""The pack's icon and banner, which the registry and ComfyUI-Manager show.

The icon is a W whose first half is drawn with a pen and whose second half is built of blocks: a model, quantized.
"""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .thumbnail import INK, ORANGE, PAPER, SKY, draw

BANNER_SIZE = (1260, 540)
"""21:9, as the registry asks."""
_SIDE = 400
_SCALE = 4  # drawn larger, for smooth edges
_CELLS = 14  # the icon is a grid of so many rows and columns
_PEN = 2  # the width of the line, and the side of a block, in cells
_LINE = ((2.2, 3), (4.9, 11), (7.8, 4.6))  # the first half of the W: (x, y) in cells
_BLOCKS = ((7, 6), (7, 8), (9, 10), (11, 8), (11, 6), (11, 4), (11, 2))  # the second: their upper left corners


def icon(side: int = _SIDE) -> Image.Image:
    """Return the icon: RGBA, side x side pixels, a rounded square with transparent corners."""
    cell = side * _SCALE / _CELLS
    image = Image.new("RGBA", (side * _SCALE, side * _SCALE))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((0, 0, *image.size), radius=2 * cell, fill=INK)
    points = [(x * cell, y * cell) for x, y in _LINE]
    pen.line(points, fill=SKY, width=round(_PEN * cell), joint="curve")
    for x, y in points:
        reach = _PEN * cell / 2
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=SKY)
    gap = 0.08 * cell
    for x, y in _BLOCKS:
        place = (x * cell + gap, y * cell + gap, (x + _PEN) * cell - gap, (y + _PEN) * cell - gap)
        pen.rectangle(place, fill=ORANGE)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """Return the banner: RGB, `BANNER_SIZE` pixels, with the icon, the name, and what the pack does."""
    image = Image.new("RGB", BANNER_SIZE, PAPER)
    mark = icon(170)
    image.paste(mark, (80, 76), mark)
    pen = ImageDraw.Draw(image)
    pen.text((76, 262), "WanQuant", fill=INK, font=ImageFont.load_default(96))
    pen.text((80, 374), "Wan video models\non small GPUs", fill=INK, font=ImageFont.load_default(38))
    image.paste(draw((("file", "any Wan"),), (("small file", "small file"), ("video", "video"))), (590, 98))
    return image
