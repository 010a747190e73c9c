"""A picture of many small images: a row per name, cells side by side, as a PNG."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SHOWN = 64  # pixels; smaller images are enlarged, by whole pixels, to this side at least
_GAP, _HEAD, _NAME = 4, 22, 96  # pixels between cells, above them, and left of them


def sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], title: str = "", *, together: int = 1) -> bytes:
    """Return a PNG.

    Args:
        rows: a name and images, (H, W, 3) uint8, all of one size.
        title: above them; "" = none.
        together: so many cells stand close to each other, before a wider gap.
    """
    height, width = rows[0][1][0].shape[:2]
    scale = max(1, -(-_SHOWN // max(height, width)))
    across, down = width * scale, height * scale + _GAP
    most = max(len(images) for _, images in rows)

    def left_of(column: int) -> int:
        gaps = column + (column // together) * 2 * (together > 1)
        return int(_NAME + column * across + gaps * _GAP)

    top = _HEAD if title else _GAP
    canvas = Image.new("RGB", (left_of(most), top + len(rows) * down), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    if title:
        draw.text((_GAP, 4), title, "#444444", font)
    for number, (name, images) in enumerate(rows):
        at = top + number * down
        draw.text((_GAP, at + down // 2), name[:14], "black", font, anchor="lm")
        for column, pixels in enumerate(images):
            picture = Image.fromarray(pixels).resize((across, height * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (left_of(column), at))
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return file.getvalue()


def by_class(images: Mapping[str, Sequence[np.ndarray]], most: int) -> list[tuple[str, Sequence[np.ndarray]]]:
    """Return rows for `sheet`: of each class the first images, at most so many."""
    return [(name, found[:most]) for name, found in images.items() if len(found)]
