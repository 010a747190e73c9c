"""codec.pictures: every kind of image file through the container to PNG, and what Pillow then sees of it.

The network's part is left out: pixels go through as they are.
"""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from codec import bitstream, images, metadata, pictures
from codec.bitstream import Chunk, Header, Tile
from codec.errors import FormatError, ImageError
from codec.pictures import Picture
from tests.codec.image_files import P3_D50, SRGB_D50, WHITE, encode, gamma, icc, png, rgb_profile
from tests.conftest import photo

PHOTO = photo(40, 48)
GRAY = PHOTO[..., 1]
ALPHA = np.clip(np.add.outer(np.arange(40) * 9, np.arange(48) * 7) - 100, 0, 255).astype(np.uint8)
P3 = rgb_profile(P3_D50, 2.2)
GRAY_PROFILE = icc(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": gamma(1.8)})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def through(data: bytes, strip: bool = False) -> tuple[Picture, Picture, Image.Image]:
    """File -> picture -> chunks -> container -> chunks -> picture -> PNG -> Pillow."""
    picture = pictures.load(data, strip=strip)
    height, width = picture.pixels.shape[:2]
    header = Header(stream_id="00" * 8, decoder_id="11" * 8, quality=50, width=width, height=height, f=8)
    packed = bitstream.pack(header, [Tile(0, 0, b"tile")], pictures.to_chunks(picture))
    contents = bitstream.unpack(packed)
    decoded = pictures.from_chunks(picture.pixels, contents.chunks, contents.header)
    image = Image.open(io.BytesIO(pictures.to_png(decoded)))
    image.load()
    assert image.size == (width, height)
    assert np.array_equal(images.load(pictures.to_png(decoded)), images.load(pictures.to_png(picture)))
    return picture, decoded, image


def look(image: Image.Image) -> np.ndarray:
    """What a viewer that knows profiles shows, on white."""
    return images.load(encode(image, icc_profile=image.info.get("icc_profile"))).astype(int)


# --- kinds of pixels


def test_opaque_rgb_needs_no_chunk() -> None:
    picture, _, image = through(encode(Image.fromarray(PHOTO)))
    assert pictures.to_chunks(picture) == []
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), PHOTO)
    assert {"icc_profile", "exif", "xmp"}.isdisjoint(image.info)
    opaque = np.dstack([PHOTO, np.full((40, 48), 255, dtype=np.uint8)])
    assert pictures.to_chunks(pictures.load(encode(Image.fromarray(opaque)))) == []


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_rgba(kind: str) -> None:
    source = Image.fromarray(np.dstack([PHOTO, ALPHA]))
    picture, _, image = through(encode(source, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert image.mode == "RGBA"
    assert np.array_equal(np.asarray(image)[..., 3], ALPHA)
    assert np.array_equal(np.asarray(image)[ALPHA > 0], np.asarray(source)[ALPHA > 0])
    assert np.abs(look(image) - look(source)).max() == 0
    assert not picture.notes


def test_gray() -> None:
    picture, _, image = through(encode(Image.fromarray(GRAY)))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), GRAY)
    assert np.array_equal(picture.pixels, np.repeat(GRAY[..., None], 3, axis=-1))
    assert pictures.to_chunks(picture) == [Chunk(bitstream.INFO, b"\x01")]
    bilevel = Image.fromarray(GRAY).convert("1")
    assert np.array_equal(np.asarray(through(encode(bilevel))[2]), np.asarray(bilevel) * np.uint8(255))


def test_gray_of_decoded_pixels_is_their_luma() -> None:
    tinted = np.array([[[100, 104, 97], [255, 0, 0]]], dtype=np.uint8)
    decoded = pictures.from_chunks(tinted, [Chunk(bitstream.INFO, b"\x01")])
    expected = [(19595 * r + 38470 * g + 7471 * b + 32768) >> 16 for r, g, b in tinted[0].tolist()]
    assert decoded.pixels.tolist() == [[[y] * 3 for y in expected]]
    assert Image.open(io.BytesIO(pictures.to_png(decoded))).mode == "L"


