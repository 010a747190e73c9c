"""codec.images: every kind of file gives the pixels that a viewer would show, every bad file an ImageError."""

import contextlib
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from codec import images
from codec.errors import ImageError
from tests.codec.image_files import P3_D50, SRGB_D50, WHITE, encode, gamma, icc, png, rgb_profile

RNG = np.random.default_rng(0)
PHOTO = np.asarray(Image.fromarray(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((48, 40)))  # smooth


def srgb_encode(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# --- orientation


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    upright = PHOTO
    stored = {  # how a camera stores the upright picture under each orientation (EXIF 2.3, tag 274)
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    pixels = images.load(data)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (12 if kind == "JPEG" else 0)
    assert images.size(data) == (48, 40)
    assert pixels.flags.c_contiguous
    assert pixels.dtype == np.uint8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored() -> None:
    data = encode(Image.fromarray(PHOTO), exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert np.array_equal(images.load(data), PHOTO)
    assert images.size(data) == (48, 40)


# --- colour profiles


def test_display_p3_is_converted_to_srgb() -> None:
    colours = np.array([[[200, 100, 50], [60, 180, 90], [128, 128, 128], [255, 0, 0]]], dtype=np.uint8)
    pixels = images.load(encode(Image.fromarray(colours), icc_profile=rgb_profile(P3_D50, 2.2)))
    linear = (colours / 255) ** 2.2 @ (np.linalg.inv(SRGB_D50) @ P3_D50).T
    assert np.abs(pixels - srgb_encode(linear)).max() <= 2
    assert pixels[0, 0, 0] > colours[0, 0, 0] + 5  # the wider gamut's orange is a stronger one in sRGB
    assert np.ptp(pixels[0, 2].astype(int)) <= 1  # gray stays gray


def test_profile_with_swapped_primaries_swaps_red_and_green() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    for kind in ("PNG", "TIFF", "JPEG", "WEBP"):
        assert np.abs(images.load(encode(red, kind, icc_profile=swapped))[0, 0] - [0, 255, 0]).max() <= 3, kind


def test_srgb_profile_leaves_every_pixel_untouched() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(images.load(encode(Image.fromarray(PHOTO), icc_profile=profile)), PHOTO)


def test_gray_profile_is_applied_to_gray_pixels() -> None:
    linear_light = icc(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": gamma(1.0)})
    data = encode(Image.new("L", (2, 2), 128), icc_profile=linear_light)
    expected = srgb_encode(np.array(128 / 255))  # 188
    assert np.abs(images.load(data)[0, 0] - expected).max() <= 1


def test_cmyk_profile_is_applied() -> None:
    # lut8 on a 2^4 grid which looks at black only: lightness 255 without, 0 with full black; a = b = 128 is neutral
    identity = bytes(range(256))
    grid = b"".join(bytes([0 if node & 1 else 255, 128, 128]) for node in range(16))
    matrix = struct.pack(">9i", *(65536 if n % 4 == 0 else 0 for n in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + grid + identity * 3
    profile = icc(b"prtr", b"CMYK", b"Lab ", {b"wtpt": WHITE, b"A2B0": lut, b"A2B1": lut})
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert images.load(encode(cyan, "TIFF"))[0, 0].tolist() == [0, 255, 255]  # no profile: Pillow's own conversion
    assert images.load(encode(cyan, "TIFF", icc_profile=profile))[0, 0].min() >= 253


@pytest.mark.parametrize("profile", [b"nonsense", rgb_profile(P3_D50, 2.2)[:200], b"\0" * 300])
def test_broken_profile_is_ignored(profile: bytes) -> None:
    assert np.array_equal(images.load(encode(Image.fromarray(PHOTO), icc_profile=profile)), PHOTO)


def test_profile_of_another_colour_space_is_ignored() -> None:
    gray = icc(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": gamma(1.0)})
    assert np.array_equal(images.load(encode(Image.fromarray(PHOTO), icc_profile=gray)), PHOTO)


# --- modes


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "PPM")])
def test_16_bit_gray_is_scaled_not_clipped(mode: str, kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535, 128, 129, 1000]])
    image = Image.fromarray(values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]))
    assert image.mode == mode
    expected = np.repeat(np.rint(values / 257)[..., None], 3, axis=-1)
    assert np.array_equal(images.load(encode(image, kind)), expected)


def test_16_bit_colour_keeps_the_high_byte() -> None:
    data = png(2, 1, 16, 2, [struct.pack(">6H", 65535, 0x1234, 0, 0xABCD, 0x80FF, 255)])
    assert images.load(data).tolist() == [[[255, 0x12, 0], [0xAB, 0x80, 0]]]


@pytest.mark.parametrize("image", [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 70000)])
def test_pixels_of_unknown_range_are_refused(image: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"^x: .*not supported"):
        images.load(encode(image, "TIFF"), name="x")


