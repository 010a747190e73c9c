"""The one image loader, for training, encoding and evaluation: any file that Pillow reads -> (H, W, 3) uint8 sRGB.

    bytes -> open, size limit -> decode -> EXIF orientation -> colour | alpha -> ICC to sRGB -> composite -> pixels

Decisions that a caller may want to know:

- Only an embedded ICC profile changes colours (relative colorimetric with black point compensation, 8 bit). A broken
  profile, or one for another colour space than the pixels', is ignored. A profile which moves no colour by more than
  one level is sRGB in effect, and the pixels stay as they are. PNG gAMA/cHRM and AVIF nclx without ICC are not applied.
- 16-bit gray is scaled from its full range; 16-bit colour is reduced to the high byte by Pillow. 32-bit float and
  32-bit integers beyond 16 bits are refused, because the file does not say which value is white.
- Of an animation the first frame is taken. Broken EXIF is ignored.

`pictures.load` keeps alpha, profile and metadata; it stands on `decode` and `to_srgb` of this module.
Imports Pillow and numpy only, never torch.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from codec.errors import ImageError

# fmt: off
EXTENSIONS = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff",
    ".gif", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".tga",
})
# fmt: on
"""Suffixes (lower case, with dot) which the scan of a folder picks up."""

MAX_PIXELS = 2**28
"""Images of more pixels are refused; decoded, this many take 1 GiB in Pillow and 768 MiB as an array."""

# Not all that Pillow has: EPS would start Ghostscript on untrusted bytes, others hold no photographs. TGA has no magic
# number, so it comes last.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "DIB", "JPEG2000", "PPM", "QOI", "TGA")

_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_limit_lock = threading.Lock()


class _RefusedError(Exception):
    """A sound image that is not taken; the message is the reason as the user reads it."""


@dataclass(frozen=True)
class Decoded:
    """An image file, decoded and upright, its colours as they are in the file.

    Attributes:
        colour: mode L, RGB or CMYK.
        alpha: mode L, 255 opaque; None where the file has none.
        profile: the embedded ICC profile, not yet checked; None where there is none.
        source: the image as Pillow opened it, with its mode, format and metadata.
    """

    colour: Image.Image
    alpha: Image.Image | None
    profile: bytes | None
    source: Image.Image


@dataclass(frozen=True)
class Profile:
    """A sound ICC profile.

    Attributes:
        mode: of the pixels that it describes: L, RGB or CMYK.
        transform: the way from there to sRGB; None where it is sRGB in effect.
    """

    mode: str
    transform: ImageCms.ImageCmsTransform | None

    def fits(self, colour: Image.Image) -> bool:
        """Whether it can be applied to pixels of mode L, RGB or CMYK."""
        return self.mode == colour.mode or (self.mode == "RGB" and colour.mode == "L")


def load(
    source: str | Path | bytes, *, name: str | None = None, background: tuple[int, int, int] = (255, 255, 255)
) -> npt.NDArray[np.uint8]:
    """Read an image as it should be seen: upright, in sRGB, opaque.

    Args:
        source: a path, or the bytes of a file.
        name: what error messages call it; None takes the path ("image" for bytes).
        background: sRGB colour, each 0..255, on which transparent pixels are composited (in 8-bit sRGB, rounded).

    Returns:
        (H, W, 3) uint8 sRGB, C-contiguous and writable, 1 <= H * W <= MAX_PIXELS.

    Raises:
        ImageError: the file is missing, unreadable, no image, damaged, truncated, too large, or of a refused kind.
    """
    return np.array(load_picture(source, name=name, background=background))


def load_picture(
    source: str | Path | bytes, *, name: str | None = None, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Read an image as `load` does, as a Pillow image of mode RGB.

    For those who want a piece of it: turning all pixels into an array costs a tenth of the decoding.
    """
    name, data = name_and_data(source, name)
    with errors_as_image_error(name):
        decoded = decode(data)
        picture = to_srgb(decoded)
        if decoded.alpha is None:
            return picture
        return Image.fromarray(_composite(np.array(picture), decoded.alpha, background))


def decode(data: bytes) -> Decoded:
    """Decode the bytes of an image file, limits checked, and turn it upright.

    Raises:
        Exception: anything, see `errors_as_image_error`, within which this is to be called.
    """
    image = _open(data)
    _decode(image)
    method = _TRANSPOSES.get(_orientation(image))  # after decoding, which turns a TIFF and clears the tag
    colour, alpha = _split_alpha(image if method is None else image.transpose(method), data)
    profile = image.info.get("icc_profile")
    return Decoded(colour, alpha, profile if isinstance(profile, bytes) else None, image)


def to_srgb(decoded: Decoded) -> Image.Image:
    """Return the colours in mode RGB: sRGB by the embedded profile, or as they stand where that cannot be used."""
    found = None if decoded.profile is None else read_profile(decoded.profile)
    colour = decoded.colour
    if found and found.transform and found.fits(colour):
        return found.transform.apply(colour.convert(found.mode))
    return colour if colour.mode == "RGB" else colour.convert("RGB")  # convert would copy it