def test_gray_with_alpha() -> None:
    source = Image.fromarray(np.dstack([GRAY, ALPHA]), "LA")
    _, decoded, image = through(encode(source))
    assert image.mode == "LA"
    assert decoded.gray
    assert np.array_equal(np.asarray(image)[..., 1], ALPHA)
    assert np.array_equal(np.asarray(image)[ALPHA > 0], np.asarray(source)[ALPHA > 0])


def test_palette() -> None:
    source = Image.fromarray(PHOTO).quantize(16)
    _, _, image = through(encode(source))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(source.convert("RGB")))
    for kind in ("PNG", "GIF"):
        data = encode(source, kind, transparency=3)
        _, _, image = through(data)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
        assert image.mode == "RGBA", kind
        assert np.array_equal(np.asarray(image)[..., 3], expected[..., 3])
        assert 0 < (expected[..., 3] == 0).mean() < 1
        assert np.array_equal(np.asarray(image)[expected[..., 3] > 0], expected[expected[..., 3] > 0])


def test_cmyk_without_and_with_profile() -> None:
    source = Image.fromarray(PHOTO).convert("CMYK")
    picture, _, image = through(encode(source, "TIFF"))
    assert np.abs(np.asarray(image).astype(int) - PHOTO).max() <= 1
    assert picture.converted
    assert picture.notes == ("colours converted to sRGB",)
    identity = bytes(range(256))  # the profile of test_images: it looks at black only
    grid = b"".join(bytes([0 if node & 1 else 255, 128, 128]) for node in range(16))
    matrix = struct.pack(">9i", *(65536 if n % 4 == 0 else 0 for n in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + grid + identity * 3
    profile = icc(b"prtr", b"CMYK", b"Lab ", {b"wtpt": WHITE, b"A2B0": lut, b"A2B1": lut})
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    picture, decoded, image = through(encode(cyan, "TIFF", icc_profile=profile))
    assert np.asarray(image).min() >= 253
    assert picture.icc is None
    assert decoded.converted


def test_lab_becomes_srgb() -> None:
    picture, _, image = through(encode(Image.new("RGB", (4, 4), (200, 60, 30)).convert("LAB"), "TIFF"))
    assert np.abs(np.asarray(image)[0, 0].astype(int) - [200, 60, 30]).max() <= 6
    assert picture.converted


def test_16_bits_are_reduced_and_said_so() -> None:
    values = np.arange(12, dtype="<u2").reshape(3, 4) * 5000
    for kind in ("PNG", "TIFF"):
        picture, decoded, image = through(encode(Image.fromarray(values), kind))
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.rint(values / 257).astype(np.uint8))
        assert picture.notes == ("16 bits a sample reduced to 8",)
        assert decoded.deep
    colour = png(2, 1, 16, 2, [struct.pack(">6H", 65535, 0x1234, 0, 0xABCD, 0x80FF, 255)])
    picture, decoded, image = through(colour)
    assert np.asarray(image).tolist() == [[[255, 0x12, 0], [0xAB, 0x80, 0]]]
    assert picture.notes == ("16 bits a sample reduced to 8",)
    assert decoded.deep
    assert not pictures.load(encode(Image.fromarray(PHOTO))).deep


@pytest.mark.parametrize("image", [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 70000)])
def test_what_images_refuses_is_refused(image: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"^x: .*not supported"):
        pictures.load(encode(image, "TIFF"), name="x")
    with pytest.raises(ImageError, match="no such file"):
        pictures.load("missing.png")


# --- colour profiles


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_display_p3_keeps_its_pixels_and_its_profile(kind: str) -> None:
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "AVIF": {"quality": 100}}.get(kind, {})
    data = encode(Image.fromarray(PHOTO), kind, icc_profile=P3, **lossless)
    _, _, image = through(data)
    assert image.info["icc_profile"] == P3
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.array_equal(look(image), images.load(data))
    assert np.abs(look(image) - np.asarray(image)).max() > 5  # the profile matters


