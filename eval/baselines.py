"""The classical codecs that a model is compared with, in memory and with their flags stated.

Every encoder runs with fixed flags and a fixed number of threads: one, but for AVIF, whose files depend on it.
"""

import difflib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, features

from codec.errors import UsageError


@dataclass(frozen=True)
class Baseline:
    """A codec with a quality knob.

    `encode(image, quality)` takes (H, W, 3) uint8 sRGB and returns the whole file; `decode(data)` gives an image back.
    """

    name: str
    label: str
    flags: str  # encoder and settings, for the JSON
    qualities: tuple[int, ...]  # measured by default: about 0.1 to 1 bpp
    quality_range: tuple[int, int]  # lowest and highest, file size rising between them
    encode: Callable[[np.ndarray, int], bytes]
    decode: Callable[[bytes], np.ndarray]


def _pillow(name: str, label: str, module: str, qualities: tuple[int, ...], **flags: Any) -> Baseline:
    if not features.check(module):
        raise UsageError(f"baseline {name}: this Pillow was built without {label}")

    def encode(image: np.ndarray, quality: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, name.upper(), quality=quality, **flags)
        return file.getvalue()

    def decode(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    library = "libjpeg_turbo" if module == "jpg" else module
    stated = f"Pillow, {library} {features.version(library)}: {', '.join(f'{k}={v}' for k, v in flags.items())}"
    return Baseline(name, label, stated, qualities, (1 if name == "jpeg" else 0, 100), encode, decode)


def _jpeg() -> Baseline:
    flags = {"optimize": True, "progressive": True, "subsampling": "4:2:0"}
    return _pillow("jpeg", "JPEG", "jpg", (5, 10, 20, 30, 50), **flags)


def _webp() -> Baseline:
    return _pillow("webp", "WebP", "webp", (1, 10, 30, 50), method=6)


def _avif() -> Baseline:
    # Two threads or any more give the same files, which are what people get by default; one gives larger ones (0.4 %).
    return _pillow("avif", "AVIF", "avif", (10, 20, 30, 40, 50), speed=6, subsampling="4:2:0", max_threads=2)


def _jxl() -> Baseline:
    try:
        import imagecodecs
    except ImportError as exception:
        raise UsageError("baseline jxl needs imagecodecs: pip install 'latent-codec[eval]'") from exception
    if not imagecodecs.JPEGXL.available:
        raise UsageError("baseline jxl: this imagecodecs was built without JPEG XL")

    def encode(image: np.ndarray, quality: int) -> bytes:
        return bytes(imagecodecs.jpegxl_encode(image, level=quality, effort=7, numthreads=1))

    def decode(data: bytes) -> np.ndarray:
        return np.asarray(imagecodecs.jpegxl_decode(data, numthreads=1))

    # `level` is libjxl's quality: levels 10, 20, 30, 50 are distances 15.27, 9.07, 6.40, 4.60; 100 would be lossless.
    flags = f"imagecodecs, {imagecodecs.jpegxl_version()}: level=quality, effort=7, numthreads=1"
    return Baseline("jxl", "JPEG XL", flags, (10, 20, 30, 50), (0, 99), encode, decode)


BASELINES: dict[str, Callable[[], Baseline]] = {"jpeg": _jpeg, "webp": _webp, "avif": _avif, "jxl": _jxl}


def get(names: Sequence[str], qualities: Mapping[str, Sequence[int]] | None = None) -> list[Baseline]:
    """Return the baselines with these names.

    Args:
        names: of `BASELINES`.
        qualities: name -> the qualities to measure, where they are not the default ones.

    Raises:
        UsageError: an unknown name (the message gives the nearest), a codec that is not installed, or a quality that
            it does not have.
    """
    qualities = qualities or {}
    for name in [*names, *qualities]:
        if name not in BASELINES:
            near = difflib.get_close_matches(name, BASELINES, n=1, cutoff=0)[0]
            raise UsageError(f"unknown baseline {name!r}: did you mean {near!r}? Known: {', '.join(BASELINES)}")
    found = [BASELINES[name]() for name in dict.fromkeys(names)]
    for index, baseline in enumerate(found):
        if baseline.name in qualities:
            asked = tuple(sorted(set(qualities[baseline.name])))
            low, high = baseline.quality_range
            if not asked or asked[0] < low or asked[-1] > high:
                raise UsageError(f"baseline {baseline.name}: qualities {asked}, expected {low} to {high}")
            found[index] = replace(baseline, qualities=asked)
    return found


def encode_near(encode: Callable[[int], bytes], quality_range: tuple[int, int], size_bytes: float) -> tuple[int, bytes]:
    """Search the quality whose file is nearest in size, by bisection: the size must rise with the quality.

    Args:
        encode: quality to file.
        quality_range: lowest and highest quality.
        size_bytes: the size to come near.

    Returns:
        The quality and its file; one end of the range if the size lies outside.
    """
    low, high = quality_range
    files: dict[int, bytes] = {}
    while low < high:
        middle = (low + high) // 2
        files[middle] = encode(middle)
        if len(files[middle]) < size_bytes:
            low = middle + 1
        else:
            high = middle
    if low not in files:
        files[low] = encode(low)
    if low > quality_range[0] and low - 1 not in files:
        files[low - 1] = encode(low - 1)
    quality = min(files, key=lambda q: (abs(len(files[q]) - size_bytes), q))
    return quality, files[quality]
