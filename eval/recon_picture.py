"""One picture of originals beside what each autoencoder made of them: rows are images, columns models, pixels 1:1."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codec import images
from codec.files import Source
from eval.metrics import psnr
from eval.pictures import CROP, Cell, busiest, write_sheet
from eval.protocol import Protocol
from eval.recon import Reconstructor

MAX_CAPTION = 26  # characters that fit under a crop
AMPLIFIED = 8


def write_picture(
    sources: Sequence[Source],
    names: Sequence[str],
    models: Sequence[Reconstructor],
    protocol: Protocol,
    path: Path,
    n: int = 4,
) -> None:
    """Write a PNG of crops of a few images: the original, and of each model the reconstruction and its difference.

    Args:
        sources: readable images of which n are taken at even distances.
        names: theirs, as the models were given them in the measurement.
        models: reconstruct once more.
        protocol: prepares the images.
        path: the PNG, overwritten atomically.
        n: rows at most.
    """
    count = min(n, len(sources))
    chosen = [(2 * index + 1) * len(sources) // (2 * count) for index in range(count)]
    rows = [_row(names[index], protocol.prepare(images.load(sources[index].path)), models) for index in chosen]
    title = f"{protocol.name}: originals, reconstructions, and {AMPLIFIED} x their difference around gray; pixels 1:1"
    write_sheet(rows, title, path)


def _row(name: str, x: np.ndarray, models: Sequence[Reconstructor]) -> list[Cell]:
    top, left = busiest(x)

    def crop(picture: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(picture[top : top + CROP, left : left + CROP])

    cells: list[Cell] = [(crop(x), _short(Path(name).name), f"{x.shape[1]}x{x.shape[0]}")]
    for model in models:
        x_hat = model(name, x).x_hat
        difference = np.clip(128 + AMPLIFIED * (x_hat.astype(np.int32) - x), 0, 255).astype(np.uint8)
        cells.append((crop(x_hat), _short(model.name), f"{psnr(x, x_hat):.2f} dB"))
        cells.append((crop(difference), f"difference x {AMPLIFIED}", _short(model.name)))
    return cells


def _short(text: str) -> str:
    return text if len(text) <= MAX_CAPTION else "..." + text[3 - MAX_CAPTION :]
