"""A picture with all that belongs to it: pixels for the network, alpha, gray, ICC profile, EXIF, XMP.

    file -> load -> Picture -> to_chunks -> compressed file -> from_chunks -> Picture -> to_png

Pixels with an RGB profile other than sRGB keep their values and their profile, so that the look is right after
decoding; CMYK and Lab become sRGB. FORMAT.md section 6 is the law for the chunks. Must not import torch.
"""

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from codec import alpha as alpha_plane
from codec import bitstream, images, metadata
from codec.bitstream import Chunk, Header
from codec.errors import FormatError
from codec.images import Decoded

# Bits of the body of an INFO chunk
_GRAY = 1
_DEEP = 2
_CONVERTED = 4

_NEUTRAL = 2  # levels by which R, G and B of a gray image may differ once a profile was applied
_Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An upright picture.

    Attributes:
        pixels: (H, W, 3) uint8 as the network sees them: in the colour space of `icc`, else sRGB; R = G = B if gray.
        alpha: (H, W) uint8, 255 opaque; None where everything is opaque.
        gray: whether it is a gray image.
        icc: ICC profile; None for sRGB. Gray images may have a gray one.
        exif: EXIF without the "Exif" prefix of JPEG; its orientation is 1.
        xmp: XMP packet.
        deep: whether the source had more than 8 bits a sample.
        converted: whether colours were converted to sRGB (from CMYK, Lab, or by a profile that is not kept).
        notes: what was changed or left out on the way here, one line each.
    """

    pixels: _Pixels
    alpha: _Pixels | None = None
    gray: bool = False
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    deep: bool = False
    converted: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pixels, plane = self.pixels, self.alpha
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise ValueError(f"expected uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
        if plane is not None and (plane.dtype != np.uint8 or plane.shape != pixels.shape[:2]):
            raise ValueError(f"expected alpha uint8 {pixels.shape[:2]}, got {plane.dtype} {plane.shape}")


def load(source: str | Path | bytes, name: str | None = None, strip: bool = False) -> Picture:
    """Read an image file with all that belongs to it; decoding, limits and orientation are those of `images.load`.

    Pixels of alpha 0 get the colours of visible ones nearby; what was stored there is lost.

    Args:
        source: a path, or the bytes of a file.
        name: what error messages call it; None takes the path ("image" for bytes).
        strip: keep no profile, EXIF and XMP; colours become sRGB. Alpha and gray are kept.

    Raises:
        ImageError: as `images.load`.
    """
    name, data = images.name_and_data(source, name)
    with images.errors_as_image_error(name):
        decoded = images.decode(data)
        notes: list[str] = []
        bits = metadata.bits_per_sample(decoded.source, data)
        if bits > 8:
            notes.append(f"{bits} bits a sample reduced to 8")
        icc = None if strip else _kept_profile(decoded, notes)
        pixels, gray, converted = _pixels(decoded, as_is=icc is not None)
        if converted:
            notes.append("colours converted to sRGB")
        exif = None if strip else _kept("EXIF", metadata.exif(decoded.source), notes)
        if exif is not None:
            exif = metadata.upright_exif(exif)
            notes += ["broken EXIF left out"] if exif is None else []
        xmp = None if strip else _kept("XMP", metadata.xmp(decoded.source), notes)
        plane = None if decoded.alpha is None else np.array(decoded.alpha)
        if plane is not None and plane.min() == 255:
            plane = None
        return Picture(
            pixels=pixels if plane is None else alpha_plane.spread_colours(pixels, plane),
            alpha=plane,
            gray=gray,
            icc=icc,
            exif=exif,
            xmp=None if xmp is None else metadata.upright_xmp(xmp),
            deep=bits > 8,
            converted=converted,
            notes=tuple(notes),
        )


def to_chunks(picture: Picture) -> list[Chunk]:
    """Return the chunks that a compressed file of the picture needs; none for an opaque one without metadata.

    Raises:
        ValueError: a profile, EXIF or XMP larger than the format allows; `load` keeps none.
    """
    chunks = []
    if picture.alpha is not None:
        chunks.append(Chunk(bitstream.ALPHA, alpha_plane.pack(picture.alpha)))
    flags = picture.gray * _GRAY | picture.deep * _DEEP | picture.converted * _CONVERTED
    if flags:
        chunks.append(Chunk(bitstream.INFO, bytes([flags])))
    for kind, body in ((bitstream.ICC, picture.icc), (bitstream.EXIF, picture.exif), (bitstream.XMP, picture.xmp)):
        if body is not None:
            if len(body) > metadata.MAX_BYTES:
                raise ValueError(f"{bitstream.KINDS[kind]} of {len(body)} bytes, at most {metadata.MAX_BYTES}")
            chunks.append(Chunk(kind, zlib.compress(body, 9)))
    return chunks


def from_chunks(
    pixels: _Pixels,
    chunks: Sequence[Chunk],
    header: Header | None = None,
    region: tuple[int, int, int, int] | None = None,
    damage: list[str] | None = None,
) -> Picture:
    """Join decoded pixels and the chunks of their file.

    Args:
        pixels: (H, W, 3) uint8, of the whole image or of the region.
        chunks: of the file; unknown ones are passed over.
        header: of the file; None takes the size from pixels.
        region: (left, top, width, height) in pixels of the file; None = all.
        damage: gets one line for each chunk that is damaged, which is then left out; None = an error instead.

    Returns:
        The picture; a gray one with R = G = B = the luma of the pixels.

    Raises:
        FormatError: a damaged chunk, or one that holds more than the format allows.
    """
    height, width = pixels.shape[:2] if header is None else (header.height, header.width)
    parts: dict[int, Any] = {}
    for chunk in chunks:
        try:
            parts[chunk.kind] = _read_body(chunk, height, width)
        except FormatError as exception:
            if damage is None:
                raise
            damage.append(f"{exception}; left out")
    plane = parts.get(bitstream.ALPHA)
    if plane is not None and region is not None:
        left, top, width, height = region
        plane = np.ascontiguousarray(plane[top : top + height, left : left + width])
    flags = parts.get(bitstream.INFO, 0)
    return Picture(
        pixels=np.array(Image.fromarray(pixels).convert("L").convert("RGB")) if flags & _GRAY else pixels,
        alpha=plane,
        gray=bool(flags & _GRAY),
        icc=parts.get(bitstream.ICC),
        exif=parts.get(bitstream.EXIF),
        xmp=parts.get(bitstream.XMP),
        deep=bool(flags & _DEEP),
        converted=bool(flags & _CONVERTED),
    )


def check_chunks(chunks: Sequence[Chunk], header: Header) -> None:
    """Raise FormatError where a chunk of a file is damaged, or holds more than the format allows."""
    for chunk in chunks:
        _read_body(chunk, header.height, header.width)


def describe(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Say what the chunks of a file hold, as plain JSON values, without decoding them; for `codec info`."""
    sizes = {chunk.kind: len(chunk.body) for chunk in chunks}
    flags = next((chunk.body[0] for chunk in chunks if chunk.kind == bitstream.INFO and chunk.body), 0)
    return {
        "gray": bool(flags & _GRAY),
        "source_over_8_bits": bool(flags & _DEEP),
        "converted_to_srgb": bool(flags & _CONVERTED),
        **{f"{name.lower()}_bytes": sizes.get(kind, 0) for kind, name in bitstream.KINDS.items() if name != "INFO"},
        "unknown_chunks": sum(kind not in bitstream.KINDS for kind in sizes),
    }


