"""The container of a compressed file, format version 0. FORMAT.md section 2 is the law; this module follows it.

Reads and writes headers without a model, so `codec info` needs neither torch nor diffusers.
"""

import struct
import zlib
from dataclasses import dataclass

from codec.errors import FormatError

MAGIC = b"\x89LCX"
VERSION = 0
SUFFIX = ".lcx"
DEFAULT_QUALITY = 50
MAX_SIDE = 65535  # pixels
MAX_PIXELS = 1 << 28

_FIXED = struct.Struct("<4sB8s8sB")  # magic, version, stream id, decoder id, quality
_CRC = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself.

    Attributes:
        stream_id: 16 hex digits; which mean, step and tables its latents were coded with. Must be known to decode.
        decoder_id: 16 hex digits; which decoder the encoder's model had.
        quality: 0 (coarsest) .. 100 (finest).
        width: pixels, 1..65535.
        height: pixels, 1..65535.
    """

    stream_id: str
    decoder_id: str
    quality: int
    width: int
    height: int

    def __post_init__(self) -> None:
        check_size(self.width, self.height)
        if not 0 <= self.quality <= 100:
            raise FormatError(f"quality {self.quality}, expected 0..100")


def check_size(width: int, height: int) -> None:
    """Raise FormatError unless the format can hold an image of width x height pixels."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise FormatError(f"image size {width}x{height}, expected 1..{MAX_SIDE} a side and at most {MAX_PIXELS} pixels")


def pack(header: Header, payload: bytes) -> bytes:
    """Return the bytes of a whole file: header, payload, CRC-32."""
    body = (
        _FIXED.pack(MAGIC, VERSION, bytes.fromhex(header.stream_id), bytes.fromhex(header.decoder_id), header.quality)
        + _varint(header.width)
        + _varint(header.height)
        + payload
    )
    return body + _CRC.pack(zlib.crc32(body))


def unpack(data: bytes) -> tuple[Header, bytes]:
    """Split the bytes of a whole file into header and payload.

    Raises:
        FormatError: not a compressed file, an unknown version, truncated, damaged (CRC-32), or a field out of range.
    """
    if data[:4] != MAGIC:
        raise FormatError("not a latent-codec file" if data else "empty file")
    if len(data) < 5 or data[4] != VERSION:
        version = data[4] if len(data) > 4 else "none"
        raise FormatError(f"format version {version}, this program reads version {VERSION}")
    if len(data) < _FIXED.size + 2 + _CRC.size:
        raise FormatError(f"truncated: {len(data)} bytes")
    body = data[: -_CRC.size]
    if _CRC.unpack(data[-_CRC.size :])[0] != zlib.crc32(body):
        raise FormatError("damaged or truncated: the CRC-32 does not match")
    _, _, stream_id, decoder_id, quality = _FIXED.unpack_from(body)
    width, position = _read_varint(body, _FIXED.size)
    height, position = _read_varint(body, position)
    header = Header(stream_id=stream_id.hex(), decoder_id=decoder_id.hex(), quality=quality, width=width, height=height)
    return header, body[position:]


def _varint(value: int) -> bytes:
    """LEB128: seven bits a byte, least significant first, the high bit says that more follow."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(body: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in (0, 7, 14):
        if position >= len(body):
            break
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise FormatError("damaged: a size field is too long")
