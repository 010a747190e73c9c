"""From the bytes of a sample to a picture of as many channels as the network takes. Must not import torch.

    image file -> RGB, or RGBA with straight colours     .npy -> Bands

Both kinds of pictures have `size`, `crop` and `resize` as Pillow's images do, which is all that `train.crops` asks for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from codec import alpha, arrays, files, images
from codec.errors import ImageError
from codec.files import Source
from codec.shard_scan import Kind, list_shards
from codec.shards import MANIFEST, SampleRef, read_index, read_sample

_RGBA = 4


class Bands:
    """An image of any number of bands, behind the few methods of `PIL.Image.Image` that crops are cut with."""

    def __init__(self, array: np.ndarray) -> None:
        """Wrap (H, W, C) uint8; nothing is copied."""
        self._array = array
        self.height, self.width = array.shape[:2]
        self.size = (self.width, self.height)

    def crop(self, box: tuple[int, int, int, int]) -> Self:
        """Return the part (left, top, right, bottom), in pixels inside the image."""
        left, top, right, bottom = box
        return type(self)(self._array[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Any, **how: Any) -> Self:
        """Resize each band by Pillow to (width, height); `how`: its further options."""
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(self._array, -1, 0)]
        return type(self)(np.stack([np.asarray(band.resize(size, resample, **how)) for band in bands], axis=-1))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return (H, W, C) uint8."""
        return np.array(self._array, dtype=dtype, copy=bool(copy))


Picture = Image.Image | Bands
"""What crops are cut out of."""


def load_picture(sample: SampleRef, channels: int = 3) -> Picture:
    """Read and decode one sample.

    Args:
        sample: where it lies; one of extension npy is an array, anything else an image file.
        channels: C; of an image file 3, its alpha laid over white, or 4, its alpha kept (opaque where it has none).

    Raises:
        ImageError: unreadable, or an array of another number of bands.
    """
    return decode(read_sample(sample), sample.name, sample.ext, channels)


def decode(data: bytes, name: str, ext: str, channels: int) -> Picture:
    """Decode the bytes of a sample; see `load_picture`.

    Args:
        data: of the file.
        name: what error messages call it.
        ext: its extension, lower case, without dot.
        channels: C.
    """
    if ext == arrays.EXTENSION[1:]:
        array = arrays.load(data, name)
        if array.shape[2] != channels:
            raise ImageError(f"{name}: not supported: {array.shape[2]} bands, expected {channels}")
        return Bands(array)
    if channels == 3:
        return images.load_picture(data, name=name)
    with images.errors_as_image_error(name):
        decoded = images.decode(data)
        picture = images.to_srgb(decoded).copy()
        picture.putalpha(255 if decoded.alpha is None else decoded.alpha)
        return picture


def load_array(sample: SampleRef, channels: int = 3) -> np.ndarray:
    """Return the whole sample, (H, W, C) uint8, finished; see `load_picture` and `finished`."""
    picture = load_picture(sample, channels)
    return finished(np.array(picture), picture)


def finished(piece: np.ndarray, picture: Picture) -> np.ndarray:
    """Give hidden pixels of a piece, (h, w, 4) uint8, colours that are smooth to encode; other pieces stay as they are.

    What is stored under alpha 0 is whatever an editor left there. No loss asks for it, but the encoder sees it.

    Args:
        piece: cut out of `picture`.
        picture: tells whether the fourth channel is alpha.
    """
    if isinstance(picture, Bands) or piece.shape[2] != _RGBA or piece[..., 3].all():
        return piece
    colours = alpha.spread_colours(np.ascontiguousarray(piece[..., :3]), np.ascontiguousarray(piece[..., 3]))
    return np.concatenate([colours, piece[..., 3:]], axis=-1)


def read(entry: SampleRef | Source, channels: int = 3) -> np.ndarray:
    """Return a whole image, (H, W, C) uint8, of a shard or of a folder; see `load_array`.

    Raises:
        ImageError: unreadable, or an array of another number of bands.
    """
    if isinstance(entry, SampleRef):
        return load_array(entry, channels)
    ext = entry.path.suffix.lower().removeprefix(".")
    picture = decode(images.read(entry.path), str(entry.path), ext, channels)
    return finished(np.array(picture), picture)


def find(path: Path, channels: int) -> Sequence[SampleRef | Source]:
    """List the images of a shard folder, of a folder, or one file.

    Args:
        path: where to look; a folder with tar files is one of shards.
        channels: with more than four, arrays are looked for in place of image files.

    Raises:
        UsageError: there are none.
    """
    kind: Kind = "image" if channels <= _RGBA else "npy"
    if path.is_dir() and ((path / MANIFEST).is_file() or list_shards(path)):
        return read_index(path, quiet=True, kind=kind)
    return files.find([path], images.EXTENSIONS if kind == "image" else frozenset({arrays.EXTENSION}))