def size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Return (width, height) in pixels as `load` would give them, without decoding the pixels.

    Args:
        source: a path, or the bytes of a file.
        name: what error messages call it; None takes the path ("image" for bytes).

    Raises:
        ImageError: as `load`, as far as the header shows it.
    """
    name, data = name_and_data(source, name)
    with errors_as_image_error(name):
        image = _open(data)
        width, height = image.size
        # Pillow turns the size of a TIFF itself, and decodes a PNG to look for EXIF behind the pixels: only if needed.
        may_turn = image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"Raw profile type", b"adobe.xmp"))
        turned = image.format != "TIFF" and may_turn and _orientation(image) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def read(path: str | Path, *, name: str | None = None) -> bytes:
    """Return the bytes of an image file, not yet checked to be one.

    Args:
        path: the file.
        name: what error messages call it; None takes the path.

    Raises:
        ImageError: no such file, a folder, not permitted, or any other failure of the system.
    """
    name = _name(path, name)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as exception:
        raise ImageError(f"{name}: no such file") from exception
    except IsADirectoryError as exception:
        raise ImageError(f"{name}: is a folder") from exception
    except PermissionError as exception:
        raise ImageError(f"{name}: permission denied") from exception
    except (OSError, ValueError) as exception:  # ValueError: a null byte in the path
        raise ImageError(f"{name}: cannot be read: {getattr(exception, 'strerror', None) or exception}") from exception


def save_png(image: npt.NDArray[np.uint8], *, compress_level: int = 6) -> bytes:
    """Encode an image as the bytes of a PNG file.

    Args:
        image: (H, W, 3) uint8 sRGB.
        compress_level: zlib level, 0 (none) to 9 (slowest).

    Raises:
        ValueError: wrong shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=False, compress_level=compress_level)
    return buffer.getvalue()


def _name(source: str | Path | bytes, name: str | None) -> str:
    if name is not None:
        return name
    return "image" if isinstance(source, bytes) else str(source)


def name_and_data(source: str | Path | bytes, name: str | None) -> tuple[str, bytes]:
    """Return what messages call an image, and the bytes of its file; raises as `read`."""
    name = _name(source, name)
    return name, source if isinstance(source, bytes) else read(source, name=name)


@contextmanager
def errors_as_image_error(name: str) -> Iterator[None]:
    """Turn whatever the parsers of untrusted files raise into ImageError, "<name>: <reason>"."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as exception:  # third-party parsers of damaged files raise anything, from EOFError to SyntaxError
        raise ImageError(f"{name}: {_reason(exception)}") from exception


def _reason(exception: Exception) -> str:
    if isinstance(exception, _RefusedError):
        return str(exception)
    if isinstance(exception, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(exception, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    text = " ".join(str(exception).split()) or type(exception).__name__
    truncated = any(word in text.lower() for word in ("truncated", "not enough", "but only got"))
    return f"{'truncated' if truncated else 'damaged'}: {text}"


def _open(data: bytes) -> Image.Image:
    """Parse the header; the size is checked before any pixel is decoded."""
    if not data:
        raise _RefusedError("empty file")
    with _without_pillow_limit():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _RefusedError(f"{width} x {height} pixels, more than the {MAX_PIXELS} that are allowed")
    if width * height == 0:
        raise _RefusedError("no pixels")
    return image


def _decode(image: Image.Image) -> None:
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):  # some formats are checked again here
        with _without_pillow_limit():
            image.load()
    else:
        image.load()


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's own limit: a module variable, lower than ours, that warns on stderr from the half of it.

    Only while a header is parsed or a huge image decoded, and by one thread at a time: none restores another's value.
    """
    with _limit_lock:
        pillow_limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 (or nonsense); 1 where there is none or EXIF is broken."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a parser of broken metadata, see above; the picture itself is sound
        return 1


def _split_alpha(image: Image.Image, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in mode L, RGB or CMYK, and the alpha channel in mode L where there is one."""
    mode = image.mode
    if mode == "F":
        raise _RefusedError("32-bit float pixels are not supported: the file does not say which value is white")
    if mode.startswith("I"):
        return _split_gray16(image)
    if image.has_transparency_data:
        if mode in ("1", "L", "RGB"):
            image = _fix_transparent_colour(image, data)
        image = image.convert("LA" if mode in ("1", "L", "LA", "La") else "RGBA")
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if mode == "1" else "RGB"), None  # P, YCbCr, LAB, HSV, RGBX


def _split_gray16(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values = np.asarray(image).astype(np.int64)  # (H, W); I;16 and its byte orders, or I
    if values.min() < 0 or values.max() > 65535:
        raise _RefusedError("integer pixels beyond 16 bits are not supported: the file does not say which is white")
    gray = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # exact round(value * 255 / 65535)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return gray, None
    return gray, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))


def _fix_transparent_colour(image: Image.Image, data: bytes) -> Image.Image:
    """Bring the transparent colour of a gray or RGB PNG to 8 bits, as the pixels are; Pillow leaves it as stored."""
    transparent = image.info.get("transparency")
    depth = data[24]  # bits per sample, of the PNG header
    if image.mode == "1" or not data.startswith(b"\x89PNG") or depth == 8:
        return image
    image = image.copy()
    if isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    return image


@lru_cache(maxsize=32)
def read_profile(profile: bytes) -> Profile | None:
    """Parse an ICC profile; None where it is broken or describes no gray, RGB or CMYK pixels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, KeyError, TypeError, ValueError):
        return None
    if mode == "RGB":
        levels = np.linspace(0, 255, 17).astype(np.uint8)
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3)
        if np.abs(np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe).max() <= 1:
            return Profile(mode, None)
    return Profile(mode, transform)


def _composite(
    pixels: npt.NDArray[np.uint8], alpha: Image.Image, background: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    weight = np.asarray(alpha, dtype=np.uint16)[..., None]  # (H, W, 1), 255 opaque
    mixed = pixels * weight + np.array(background, dtype=np.uint16) * (255 - weight)  # at most 65025: fits
    return ((mixed + 127) // 255).astype(np.uint8)  # rounded; 255 is odd, so there are no ties
