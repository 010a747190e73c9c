"""Image files and ICC profiles made by hand, for tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: list[bytes], *, trns: bytes = b"") -> bytes:
    """A PNG file by hand, for the kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = chunk(b"tRNS", trns) if trns else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def icc(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A minimal ICC version 2 profile."""
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += struct.pack(">4sII", name, offset + len(body), len(value))
        body += value
    header = struct.pack(">I4sI4s4s4s12x4s", offset + len(body), b"", 0x02400000, kind, space, pcs, b"acsp")
    return (header.ljust(68, b"\0") + xyz(0.9642, 1, 0.8249)[8:]).ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


WHITE = xyz(0.9642, 1, 0.8249)
SRGB_D50 = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3_D50 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def rgb_profile(matrix: np.ndarray, power: float) -> bytes:
    columns = {name: xyz(*matrix[:, n]) for n, name in enumerate([b"rXYZ", b"gXYZ", b"bXYZ"])}
    curves = dict.fromkeys([b"rTRC", b"gTRC", b"bTRC"], gamma(power))
    return icc(b"mntr", b"RGB ", b"XYZ ", {b"wtpt": WHITE} | columns | curves)
