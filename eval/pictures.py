"""One picture that shows codecs side by side at equal file size: rows are images, columns codecs, pixels 1:1."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from codec import images
from codec.files import Source, write_atomic
from eval import crops
from eval.baselines import Baseline
from eval.equal_size import at_equal_size
from eval.metrics import psnr
from eval.protocol import Protocol, get
from eval.rd import Model

CROP = 256  # pixels
GAP = 8
CAPTION = 44  # two lines of text

Cell = tuple[np.ndarray, str, str]  # crop and the two lines of its caption


def compare(
    sources: Sequence[Source],
    models: Sequence[Model],
    baselines: Sequence[Baseline],
    bpp: float,
    path: Path,
    *,
    n: int = 3,
    protocol: Protocol | None = None,
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
        protocol: how the images are prepared; None = whole, as they are.
    """
    count = min(n, len(sources))
    chosen = [sources[(2 * index + 1) * len(sources) // (2 * count)] for index in range(count)]
    prepare = (protocol or get("folder")).prepare
    rows = [_row(source, prepare(images.load(source.path)), models, baselines, bpp) for source in chosen]
    title = f"Equal file size along each row, as near to {bpp:g} bpp as it gets; crops at 1:1, PSNR of the whole image"
    write_sheet(rows, title, path)


def write_sheet(rows: Sequence[Sequence[Cell]], title: str, path: Path) -> None:
    """Write a PNG, atomically: a title, and below it rows of captioned crops, all rows of equally many."""
    width = GAP + (CROP + GAP) * len(rows[0])
    canvas = Image.new("RGB", (width, CAPTION + (CROP + CAPTION) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(17), ImageFont.load_default(15)
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


def _row(
    source: Source, image: np.ndarray, models: Sequence[Model], baselines: Sequence[Baseline], bpp: float
) -> list[Cell]:
    height, width = image.shape[:2]
    top, left = busiest(image)

    def crop(picture: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(picture[top : top + CROP, left : left + CROP])

    cells: list[Cell] = [(crop(image), "original", f"{Path(source.relative).name}   {width}x{height}")]
    for coded in at_equal_size(image, models, baselines, bpp):
        figures = f"{coded.bpp:.3f} bpp   {psnr(image, coded.pixels):.2f} dB"
        at = "" if coded.quality is None else f"  q{coded.quality}"
        cells.append((crop(coded.pixels), f"{coded.codec}{at}", figures))
    return cells


def busiest(image: np.ndarray) -> tuple[int, int]:
    """Return top and left of the crop of CROP pixels with the most detail."""
    return crops.busiest(image, min(CROP, image.shape[0]), min(CROP, image.shape[1]))
