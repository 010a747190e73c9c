"""Metadata of image files: EXIF and XMP as they are to be kept, once the picture itself has been turned upright.

Both are taken over byte by byte; only the orientation becomes 1. Imports Pillow only.
"""

import re
import struct

from PIL import ExifTags, Image

MAX_BYTES = 1 << 20
"""A profile, EXIF or XMP of more bytes is not kept. Pillow reads no larger profile from a PNG."""

_EXIF_PREFIX = b"Exif\0\0"  # as in JPEG; without it EXIF is a TIFF structure
_ORIENTATION = ExifTags.Base.Orientation
_SHORT = 3  # the TIFF type
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation\s*(?:=\s*[\"']|>)\s*)[0-9]")

_TIFF_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
"""What is kept of a TIFF file's own tags, beside its EXIF and GPS folders; the others say how its pixels are stored."""


def exif(image: Image.Image) -> bytes | None:
    """Return the EXIF of a decoded image without the "Exif" prefix, as it stands; None where there is none."""
    data = image.info.get("exif")
    if data is None and "Raw profile type exif" in image.info:  # ImageMagick's, in PNG
        try:
            data = bytes.fromhex("".join(str(image.info["Raw profile type exif"]).split("\n")[3:]))
        except ValueError:
            data = b""  # there, but broken
    if data is None and image.format == "TIFF":
        data = _tiff_exif(image)
    return data.removeprefix(_EXIF_PREFIX) if isinstance(data, bytes) else None


def xmp(image: Image.Image) -> bytes | None:
    """Return the XMP packet of a decoded image as it stands; None where there is none."""
    data = image.info.get("xmp")
    return data if isinstance(data, bytes) and data else None


def upright_exif(data: bytes) -> bytes | None:
    """Return EXIF (without prefix) with orientation 1 and no other change; None where it is broken."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return None
    fixed = bytearray(data)
    try:
        (offset,) = struct.unpack_from(order + "I", data, 4)
        (n_entries,) = struct.unpack_from(order + "H", data, offset)
        for position in range(offset + 2, offset + 2 + 12 * n_entries, 12):
            (tag,) = struct.unpack_from(order + "H10x", data, position)
            if tag == _ORIENTATION:
                struct.pack_into(order + "HHIHH", fixed, position, tag, _SHORT, 1, 1, 0)
    except struct.error:
        return None
    return bytes(fixed)


def upright_xmp(data: bytes) -> bytes:
    """Return an XMP packet (UTF-8) with orientation 1 and no other change."""
    return _XMP_ORIENTATION.sub(rb"\g<1>1", data)


def bits_per_sample(image: Image.Image, data: bytes) -> int:
    """Return how many bits a sample has in the file: of PNG, TIFF, AVIF, JPEG 2000 and 16-bit gray; else 8.

    Args:
        image: as Pillow opened it.
        data: the bytes of the file.
    """
    if image.mode.startswith("I"):
        return 16
    if image.format == "PNG" and len(data) > 24:
        return data[24]
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, 8)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    if image.format == "AVIF" and 0 < (at := data.find(b"av1C")) < len(data) - 6:
        return 12 if data[at + 6] & 0x60 == 0x60 else 10 if data[at + 6] & 0x40 else 8
    if image.format == "JPEG2000" and 0 <= (at := data.find(b"\xff\x4f\xff\x51")) < len(data) - 42:
        return (data[at + 42] & 0x7F) + 1
    return 8


def _tiff_exif(image: Image.Image) -> bytes | None:
    """Return the descriptive tags of a TIFF file as EXIF; None where it has none."""
    try:
        found = image.getexif()
        folders = {folder: found.get_ifd(folder) for folder in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)}
        kept = Image.Exif()
        kept.update({tag: found[tag] for tag in _TIFF_TAGS if tag in found})
        for folder, values in folders.items():
            if values:
                kept.get_ifd(folder).update(values)
        return kept.tobytes() if len(kept) or any(folders.values()) else None
    except Exception:  # a parser of broken metadata, as in images.py; the picture itself is sound
        return b""
