"""Pictures of every kind through `codec encode` and `codec decode`, with a network that changes next to nothing.

Its weights pass colours through (f = 1, D = 3), so that what comes out can be compared with what Pillow shows of the
source: look, size, mode, alpha, profile.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageOps

from codec import model_folder, tables
from codec.cli import main
from codec.latent_model import decoder_id
from tests.codec.image_files import rgb_profile
from tests.conftest import photo

P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0010, 0.0419, 0.7844]])
"""Display P3's primaries in the profile connection space, a column each."""


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose autoencoder gives back what it gets, to about a level."""
    network = AutoencoderTiny(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
        latent_channels=3,
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        small = 0.2  # where the curve that the decoder begins with is nearly straight
        large = 1 / (3 * np.tanh(small / 3))
        ends = (
            network.encoder.layers[0],
            network.encoder.layers[-1],
            network.decoder.layers[0],
            network.decoder.layers[-1],
        )
        for layer, gain in zip(ends, (1, small, large, 1), strict=True):
            for channel in range(3):
                layer.weight[channel, channel, 1, 1] = gain
    path = tmp_path_factory.mktemp("models") / "clear"
    network.save_pretrained(path)
    mean, step = np.full(3, 0.1, np.float32), np.full(3, 0.06, np.float32)
    grid = small * photo(64, 64).transpose(2, 0, 1).astype(np.float32) / 255
    info = {"name": "clear", "family": "tiny", "f": 1, "latent_channels": 3, "decoder_id": decoder_id(network)}
    model_folder.write(path, info=info, mean=mean, step=step, table_sets=[tables.fit([grid], mean, step)])
    return path


def oval(size: tuple[int, int]) -> Image.Image:
    """Return a soft-edged alpha channel of mode L."""
    y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
    return Image.fromarray((255 * np.clip(1.5 - 1.5 * (x**2 + y**2), 0, 1)).astype(np.uint8))


def through(source: Path, model: Path, *more: str) -> Image.Image:
    """Encode and decode a file by the commands, and open what comes out."""
    folder = source.parent
    command = ["-m", str(model), "--dtype", "float32"]
    assert main(["encode", str(source), "-o", str(folder / "x.lcx"), "-q", "100", *command, *more]) == 0
    assert main(["decode", str(folder / "x.lcx"), "-o", str(folder / "x.png"), *command]) == 0
    image = Image.open(folder / "x.png")
    image.load()
    return image


def difference(one: Image.Image, other: Image.Image, where: np.ndarray | None = None) -> float:
    """Return the mean difference of two images as RGB, in levels, where they are visible."""
    apart = np.abs(np.asarray(one.convert("RGB")).astype(int) - np.asarray(other.convert("RGB"))).mean(axis=2)
    return float(apart.mean() if where is None else apart[where].mean())


@pytest.fixture
def rgb() -> Image.Image:
    return Image.fromarray(photo(45, 61))


def test_rgba_keeps_its_look_and_its_alpha_to_the_bit(rgb: Image.Image, clear: Path, tmp_path: Path) -> None:
    alpha = oval(rgb.size)
    pixels = np.dstack([np.asarray(rgb), np.asarray(alpha)])
    pixels[pixels[..., 3] == 0] = 0  # black under transparency, as programs write it
    Image.fromarray(pixels).save(tmp_path / "s.png")
    out = through(tmp_path / "s.png", clear)
    assert (out.mode, out.size) == ("RGBA", rgb.size)
    np.testing.assert_array_equal(np.asarray(out.getchannel("A")), np.asarray(alpha))
    assert difference(out, rgb, np.asarray(alpha) > 0) < 2


@pytest.mark.parametrize("kind", ["L", "LA", "1"])
def test_gray_stays_gray(kind: str, rgb: Image.Image, clear: Path, tmp_path: Path) -> None:
    source = rgb.convert("L")
    if kind == "LA":
        source.putalpha(oval(rgb.size))
    source = source.convert(kind)
    source.save(tmp_path / "s.png")
    out = through(tmp_path / "s.png", clear)
    assert (out.mode, out.size) == ("LA" if kind == "LA" else "L", rgb.size)
    if kind == "LA":
        np.testing.assert_array_equal(np.asarray(out.getchannel("A")), np.asarray(source.getchannel("A")))
    visible = np.asarray(source.getchannel("A")) > 0 if kind == "LA" else None
    assert difference(out, source, visible) < (4 if kind == "1" else 2)


def test_a_palette_with_transparency_becomes_rgba(rgb: Image.Image, clear: Path, tmp_path: Path) -> None:
    source = rgb.quantize(32)
    hidden = int(np.asarray(source)[20, 20])
    source.save(tmp_path / "s.png", transparency=hidden)
    out = through(tmp_path / "s.png", clear)
    shown = Image.open(tmp_path / "s.png").convert("RGBA")
    assert (out.mode, out.size) == ("RGBA", rgb.size)
    np.testing.assert_array_equal(np.asarray(out.getchannel("A")), np.asarray(shown.getchannel("A")))
    assert difference(out, shown, np.asarray(source) != hidden) < 2


def test_cmyk_becomes_srgb(rgb: Image.Image, clear: Path, tmp_path: Path) -> None:
    rgb.convert("CMYK").save(tmp_path / "s.jpg", quality=98)
    out = through(tmp_path / "s.jpg", clear)
    assert (out.mode, out.size) == ("RGB", rgb.size)
    assert difference(out, rgb) < 4


@pytest.mark.parametrize("alpha", [False, True])
def test_16_bits_become_8_of_the_same_look(alpha: bool, rgb: Image.Image, clear: Path, tmp_path: Path) -> None:
    gray = rgb.convert("L")
    if alpha:
        import imagecodecs

        deep = np.dstack([np.asarray(rgb), np.asarray(oval(rgb.size))]).astype(np.uint16) * 257
        (tmp_path / "s.png").write_bytes(imagecodecs.png_encode(deep))
        out = through(tmp_path / "s.png", clear)
        assert out.mode == "RGBA"
        assert difference(out, rgb, deep[..., 3] > 0) < 2
    else:
        Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / "s.png")
        out = through(tmp_path / "s.png", clear)
        assert out.mode == "L"
        assert difference(out, gray) < 2
    assert out.size == rgb.size


def test_display_p3_keeps_its_profile_and_with_strip_its_look(rgb: Image.Image, clear: Path, tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = rgb_profile(P3, 2.2)
    rgb.save(tmp_path / "s.png", icc_profile=profile)
    out = through(tmp_path / "s.png", clear)
    assert (out.mode, out.size) == ("RGB", rgb.size)
    assert out.info["icc_profile"] == profile
    assert difference(out, rgb) < 2
    (tmp_path / "x.lcx").unlink()
    (tmp_path / "x.png").unlink()
    stripped = through(tmp_path / "s.png", clear, "--strip")
    assert "icc_profile" not in stripped.info
    in_srgb = ImageCms.profileToProfile(
        rgb,
        ImageCms.ImageCmsProfile(_file(profile)),
        ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    assert isinstance(in_srgb, Image.Image)
    assert difference(stripped, in_srgb) < 2 < difference(rgb, in_srgb)


def _file(data: bytes) -> object:
    import io

    return io.BytesIO(data)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_rotated_photograph_comes_out_upright_and_once(
    orientation: int, rgb: Image.Image, clear: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "a view"
    rgb.save(tmp_path / "s.jpg", quality=98, exif=exif)
    out = through(tmp_path / "s.jpg", clear)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "s.jpg"))
    assert out.size == upright.size == (rgb.size if orientation == 3 else rgb.size[::-1])
    assert (out.getexif()[0x0112], out.getexif()[0x010E]) == (1, "a view")
    assert difference(ImageOps.exif_transpose(out), upright) < 2
