"""RAW mode: integer latents as packed bits, per channel a least index and a width; FORMAT.md section 5.1.

No tables, hence no worst case: what no table expects is never dearer than this. `pack` and `unpack` serve FIXED mode
of codebook indices too. Must not import torch.
"""

import numpy as np

from codec.errors import FormatError
from codec.quantiser import INDEX_LIMIT

_WIDTH_BITS = 5
_LEAST_BITS = INDEX_LIMIT.bit_length() + 1  # the least index + INDEX_LIMIT, 0 .. 2 * INDEX_LIMIT
_MAX_WIDTH = _LEAST_BITS


def encode(indices: np.ndarray) -> bytes:
    """Pack (D, h, w) int32 integer latents within +-INDEX_LIMIT."""
    parts = []
    for plane in indices.reshape(indices.shape[0], -1).astype(np.int64):
        least = int(plane.min())
        width = (int(plane.max()) - least).bit_length()
        parts += [_bits_of(np.array([width]), _WIDTH_BITS), _bits_of(np.array([least + INDEX_LIMIT]), _LEAST_BITS)]
        parts.append(_bits_of(plane - least, width))
    return np.packbits(np.concatenate(parts)).tobytes()


def decode(payload: bytes, channels: int, shape: tuple[int, int]) -> np.ndarray:
    """Read (channels, h, w) int32 back.

    Raises:
        FormatError: the payload is too short or too long, a width or an index is out of range, or a bit of the padding
            is set.
    """
    count = shape[0] * shape[1]
    n_bits = 8 * len(payload)
    at = 0
    data = np.frombuffer(payload, dtype=np.uint8)

    def read(number: int, width: int) -> np.ndarray:
        nonlocal at
        end = at + number * width
        if end > n_bits:
            raise FormatError("damaged payload: packed indices end early")
        bits = np.unpackbits(data[at // 8 : -(-end // 8)])[at % 8 :][: end - at].reshape(number, width)
        at = end
        values = np.zeros(number, dtype=np.int64)
        for column in range(width):
            values = (values << 1) | bits[:, column]
        return values

    planes = []
    for _ in range(channels):
        width = int(read(1, _WIDTH_BITS)[0])
        least = int(read(1, _LEAST_BITS)[0]) - INDEX_LIMIT
        if width > _MAX_WIDTH:
            raise FormatError(f"damaged payload: packed indices of {width} bits, at most {_MAX_WIDTH}")
        plane = read(count, width) + least
        if int(plane.max()) > INDEX_LIMIT:
            raise FormatError(f"damaged payload: an index is beyond {INDEX_LIMIT}")
        planes.append(plane.astype(np.int32).reshape(shape))
    if n_bits - at >= 8 or read(1, n_bits - at)[0]:
        raise FormatError("damaged payload: bytes left over after the last latent")
    return np.stack(planes)


def size_bits(indices: np.ndarray) -> int:
    """Return the length of `encode(indices)` in bits, before it is padded to a whole byte."""
    planes = indices.reshape(indices.shape[0], -1)
    spans = (planes.max(axis=1).astype(np.int64) - planes.min(axis=1)).tolist()
    return sum(_WIDTH_BITS + _LEAST_BITS + planes.shape[1] * span.bit_length() for span in spans)


def pack(values: np.ndarray, width: int) -> bytes:
    """Return (N,) numbers in [0, 2^width) as bits, filled up with zeros to whole bytes."""
    return np.packbits(_bits_of(values.astype(np.int64), width)).tobytes()


def unpack(payload: bytes, count: int, width: int) -> np.ndarray:
    """Read the (count,) int64 numbers of `pack` back.

    Raises:
        FormatError: the payload is too short or too long, or a bit of the padding is set.
    """
    if len(payload) != -(-count * width // 8):
        raise FormatError(f"damaged payload: {len(payload)} bytes of packed indices, expected {-(-count * width // 8)}")
    bits = np.unpackbits(np.frombuffer(payload, dtype=np.uint8))
    if bits[count * width :].any():
        raise FormatError("damaged payload: bits left over after the last index")
    columns = bits[: count * width].reshape(count, width)
    values = np.zeros(count, dtype=np.int64)
    for column in range(width):
        values = (values << 1) | columns[:, column]
    return values


def _bits_of(values: np.ndarray, width: int) -> np.ndarray:
    """Return the bits of (N,) values, most significant first, (N * width,) uint8."""
    shifts = np.arange(width - 1, -1, -1)
    bits: np.ndarray = ((values[:, None] >> shifts) & 1).astype(np.uint8).reshape(-1)
    return bits