def test_gray_bilevel_and_palette() -> None:
    assert images.load(encode(Image.new("L", (2, 1), 77))).tolist() == [[[77] * 3] * 2]
    bilevel = Image.fromarray(np.array([[True, False]]))
    assert images.load(encode(bilevel)).tolist() == [[[255] * 3, [0] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    for kind in ("PNG", "GIF", "BMP"):
        assert images.load(encode(palette, kind)).tolist() == [[[10, 20, 30], [200, 100, 50]]], kind


def test_ycbcr_and_lab() -> None:
    lab = encode(Image.new("RGB", (1, 1), (200, 60, 30)).convert("LAB"), "TIFF")
    assert np.abs(images.load(lab)[0, 0].astype(int) - [200, 60, 30]).max() <= 6  # L, a, b in 8 bits are coarse
    ycbcr = encode(Image.new("RGB", (16, 16), (200, 30, 60)).convert("YCbCr"), "JPEG", quality=95)
    assert np.abs(images.load(ycbcr)[8, 8].astype(int) - [200, 30, 60]).max() <= 3


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(images.load(data)[0, 0].astype(int) - [255, 0, 0]).max() <= 3, kind


# --- transparency

BACKGROUNDS = [(255, 255, 255), (0, 100, 200)]


def over(colour: list[int], alpha: int, background: tuple[int, int, int]) -> list[int]:
    return [round((c * alpha + b * (255 - alpha)) / 255) for c, b in zip(colour, background, strict=True)]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_alpha_is_composited(background: tuple[int, int, int]) -> None:
    rgba = Image.fromarray(np.array([[[200, 10, 60, 0], [200, 10, 60, 77], [200, 10, 60, 255]]], dtype=np.uint8))
    expected = [[over([200, 10, 60], alpha, background) for alpha in (0, 77, 255)]]
    for kind, options in {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}}.items():
        assert images.load(encode(rgba, kind, **options), background=background).tolist() == expected, kind
    gray = Image.fromarray(np.array([[[90, 128]]], dtype=np.uint8), "LA")
    assert images.load(encode(gray), background=background).tolist() == [[over([90] * 3, 128, background)]]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_palette_transparency(background: tuple[int, int, int]) -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    data = encode(palette, transparency=b"\x00\x80\xff")
    expected = [over([10, 20, 30], 0, background), over([200, 100, 50], 128, background), [1, 2, 3]]
    assert images.load(data, background=background).tolist() == [expected]
    for kind in ("PNG", "GIF"):
        data = encode(palette, kind, transparency=1)
        assert images.load(data, background=background).tolist() == [[[10, 20, 30], list(background), [1, 2, 3]]], kind


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(2, 1, 8, 2, [bytes([9, 8, 7, 1, 2, 3])], trns=struct.pack(">3H", 1, 2, 3)), [[9, 8, 7], None]),
        (png(2, 1, 8, 0, [bytes([9, 50])], trns=struct.pack(">H", 9)), [None, [50] * 3]),
        (png(4, 1, 2, 0, [bytes([0b00011011])], trns=struct.pack(">H", 2)), [[0] * 3, [85] * 3, None, [255] * 3]),
        (png(2, 1, 1, 0, [bytes([0b01000000])], trns=struct.pack(">H", 0)), [None, [255] * 3]),
        (png(2, 1, 16, 0, [struct.pack(">2H", 1000, 65535)], trns=struct.pack(">H", 1000)), [None, [255] * 3]),
        (png(1, 1, 16, 2, [struct.pack(">3H", 4660, 0, 9)], trns=struct.pack(">3H", 4660, 0, 9)), [None]),
    ],
)
def test_transparent_colour_of_png(data: bytes, expected: list[list[int] | None]) -> None:
    for background in BACKGROUNDS:
        row = images.load(data, background=background)[0].tolist()
        assert row == [list(background) if colour is None else colour for colour in expected]


# --- bad files


def test_reasons(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello, this is no image at all\n" * 20)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(encode(Image.fromarray(PHOTO), "JPEG")[:-100])
    (tmp_path / "cut.png").write_bytes(encode(Image.fromarray(PHOTO))[:-100])
    for name, reason in {
        "text.png": "not an image that Pillow can read",
        "empty.jpg": "empty file",
        "cut.jpg": "truncated: image file is truncated",
        "cut.png": "truncated: ",
        "missing.png": "no such file",
        ".": "is a folder",
    }.items():
        path = tmp_path / name
        with pytest.raises(ImageError) as caught:
            images.load(path)
        assert str(caught.value).startswith(f"{path}: {reason}")
    with pytest.raises(ImageError, match=r"^my name: empty file$"):
        images.load(b"", name="my name")
    with pytest.raises(ImageError, match="null"):
        images.load("a\0b")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "TGA"])
def test_damaged_files_raise_image_error_and_nothing_else(kind: str) -> None:
    feature = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind)
    if feature and not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    whole = encode(Image.fromarray(PHOTO), kind)
    pixels = images.load(whole)
    rng = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on damaged metadata
        for length in range(0, len(whole), max(1, len(whole) // 80)):
            with contextlib.suppress(ImageError):  # what is cut off may be no pixels
                assert np.array_equal(images.load(whole[:length]), pixels), length
        for _ in range(60):
            damaged = bytearray(whole)
            for position in rng.integers(0, min(len(whole), 400), 3):
                damaged[position] ^= 1 << int(rng.integers(8))
            for function in (images.load, images.size):
                with contextlib.suppress(ImageError):
                    function(bytes(damaged))


def test_size_limit_without_warnings() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.size(png(2**14, 2**14, 8, 2, [])) == (2**14, 2**14)  # more than Pillow's own limit
        for width in (2**14 + 1, 2**16, 2**30):
            with pytest.raises(ImageError, match="pixels"):
                images.load(png(width, 2**14, 8, 2, []))
    with pytest.raises(ImageError):
        images.load(png(0, 1, 8, 2, []))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_interrupt_and_lack_of_memory_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyboardInterrupt, MemoryError):

        def fail(*_: object, error: type[BaseException] = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(error):
            images.load(b"anything")


def test_save_png_round_trip_and_checks() -> None:
    assert np.array_equal(images.load(images.save_png(PHOTO)), PHOTO)
    for wrong in (PHOTO[..., 0], PHOTO.astype(np.float32), PHOTO[:0]):
        with pytest.raises(ValueError, match="expected"):
            images.save_png(wrong)
