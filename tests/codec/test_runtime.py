import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from codec import Codec, bitstream
from codec.coding import Settings
from codec.errors import FormatError, ModelError
from codec.pixels import to_float, to_uint8
from tests.conftest import make_model, photo


@pytest.fixture(scope="module")
def codec(model_dir: Path) -> Codec:
    return Codec.load(model_dir, "cpu", dtype="float32")


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (1, 40), (255, 257), (512, 768)])
def test_the_output_has_the_size_of_the_input(codec: Codec, size: tuple[int, int]) -> None:
    image = photo(*size)
    header = bitstream.read_header(codec.encode(image, 60))
    assert (header.height, header.width, header.quality) == (*size, 60)
    decoded = codec.decode(codec.encode(image, 60))
    assert (decoded.shape, decoded.dtype) == ((*size, 3), np.uint8)


@pytest.mark.slow
def test_a_12_megapixel_image_keeps_its_size(tmp_path: Path) -> None:
    image = np.tile(photo(750, 500), (4, 8, 1))
    codec = Codec.load(make_model(tmp_path / "m"))
    assert codec.decode(codec.encode(image)).shape == (3000, 4000, 3)


def test_the_file_holds_the_latents_of_diffusers_own_encoder(codec: Codec, model_dir: Path) -> None:
    """The whole path against an independent one: pad, mode, round, dequantise, decode, crop."""
    image = photo(33, 46)
    vae = AutoencoderKL.from_pretrained(model_dir).eval()
    padded = np.concatenate([image, image[-1:]])  # 34 x 46, f = 2
    z = vae.encode(to_float(padded)[None]).latent_dist.mode().detach()[0].numpy()
    plain = codec.encode(image, settings=Settings(quality=40, effort=0))
    header, indices = codec.indices(plain)
    folder = codec.coder.folder
    step = folder.step.astype(np.float64) * 2 ** (-40 / 16)
    np.testing.assert_array_equal(indices, np.rint((z - folder.mean[:, None, None]) / step[:, None, None]))
    z_q = codec.coder.dequantise(header, indices)
    assert np.abs(z_q - z).max() <= step.max()  # wherever in its cell an index is put
    expected = to_uint8(vae.decode(torch.from_numpy(z_q)[None]).sample[0])[:33, :46]
    assert np.abs(codec.decode(plain).astype(int) - expected).max() <= 1


def test_higher_quality_means_more_bytes_and_finer_latents(codec: Codec) -> None:
    image = photo(64, 64, seed=3)
    z = codec.latents(image)
    sizes, errors = [], []
    for quality in (0, 25, 50, 75, 100):
        data = codec.encode(image, quality)
        sizes.append(len(data))
        errors.append(np.abs(codec.coder.dequantise(*codec.indices(data)) - z).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert np.abs(codec.decode(codec.encode(image, 100)).astype(int) - codec.reconstruct(image)).mean() < 1


def test_encode_many_gives_the_bytes_of_encode(codec: Codec) -> None:
    image = photo(40, 30)
    assert codec.encode_many(image, [10, 90]) == [codec.encode(image, 10), codec.encode(image, 90)]


def test_two_processes_give_identical_bytes(codec: Codec, model_dir: Path, tmp_path: Path) -> None:
    image = photo(57, 43)
    np.save(tmp_path / "image.npy", image)
    script = (
        "import sys, numpy as np, torch; torch.set_num_threads(1); from codec import Codec;"
        "sys.stdout.buffer.write(Codec.load(sys.argv[1], 'cpu', dtype='float32').encode(np.load(sys.argv[2]), 70))"
    )
    command = [sys.executable, "-c", script, str(model_dir), str(tmp_path / "image.npy")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == codec.encode(image, 70)


def test_every_flipped_byte_and_every_truncation_is_a_format_error(codec: Codec) -> None:
    data = codec.encode(photo(16, 16), 30)
    for n in range(len(data)):
        with pytest.raises(FormatError):
            codec.decode(data[:n])
        with pytest.raises(FormatError):
            codec.decode(data[:n] + bytes([data[n] ^ 0x10]) + data[n + 1 :])


def test_a_file_of_another_model_is_refused_by_its_stream_id(codec: Codec, new_model: Callable[..., Path]) -> None:
    other = Codec.load(new_model("other", seed=7))
    with pytest.raises(ModelError, match=f"needs stream {other.stream_id}, tiny has {codec.stream_id}"):
        codec.decode(other.encode(photo(16, 16)))


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_what_is_no_rgb_image_is_a_value_error(codec: Codec, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
        codec.encode(image)


@pytest.mark.parametrize("quality", [-1, 101])
def test_quality_out_of_range_is_a_value_error(codec: Codec, quality: int) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.100"):
        codec.encode(photo(8, 8), quality)


def test_weights_that_do_not_fit_the_tables_are_refused(model_dir: Path, new_model: Callable[..., Path]) -> None:
    wide = new_model("wide", channels=6)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (wide / name).write_bytes((model_dir / name).read_bytes())
    with pytest.raises(ModelError, match="6 channels"):
        Codec.load(wide)


def test_pixels_convert_exactly_and_clamp() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = to_float(every)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(x), every)
    beyond = to_uint8(x * 2)
    assert (beyond[0, 0, 0], beyond[-1, -1, 0]) == (0, 255)  # not wrapped around
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(x * float("nan"))
