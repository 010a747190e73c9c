"""From an image to the piece that a network sees, (h, w, C) uint8. Must not import torch.

Random pieces are cut out of Pillow images (or `train.samples.Bands`): only what is cut out becomes an array.
"""

import numpy as np
from PIL import Image

from train.samples import Bands, Picture

_LONGEST = 8  # an image that has to be enlarged is cut to this many times its short side
_REDUCING_GAP = 3.0  # Pillow may halve an image first where that leaves 3 times the final size: much faster, as good


def random_crop(image: Picture, side: int, rng: np.random.Generator, largest: float = 1.0) -> np.ndarray:
    """Cut a square out of an image, at random; an image smaller than that is enlarged first (Lanczos).

    Args:
        image: of C channels.
        side: pixels of the result.
        rng: decides where, and how large.
        largest: the square is up to this many times larger than the result (log-uniform, as far as the image has
            room) and is then reduced (Lanczos); 1 cuts pixels as they are.

    Returns:
        (side, side, C) uint8.
    """
    image = at_least(image, side)
    width, height = image.size
    largest = min(largest, min(height, width) / side)
    if largest > 1:
        return _resized_piece(image, side, side, largest ** rng.random(), rng)
    top, left = corner(height, width, side, rng)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def corner(height: int, width: int, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the (top, left) of a square of `side` pixels in an image of (height, width), neither of them smaller."""
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))


def cover_crop(image: Picture, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Resize an image until it just covers (height, width), and cut off what stands over, at random (Lanczos).

    Returns:
        (height, width, C) uint8.
    """
    return _resized_piece(image, height, width, min(image.height / height, image.width / width), rng)


def centre_cover(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image, (H, W, C) uint8, until it just covers (side, side), and keep its middle: (side, side, C)."""
    height, width = image.shape[:2]
    if height == width == side:
        return image
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    picture = Image.fromarray(image) if image.shape[2] == 3 else Bands(image)
    box = (left, top, left + short, top + short)
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP))


def mirrored(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn left and right around, or not, with equal chance."""
    return image[:, ::-1] if turns(rng) else image


def turns(rng: np.random.Generator) -> bool:
    """Draw whether an image is mirrored."""
    return bool(rng.random() < 0.5)


def centre_crop(image: np.ndarray, side: int, multiple: int) -> np.ndarray:
    """Cut the middle of an image: sides at most `side`, multiples of `multiple` (small images are enlarged to one)."""
    if min(image.shape[:2]) < multiple:
        picture = Image.fromarray(image) if image.shape[2] == 3 else Bands(image)
        image = np.asarray(at_least(picture, multiple))
    height, width = (min(side, n) // multiple * multiple for n in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def at_least(image: Picture, side: int) -> Picture:
    """Return an image whose sides are at least `side` pixels: itself, or enlarged (Lanczos)."""
    if min(image.size) >= side:
        return image
    longest = _LONGEST * min(image.size)  # enlarging a hair-thin strip would fill the memory
    image = image.crop((0, 0, min(image.width, longest), min(image.height, longest)))
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _resized_piece(image: Picture, height: int, width: int, times: float, rng: np.random.Generator) -> np.ndarray:
    """Cut out a random piece of `times` (height, width) pixels, not whole ones, and resize it to (height, width)."""
    y0, y1 = _interval(image.height, height * times, rng)
    x0, x1 = _interval(image.width, width * times, rng)
    box = (x0, y0, x1, y1)
    piece = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP)
    return np.asarray(piece)


def _interval(n: int, length: float, rng: np.random.Generator) -> tuple[float, float]:
    """Place an interval of `length` in [0, n] at random."""
    start = rng.random() * max(0.0, n - length)
    return start, min(float(n), start + length)
