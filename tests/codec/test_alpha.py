"""codec.alpha: exact and small, damaged bytes refused; colours under what is hidden."""

import zlib

import numpy as np
import pytest

from codec import alpha
from codec.errors import FormatError
from tests.conftest import photo

PHOTO = photo(40, 48)
GRAY = PHOTO[..., 1]
ALPHA = np.clip(np.add.outer(np.arange(40) * 9, np.arange(48) * 7) - 100, 0, 255).astype(np.uint8)


def planes() -> dict[str, np.ndarray]:
    y, x = np.mgrid[:37, :101]
    return {
        "constant": np.full((37, 101), 77, dtype=np.uint8),
        "binary": np.where((x - 50) ** 2 + (y - 18) ** 2 < 200, 255, 0).astype(np.uint8),
        "two values": np.where(x > y, 200, 3).astype(np.uint8),
        "ramp": (x * 2 + y).astype(np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (37, 101)).astype(np.uint8),
        "pixel": np.array([[9]], dtype=np.uint8),
        "row": np.arange(256, dtype=np.uint8)[None],
        "column": np.arange(256, dtype=np.uint8)[:, None],
    }


@pytest.mark.parametrize("name", planes())
def test_alpha_is_exact_and_small(name: str) -> None:
    plane = planes()[name]
    body = alpha.pack(plane)
    assert np.array_equal(alpha.unpack(body, *plane.shape), plane)
    most = {"constant": 2, "binary": 100, "two values": 100, "ramp": 200, "pixel": 2, "row": 20, "column": 20}
    assert len(body) <= most.get(name, plane.size + 20)


def deflated(data: bytes) -> bytes:
    return zlib.compress(data, 9)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "unknown form"),
        (b"\x08", "unknown form"),
        (b"\x08\x00\x00", "unknown form"),
        (b"\x09" + deflated(bytes(12)), "unknown form"),
        (b"\x00" + deflated(bytes(11)), "11 bytes, expected 12"),
        (b"\x00" + deflated(bytes(13)), "more than 12"),
        (b"\x00" + deflated(bytes(1 << 26)), "more than 12"),
        (b"\x00" + deflated(bytes(12))[:-1], "truncated"),
        (b"\x00" + deflated(bytes(12)) + b"x", "left over"),
        (b"\x04\x00\xff" + deflated(bytes(12)), "more than 3"),
        (b"\x04\x00", "truncated"),
        (b"\x03nonsense", "damaged alpha"),
    ],
)
def test_damaged_alpha(body: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        alpha.unpack(body, 3, 4)


def test_hidden_colours_do_not_reach_visible_pixels_and_visible_ones_stay() -> None:
    y, x = np.mgrid[:90, :120]
    plane = np.clip((30 - np.hypot(y - 40, x - 60)) * 80, 0, 255).astype(np.uint8)
    pixels = photo(90, 120)
    pixels[plane == 0] = [255, 0, 255]  # as some programs leave it
    filled = alpha.spread_colours(pixels, plane)
    assert np.array_equal(filled[plane > 0], pixels[plane > 0])
    assert (filled[plane == 0] != [255, 0, 255]).any(axis=-1).all()
    steps = np.abs(np.diff(filled.astype(int), axis=1)).max(axis=-1)
    edge = (plane[:, 1:] == 0) != (plane[:, :-1] == 0)
    assert np.percentile(steps[edge], 90) < 30
    assert np.percentile(np.abs(np.diff(pixels.astype(int), axis=1)).max(axis=-1)[edge], 10) > 60
    low, high = pixels[plane > 0].min(axis=0), pixels[plane > 0].max(axis=0)
    assert (filled >= low).all()  # means of visible colours are no others
    assert (filled <= high).all()


def test_spreading_of_all_and_of_nothing() -> None:
    assert alpha.spread_colours(PHOTO, np.full((40, 48), 1, dtype=np.uint8)) is PHOTO
    assert (alpha.spread_colours(PHOTO, np.zeros((40, 48), dtype=np.uint8)) == 128).all()
    one = np.zeros((40, 48), dtype=np.uint8)
    one[7, 9] = 1
    assert (alpha.spread_colours(PHOTO, one) == PHOTO[7, 9]).all()
    gray = np.repeat(GRAY[..., None], 3, axis=-1)
    assert np.ptp(alpha.spread_colours(gray, ALPHA), axis=-1).max() == 0  # gray stays gray