def to_png(picture: Picture, compress_level: int = 6) -> bytes:
    """Encode a picture as the bytes of a PNG file of mode L, LA, RGB or RGBA, with profile, EXIF and XMP.

    Args:
        picture: what to write.
        compress_level: zlib level, 0 (none) to 9 (slowest).
    """
    colours = picture.pixels[..., :1] if picture.gray else picture.pixels
    if picture.alpha is not None:
        colours = np.concatenate([colours, picture.alpha[..., None]], axis=-1)
    info = PngImagePlugin.PngInfo()
    if picture.xmp is not None:
        info.add_itxt("XML:com.adobe.xmp", picture.xmp)
    options = {name: body for name, body in (("icc_profile", picture.icc), ("exif", picture.exif)) if body is not None}
    buffer = io.BytesIO()
    image = Image.fromarray(colours[..., 0] if colours.shape[2] == 1 else colours)
    image.save(buffer, "PNG", pnginfo=info, optimize=False, compress_level=compress_level, **options)
    return buffer.getvalue()


def _kept_profile(decoded: Decoded, notes: list[str]) -> bytes | None:
    """Return the embedded profile where pixels are to keep their values and it, else None."""
    profile = decoded.profile
    if not profile:
        return None
    found = images.read_profile(profile)
    if found is None or not found.fits(decoded.colour):
        notes.append(f"ICC profile {'is broken' if found is None else 'of other colours than the pixels'}, left out")
        return None
    if found.transform is None or found.mode == "CMYK" or found.mode != decoded.colour.mode:
        return None  # sRGB already, or applied
    return _kept("ICC profile", profile, notes)


def _kept(name: str, body: bytes | None, notes: list[str]) -> bytes | None:
    """Return what may be kept of a profile, EXIF or XMP."""
    if body is not None and len(body) > metadata.MAX_BYTES:
        notes.append(f"{name} of {len(body)} bytes left out, at most {metadata.MAX_BYTES} are kept")
        return None
    return body


def _pixels(decoded: Decoded, as_is: bool) -> tuple[_Pixels, bool, bool]:
    """Return pixels (H, W, 3), whether they are gray, and whether their colours were converted to sRGB."""
    colour = decoded.colour
    if as_is:
        return np.array(colour.convert("RGB")), colour.mode == "L", False
    found = images.read_profile(decoded.profile) if decoded.profile else None
    by_profile = found is not None and found.transform is not None and found.fits(colour)
    pixels = np.array(images.to_srgb(decoded))
    gray = colour.mode == "L"
    if gray and by_profile:
        gray = bool((np.ptp(pixels, axis=2) <= _NEUTRAL).all())
        pixels = np.array(Image.fromarray(pixels).convert("L").convert("RGB")) if gray else pixels
    return pixels, gray, by_profile or decoded.source.mode in ("CMYK", "LAB", "HSV")


def _read_body(chunk: Chunk, height: int, width: int) -> Any:
    """Return the alpha plane, the INFO flags, or the bytes of a profile, EXIF or XMP; None for an unknown chunk."""
    if chunk.kind == bitstream.ALPHA:
        return alpha_plane.unpack(chunk.body, height, width)
    if chunk.kind == bitstream.INFO:
        if len(chunk.body) != 1:
            raise FormatError(f"damaged INFO: {len(chunk.body)} bytes, expected 1")
        return chunk.body[0]
    if chunk.kind in bitstream.KINDS:
        return bitstream.inflate(chunk.body, metadata.MAX_BYTES, bitstream.KINDS[chunk.kind])
    return None
