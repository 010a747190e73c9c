"""One picture that shows codecs side by side at equal file size: rows are images, columns codecs, pixels 1:1."""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from codec import images
from codec.files import Source, write_atomic
from eval.baselines import Baseline, encode_near
from eval.metrics import psnr
from eval.rd import Model

CROP = 256  # pixels
GAP = 8
CAPTION = 44  # two lines of text
MODEL_QUALITIES = tuple(range(0, 101, 5))

Cell = tuple[np.ndarray, str, str]  # crop and the two lines of its caption


def compare(
    sources: Sequence[Source],
    models: Sequence[Model],
    baselines: Sequence[Baseline],
    bpp: float,
    path: Path,
    n: int = 3,
) -> None:
    """Write a PNG of crops of a few images: the original, each model, each baseline at the nearest equal size.

    The first model's quality nearest to `bpp` sets the size for its image, and all other codecs come as near to it as
    their quality allows; without a model `bpp` itself is the aim.

    Args:
        sources: readable images; n of them are taken at even distances.
        models: asked for qualities 0, 5, ..., 100.
        baselines: searched over their whole range of quality.
        bpp: bits per pixel to aim at.
        path: the PNG, overwritten atomically.
        n: rows at most.
    """
    count = min(n, len(sources))
    chosen = [sources[(2 * index + 1) * len(sources) // (2 * count)] for index in range(count)]
    rows = [_row(source, models, baselines, bpp) for source in chosen]
    width = GAP + (CROP + GAP) * len(rows[0])
    canvas = Image.new("RGB", (width, CAPTION + (CROP + CAPTION) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(17), ImageFont.load_default(15)
    title = f"Equal file size along each row, as near to {bpp:g} bpp as it gets; crops at 1:1, PSNR of the whole image"
    draw.text((GAP, CAPTION // 2), title, "#444444", large, anchor="lm")
    for i, row in enumerate(rows):
        for j, (crop, first, second) in enumerate(row):
            left, top = GAP + j * (CROP + GAP), CAPTION + i * (CROP + CAPTION)
            canvas.paste(Image.fromarray(crop), (left, top))
            draw.text((left, top + CROP + 3), first, "black", large)
            draw.text((left, top + CROP + 22), second, "#444444", small)
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    write_atomic(path, file.getvalue())


def _row(source: Source, models: Sequence[Model], baselines: Sequence[Baseline], bpp: float) -> list[Cell]:
    image = images.load(source.path)
    height, width = image.shape[:2]
    top, left = _busiest(image)

    def crop(picture: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(picture[top : top + CROP, left : left + CROP])

    def cell(label: str, quality: int, data: bytes, decoded: np.ndarray) -> Cell:
        rate = 8 * len(data) / (height * width)
        return crop(decoded), f"{label}  q{quality}", f"{rate:.3f} bpp   {psnr(image, decoded):.2f} dB"

    cells: list[Cell] = [(crop(image), "original", f"{Path(source.relative).name}   {width}x{height}")]
    size_bytes = bpp * height * width / 8
    for index, model in enumerate(models):
        files = model.encode_many(image, MODEL_QUALITIES)
        best = min(range(len(files)), key=lambda k: abs(len(files[k]) - size_bytes))
        cells.append(cell(model.name, MODEL_QUALITIES[best], files[best], model.decode(files[best])))
        size_bytes = len(files[best]) if index == 0 else size_bytes
    for baseline in baselines:
        encode = functools.partial(baseline.encode, image)
        quality, data = encode_near(encode, baseline.quality_range, size_bytes)
        cells.append(cell(baseline.label, quality, data, baseline.decode(data)))
    return cells


def _busiest(image: np.ndarray) -> tuple[int, int]:
    """Return top and left of the crop with the most detail (mean absolute gradient), on a grid of 32 pixels."""
    gray = image.mean(2)
    detail = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    total = np.pad(detail, ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # total[i, j] sums detail[:i, :j]
    best, place = -1.0, (0, 0)
    for top in range(0, max(1, image.shape[0] - CROP + 1), 32):
        for left in range(0, max(1, image.shape[1] - CROP + 1), 32):
            bottom, right = min(top + CROP, total.shape[0]) - 1, min(left + CROP, total.shape[1]) - 1
            value = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
            if value > best:
                best, place = value, (top, left)
    return place
