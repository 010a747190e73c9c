"""The alpha plane: coded without loss (FORMAT.md section 6), and colours for the pixels that it hides."""

import zlib

import numpy as np
import numpy.typing as npt

from codec.bitstream import inflate
from codec.errors import FormatError

_Plane = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

# Bits of the first byte of a coded plane
_ALONG_ROWS = 1
_ALONG_COLUMNS = 2
_TWO_VALUES = 4
_CONSTANT = 8

_HIDDEN = 128  # the value that all colours get where nothing at all is visible


def pack(alpha: _Plane) -> bytes:
    """Code an alpha plane, (H, W) uint8, without loss: constant, of two values (packed bits), or bytes; deflated."""
    low, high = int(alpha.min()), int(alpha.max())
    if low == high:
        return bytes([_CONSTANT, low])
    two = bool(((alpha == low) | (alpha == high)).all())
    rows = np.packbits(alpha == high, axis=1) if two else alpha
    start = bytes([low, high]) if two else b""
    forms = range(4)
    form = min(forms, key=lambda form: len(_deflated(rows, form, 1)))
    return bytes([form | two * _TWO_VALUES]) + start + _deflated(rows, form, 9)


def unpack(body: bytes, height: int, width: int) -> _Plane:
    """Return the alpha plane, (height, width) uint8, that `pack` coded; memory is bounded by that size.

    Raises:
        FormatError: damaged, or of another size.
    """
    form = body[0] if body else 255
    if form == _CONSTANT and len(body) == 2:
        return np.full((height, width), body[1], dtype=np.uint8)
    if form > 7:
        raise FormatError("damaged: alpha of an unknown form")
    two = bool(form & _TWO_VALUES)
    n_start = 3 if two else 1
    row_bytes = -(-width // 8) if two else width
    flat = inflate(body[n_start:], height * row_bytes, "alpha")
    if len(flat) != height * row_bytes:
        raise FormatError(f"damaged: alpha of {len(flat)} bytes, expected {height * row_bytes}")
    rows: _Plane = np.frombuffer(flat, dtype=np.uint8).reshape(height, row_bytes)
    if form & _ALONG_COLUMNS:
        rows = np.cumsum(rows, axis=0, dtype=np.uint8)
    if form & _ALONG_ROWS:
        rows = np.cumsum(rows, axis=1, dtype=np.uint8)
    if not two:
        return rows if rows.flags.writeable else rows.copy()
    return np.where(np.unpackbits(rows, axis=1, count=width).view(bool), np.uint8(body[2]), np.uint8(body[1]))


def spread_colours(pixels: _Plane, alpha: _Plane) -> _Plane:
    """Give pixels of alpha 0 the colours of the visible ones nearby, so that hidden colours do not bleed into these.

    Means weighted by alpha are taken over 2 x 2 blocks until nothing is hidden, and brought back smoothly (push-pull,
    Gortler et al. 1996, "The Lumigraph": weights are added up and clamped to 1).

    Args:
        pixels: (H, W, 3) uint8.
        alpha: (H, W) uint8.

    Returns:
        (H, W, 3) uint8: the same array where nothing is hidden; pixels of alpha > 0 are never changed.
    """
    hidden = alpha == 0
    if not hidden.any():
        return pixels
    if hidden.all():
        return np.full_like(pixels, _HIDDEN)
    weight = np.divide(alpha, 255, dtype=np.float32)
    result = pixels.copy()
    for channel in range(3):  # one after another: a third of the memory
        plane = _fill(pixels[..., channel].astype(np.float32), weight)
        result[..., channel][hidden] = np.rint(plane[hidden])
    return result


def _deflated(rows: _Plane, form: int, level: int) -> bytes:
    """Deflate the differences mod 256 to the byte on the left (_ALONG_ROWS) and above (_ALONG_COLUMNS)."""
    if form & _ALONG_ROWS:
        rows = np.diff(rows, axis=1, prepend=np.uint8(0))
    if form & _ALONG_COLUMNS:
        rows = np.diff(rows, axis=0, prepend=np.uint8(0))
    return zlib.compress(np.ascontiguousarray(rows).data, level)


def _fill(plane: _Floats, weight: _Floats) -> _Floats:
    """Return (H, W) float32 with values where weight is 0, from those around; weight is positive somewhere."""
    known = weight > 0
    if known.all():
        return plane
    coarse_weight = _sum_blocks(weight)
    mean = np.divide(_sum_blocks(plane * weight), np.maximum(coarse_weight, 1e-9), dtype=np.float32)
    coarse = _fill(mean, np.minimum(coarse_weight, 1, dtype=np.float32))
    smooth = _double(_double(coarse).T).T[: plane.shape[0], : plane.shape[1]]
    return np.where(known, plane, smooth)


def _sum_blocks(plane: _Floats) -> _Floats:
    """(H, W) -> (ceil(H/2), ceil(W/2)), the sum over blocks of 2 x 2."""
    height, width = plane.shape
    even = np.pad(plane, ((0, height % 2), (0, width % 2)))
    return even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]


def _double(plane: _Floats) -> _Floats:
    """Twice as many rows, linearly interpolated: a quarter of the next row's value on each side."""
    padded = np.pad(plane, ((1, 1), (0, 0)), mode="edge")
    doubled = np.empty((2 * plane.shape[0], plane.shape[1]), dtype=np.float32)
    doubled[::2] = 0.75 * plane + 0.25 * padded[:-2]
    doubled[1::2] = 0.75 * plane + 0.25 * padded[2:]
    return doubled
