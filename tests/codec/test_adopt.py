"""Measuring an autoencoder's latents, and fitting a codec to one that has none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from codec.adopt import adopt, random_part
from codec.errors import UsageError
from codec.runtime import Codec
from tests.conftest import photo


def test_tables_are_fitted_to_parts_that_keep_their_neighbours() -> None:
    z = np.arange(2 * 60 * 90, dtype=np.float32).reshape(2, 60, 90)
    places = set()
    for seed in range(20):
        part = random_part(z, 1350, np.random.default_rng(seed))
        assert part.shape == (2, 30, 45)
        top, left = divmod(int(part[0, 0, 0]), 90)
        np.testing.assert_array_equal(part, z[:, top : top + 30, left : left + 45])
        places.add((top, left))
    assert len(places) > 10
    np.testing.assert_array_equal(random_part(z, 5400, np.random.default_rng(0)), z)
    assert random_part(z, 1, np.random.default_rng(0)).shape == (2, 16, 16)
    assert random_part(z[:, :5, :7], 1, np.random.default_rng(0)).shape == (2, 5, 7)


def test_tables_are_those_of_the_training_images(model_dir: Path) -> None:
    pictures = [photo(70, 91, seed=seed) for seed in range(3)]
    before = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    folder = adopt(model_dir, pictures, 3)
    assert {path.name: path.read_bytes() for path in model_dir.iterdir()} == before
    network = AutoencoderKL.from_pretrained(model_dir)
    latents = []
    for picture in pictures:
        x = torch.from_numpy(picture[:, :90]).permute(2, 0, 1)[None].float() / 127.5 - 1  # multiples of f
        with torch.inference_mode():
            latents.append(network.encode(x).latent_dist.mean[0].flatten(1).numpy())
    z = np.concatenate(latents, axis=1)
    np.testing.assert_allclose(folder.mean, z.mean(axis=1), rtol=1e-4, atol=1e-5)
    # The steps' common scale: 0.08 bits per pixel at the coarsest, by order-0 entropy.
    indices = np.rint((z - folder.mean[:, None]) / folder.step[:, None]).astype(int)
    bits = 0.0
    for plane in indices:
        _, counts = np.unique(plane, return_counts=True)
        bits -= float((counts * np.log2(counts / plane.size)).sum())
    assert bits / (4 * z.shape[1]) == pytest.approx(0.08, rel=0.05)

    codec = Codec.load(folder, "cpu", dtype="float32")
    data = codec.encode_many(pictures[0], [0, 100])
    assert len(data[0]) < len(data[1])
    assert adopt(model_dir, pictures, 3).stream_id == folder.stream_id
    assert adopt(model_dir, pictures[:2], 2).stream_id != folder.stream_id


def test_large_images_are_cut_to_their_middle(model_dir: Path) -> None:
    picture = photo(20, 700)
    assert adopt(model_dir, [picture], 1).stream_id == adopt(model_dir, [picture[:, 94:606]], 1).stream_id


def test_no_image_at_all(model_dir: Path) -> None:
    with pytest.raises(UsageError, match="no training image"):
        adopt(model_dir, [np.zeros((1, 30, 3), np.uint8)], 1)
