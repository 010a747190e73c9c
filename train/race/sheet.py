"""The picture of an entrant of a race: a row per class, drawn images beside a real one and its reconstruction."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.race.data import Pictures

COLUMNS = 8  # drawn images in a row
_ROWS = 12
_SHOWN = 96  # pixels; smaller images are enlarged, by whole pixels, to this side at least
_GAP, _HEAD, _NAME = 4, 22, 96  # pixels between cells, above them, and left of them


def sheet(
    pictures: Pictures, reconstructed: Sequence[np.ndarray], labels: Sequence[int], drawn: Sequence[np.ndarray]
) -> bytes:
    """Return a PNG: for each class (the first 12) a held-out image, its reconstruction, and the first drawn images.

    Args:
        pictures: of the race.
        reconstructed: of each held-out picture.
        labels: classes of the drawn images.
        drawn: (H, W, 3) uint8 each. The same cell has the same class and the same number, hence noise, in the sheets
            of all entrants.
    """
    side = pictures.held_out[0].pixels.shape[0]
    scale = max(1, -(-_SHOWN // side))
    cell = side * scale + _GAP
    held_out = pictures.labels(pictures.held_out)
    rows = sorted(set(labels))[:_ROWS]
    canvas = Image.new("RGB", (_NAME + (2 + COLUMNS) * cell + _GAP, _HEAD + len(rows) * cell), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for column, title in enumerate(("real", "reconstructed", "drawn, same seeds for all entrants")):
        draw.text((_NAME + column * cell + _GAP * (column == 2), 4), title, "#444444", font)
    for row, label in enumerate(rows):
        top = _HEAD + row * cell
        draw.text((_GAP, top + cell // 2), pictures.classes[label][:14], "black", font, anchor="lm")
        shown = held_out.index(label)
        cells = [pictures.held_out[shown].pixels, reconstructed[shown]]
        cells += [image for image, its in zip(drawn, labels, strict=True) if its == label][:COLUMNS]
        for column, pixels in enumerate(cells):
            picture = Image.fromarray(pixels).resize((side * scale, side * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (_NAME + column * cell + _GAP * (column >= 2), top))
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return file.getvalue()
