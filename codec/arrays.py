"""Images of more bands than files of images hold: .npy arrays, (H, W, C) uint8. Must not import torch."""

import io

import numpy as np
import numpy.typing as npt

from codec.errors import ImageError
from codec.images import MAX_PIXELS

EXTENSION = ".npy"
_LEAST_BANDS = 3  # fewer are no image of the models here: those have red, green and blue, or more


def shape(data: bytes, name: str) -> tuple[int, int, int]:
    """Return (H, W, C) of an array from its header.

    Args:
        data: the bytes of the file.
        name: what error messages call it.

    Raises:
        ImageError: not a .npy file, not uint8 (H, W, C) of 3 bands or more, too large, or its length is wrong.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, _, dtype = read(file)
    except Exception as exception:  # the header is a Python literal: its parser raises many types
        reason = (str(exception) or type(exception).__name__).splitlines()[0]
        raise ImageError(f"{name}: damaged: {reason}") from exception
    if dtype != np.uint8 or len(found) != 3 or found[2] < _LEAST_BANDS or 0 in found:
        raise ImageError(
            f"{name}: not supported: {dtype} {found}, expected uint8 (H, W, C) of {_LEAST_BANDS} bands or more"
        )
    if found[0] * found[1] > MAX_PIXELS:
        raise ImageError(f"{name}: {found[1]} x {found[0]} pixels, more than the {MAX_PIXELS} that are allowed")
    expected = found[0] * found[1] * found[2]
    if len(data) - file.tell() != expected:
        raise ImageError(f"{name}: truncated: {len(data) - file.tell()} of {expected} bytes")
    return found


def load(data: bytes, name: str) -> npt.NDArray[np.uint8]:
    """Return the array, (H, W, C) uint8, C-contiguous; raises ImageError as `shape` does."""
    shape(data, name)
    array: npt.NDArray[np.uint8] = np.ascontiguousarray(np.load(io.BytesIO(data), allow_pickle=False))
    return array