def test_srgb_profile_is_dropped_and_changes_nothing() -> None:
    picture, _, image = through(encode(Image.fromarray(PHOTO), icc_profile=SRGB))
    assert "icc_profile" not in image.info
    assert np.array_equal(np.asarray(image), PHOTO)
    assert not picture.notes


def test_gray_profile_is_kept() -> None:
    data = encode(Image.fromarray(np.dstack([GRAY, ALPHA]), "LA"), icc_profile=GRAY_PROFILE)
    _, _, image = through(data)
    assert image.mode == "LA"
    assert image.info["icc_profile"] == GRAY_PROFILE
    assert np.array_equal(look(image), images.load(data))


def test_gray_pixels_with_an_rgb_profile_become_srgb_gray() -> None:
    data = encode(Image.fromarray(GRAY), "JPEG", quality=100, icc_profile=rgb_profile(SRGB_D50, 1.0))
    picture, _, image = through(data)
    assert image.mode == "L"
    assert "icc_profile" not in image.info
    assert np.abs(look(image) - images.load(data)).max() <= 1
    assert picture.converted
    assert picture.pixels.mean() > GRAY.mean() + 20  # linear light is brighter than it looks


def test_tinting_profile_makes_a_colour_image_of_gray_pixels() -> None:
    swapped = SRGB.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    assert pictures.load(encode(Image.fromarray(GRAY), "JPEG", icc_profile=swapped)).gray  # swapped, yet neutral
    tinting = rgb_profile(SRGB_D50, 2.2).replace(gamma(2.2), gamma(1.0), 1)
    data = encode(Image.fromarray(GRAY), "JPEG", icc_profile=tinting)
    _, _, image = through(data)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), images.load(data))


@pytest.mark.parametrize(
    ("profile", "mode", "note"),
    [
        (b"nonsense", "RGB", "ICC profile is broken, left out"),
        (P3[:200], "RGB", "ICC profile is broken, left out"),
        (GRAY_PROFILE, "RGB", "ICC profile of other colours than the pixels, left out"),
        (b"\0" * 300, "L", "ICC profile is broken, left out"),
    ],
)
def test_useless_profile_is_left_out_with_a_note(profile: bytes, mode: str, note: str) -> None:
    picture, _, image = through(encode(Image.fromarray(PHOTO).convert(mode), icc_profile=profile))
    assert picture.notes == (note,)
    assert "icc_profile" not in image.info
    assert np.array_equal(np.asarray(image), np.asarray(Image.fromarray(PHOTO).convert(mode)))


def test_strip_keeps_no_metadata_and_converts_to_srgb() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    source = Image.fromarray(np.dstack([PHOTO, np.maximum(ALPHA, 1)]))
    data = encode(source, icc_profile=P3, exif=exif)
    picture, _, image = through(data, strip=True)
    assert {"icc_profile", "exif", "xmp"}.isdisjoint(image.info)
    opaque = images.load(encode(source.convert("RGB"), icc_profile=P3))
    assert np.array_equal(picture.pixels, opaque)
    assert image.mode == "RGBA"
    assert picture.converted
    gray = pictures.load(encode(Image.fromarray(GRAY), icc_profile=GRAY_PROFILE), strip=True)
    assert gray.gray
    assert np.array_equal(gray.pixels, images.load(encode(Image.fromarray(GRAY), icc_profile=GRAY_PROFILE)))


# --- EXIF and XMP


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_once_and_metadata_kept(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2020:01:02 03:04:05"
    data = encode(Image.fromarray(PHOTO), kind, exif=exif.tobytes())
    picture, _, image = through(data)
    assert np.array_equal(picture.pixels, images.load(data))
    assert image.size == ((48, 40) if orientation < 5 else (40, 48))
    kept = image.getexif()
    assert kept.get(ExifTags.Base.Orientation, 1) == 1
    assert kept[ExifTags.Base.Make] == "Maker"
    assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2020:01:02 03:04:05"


def test_exif_is_kept_byte_by_byte_but_for_the_orientation() -> None:
    for order in "<>":
        entries = [(0x10F, 2, 3, b"me\0\0"), (0x112, 3, 1, struct.pack(order + "H2x", 8)), (0x927C, 7, 4, b"note")]
        body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
        exif = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 3) + body + bytes(4) + b"tail"
        picture, _, image = through(encode(Image.fromarray(PHOTO), "JPEG", exif=b"Exif\0\0" + exif))
        expected = exif.replace(body, body.replace(struct.pack(order + "H2x", 8), struct.pack(order + "H2x", 1)))
        assert picture.exif == expected
        assert image.info["exif"].removeprefix(b"Exif\0\0") == expected


def xmp_packet(orientation: str) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        + orientation.encode()
        + "</rdf:Description></rdf:RDF></x:xmpmeta> \u00e9".encode()
    )


@pytest.mark.parametrize("form", ['tiff:Orientation="{}">', "><tiff:Orientation>{}</tiff:Orientation>"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_of_xmp(kind: str, form: str) -> None:
    stored = xmp_packet(form.format(6))
    image = Image.fromarray(PHOTO)
    if kind == "PNG":
        data = pictures.to_png(Picture(pixels=PHOTO, xmp=stored))
    elif kind == "TIFF":
        data = encode(image, kind, tiffinfo={700: stored})
    else:
        data = encode(image, kind, xmp=stored)
    picture, _, image = through(data)
    assert image.size == (40, 48)
    if kind == "TIFF":  # Pillow takes the orientation out while it decodes
        assert b"Orientation" not in picture.xmp or b"6" not in picture.xmp.split(b"Orientation")[1][:4]
    else:
        assert image.info["xmp"] == xmp_packet(form.format(1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff nonsense", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08"]
)
def test_broken_exif_is_left_out_with_a_note(exif: bytes) -> None:
    picture, _, image = through(encode(Image.fromarray(PHOTO), "JPEG", exif=exif))
    assert picture.notes == ("broken EXIF left out",)
    assert "exif" not in image.info


def test_huge_metadata_is_left_out_with_a_note() -> None:
    limit = metadata.MAX_BYTES
    exif = b"II*\0\x08\0\0\0\0\0" + bytes(limit)
    profile = P3.ljust(limit + 1, b"\0")
    data = encode(Image.fromarray(PHOTO), "WEBP", lossless=True, exif=exif, xmp=b"x" * (limit + 1), icc_profile=profile)
    picture, _, image = through(data)
    assert picture.notes == (
        f"ICC profile of {limit + 1} bytes left out, at most {limit} are kept",
        "colours converted to sRGB",
        f"EXIF of {len(exif)} bytes left out, at most {limit} are kept",
        f"XMP of {limit + 1} bytes left out, at most {limit} are kept",
    )
    assert np.array_equal(np.asarray(image), images.load(data))  # the look is kept all the same


def test_largest_metadata_opens_in_pillow() -> None:
    random = np.random.default_rng(0).bytes(metadata.MAX_BYTES - 8)
    body = b"II*\0\x08\0\0\0" + random
    picture = Picture(pixels=PHOTO, icc=body, exif=body, xmp=body)
    decoded = pictures.from_chunks(PHOTO, pictures.to_chunks(picture))
    info = Image.open(io.BytesIO(pictures.to_png(decoded, compress_level=1))).info
    assert (info["icc_profile"], info["exif"].removeprefix(b"Exif\0\0"), info["xmp"]) == (body,) * 3
    with pytest.raises(ValueError, match="ICC of 1048577 bytes"):
        pictures.to_chunks(Picture(pixels=PHOTO, icc=body + b"x"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_damaged_files_raise_image_error_and_what_loads_can_be_written(kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Orientation] = 6
    options = {"tiffinfo": {700: xmp_packet("")}} if kind == "TIFF" else {"exif": exif.tobytes(), "xmp": xmp_packet("")}
    options = {} if kind == "PNG" else options
    source = Image.fromarray(PHOTO if kind == "JPEG" else np.dstack([PHOTO, ALPHA]))
    whole = encode(source, kind, icc_profile=P3, **options)
    rng = np.random.default_rng(2)
    n_loaded = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on damaged metadata
        for _ in range(120):
            damaged = bytearray(whole)
            for position in rng.integers(0, min(len(whole), 1500), 2):
                damaged[position] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(ImageError):
                through(bytes(damaged))
                n_loaded += 1
    assert n_loaded or kind == "PNG"  # whose chunks have checksums


# --- regions and damage


def test_region_cuts_the_alpha() -> None:
    chunks = pictures.to_chunks(Picture(pixels=PHOTO, alpha=ALPHA))
    header = Header(stream_id="00" * 8, decoder_id="11" * 8, quality=50, width=48, height=40, f=8)
    cut = pictures.from_chunks(PHOTO[10:15, 20:40], chunks, header, (20, 10, 20, 5))
    assert np.array_equal(cut.alpha, ALPHA[10:15, 20:40])


def test_damaged_chunks_are_errors_or_left_out() -> None:
    sound = pictures.to_chunks(Picture(pixels=PHOTO, alpha=ALPHA, icc=P3, exif=b"II*\0 exif", xmp=b"xmp", deep=True))
    for n, chunk in enumerate(sound):
        damaged = [*sound[:n], Chunk(chunk.kind, chunk.body[:-1]), *sound[n + 1 :]]
        with pytest.raises(FormatError, match="damaged"):
            pictures.from_chunks(PHOTO, damaged)
        damage: list[str] = []
        found = pictures.from_chunks(PHOTO, damaged, damage=damage)
        assert len(damage) == 1
        kept = [found.alpha is not None, found.deep, found.icc == P3, found.exif == b"II*\0 exif", found.xmp == b"xmp"]
        assert kept == [number != n for number in range(5)]
    bomb = Chunk(bitstream.XMP, zlib.compress(bytes(1 << 26), 9))
    with pytest.raises(FormatError, match="more than 1048576"):
        pictures.from_chunks(PHOTO, [bomb])
    assert pictures.from_chunks(PHOTO, [Chunk(255, b"unknown")]).icc is None


def test_every_flipped_bit_of_a_deflated_chunk_is_found_or_harmless() -> None:
    picture = Picture(pixels=PHOTO[:8, :8], alpha=ALPHA[:8, 20:28], icc=b"profile" * 9, exif=b"II*\0 exif", xmp=b"xmp")
    chunks = pictures.to_chunks(picture)
    n_found = 0
    for n, chunk in enumerate(chunks):
        for position in range(chunk.kind == bitstream.ALPHA, len(chunk.body)):  # alpha's form has no checksum
            for bit in range(8):
                body = bytearray(chunk.body)
                body[position] ^= 1 << bit
                damage: list[str] = []
                damaged = [*chunks[:n], Chunk(chunk.kind, bytes(body)), *chunks[n + 1 :]]
                found = pictures.from_chunks(picture.pixels, damaged, damage=damage)
                same = (found.icc, found.exif, found.xmp) == (picture.icc, picture.exif, picture.xmp)
                assert damage or (same and np.array_equal(found.alpha, picture.alpha))
                n_found += len(damage)
    assert n_found > 0.9 * 8 * sum(len(chunk.body) for chunk in chunks)


def test_describe() -> None:
    chunks = pictures.to_chunks(Picture(pixels=PHOTO, alpha=ALPHA, gray=True, icc=P3, converted=True))
    told = pictures.describe([*chunks, Chunk(200, b"?")])
    assert told["gray"] is told["converted_to_srgb"] is True
    assert told["source_over_8_bits"] is False
    assert told["alpha_bytes"] == len(chunks[0].body)
    assert (told["exif_bytes"], told["xmp_bytes"], told["unknown_chunks"]) == (0, 0, 1)


def test_picture_checks_its_arrays() -> None:
    for wrong in (PHOTO[..., 0], PHOTO.astype(np.float32), PHOTO[:0]):
        with pytest.raises(ValueError, match="expected"):
            Picture(pixels=wrong)
    with pytest.raises(ValueError, match="expected alpha"):
        Picture(pixels=PHOTO, alpha=ALPHA[:5])
