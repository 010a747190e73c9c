"""The search for cheaper integers is kept to where it serves a model's own decoder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from codec import effort, model_folder, tables
from codec.adapters import Posterior
from codec.coding import Coder, Settings
from codec.search_limit import search_below
from codec.tables import TableSet

Fitted = tuple[list[np.ndarray], TableSet, np.ndarray, np.ndarray]


class Pixels:
    """Latents are the pixels themselves, f = 1; the decoder is what a test wants."""

    f = 1

    def __init__(self, decoder: Any) -> None:
        self.network = torch.nn.Linear(1, 1)
        self.decoder = decoder

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(x, None)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.decoder(z)
        return out


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """Smooth pictures with noise, and tables for them."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(3):
        noise = rng.laplace(size=(3, 64, 64)) * 12
        image = 128 + noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)
        pictures.append(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    grids = [picture.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1 for picture in pictures]
    z = np.concatenate([grid.reshape(3, -1) for grid in grids], 1)
    mean, step = z.mean(1), 2 * z.std(1)
    return pictures, tables.fit(grids, mean, step), mean, step


def test_a_decoder_that_shows_every_error_alike_is_served(fitted: Fitted) -> None:
    pictures, *coding = fitted
    assert search_below(Pixels(lambda z: z), pictures, *coding) > 8


@pytest.mark.parametrize("harmful_from", [8, 16, 40])
def test_the_limit_lies_below_the_first_quality_that_is_not_served(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch, harmful_from: int
) -> None:
    pictures, *coding = fitted

    def search(z: np.ndarray, mean: np.ndarray, step: np.ndarray, table_set: TableSet, quality: int, level: int) -> Any:
        """Save bits for nothing below the quality; above it throw bits away."""
        nearest = tables.to_indices(z, mean, step, quality)
        if level == 0:
            return nearest
        if quality >= harmful_from:
            return nearest + np.resize([1, -1], nearest.shape).astype(np.int32)
        return effort.search(z, mean, step, table_set, quality, level)

    monkeypatch.setattr("codec.search_limit.effort", SimpleNamespace(search=search))
    limit = search_below(Pixels(lambda z: z), pictures, *coding)
    assert limit == 0 if harmful_from == 8 else harmful_from - 8 <= limit < harmful_from


def test_the_coder_keeps_to_the_limit(fitted: Fitted, tmp_path: Path) -> None:
    pictures, table_set, mean, step = fitted
    info = {"name": "m", "family": "kl", "f": 1, "latent_channels": 3, "decoder_id": "0" * 16, "search_below": 10}
    folder = model_folder.write(tmp_path, info=info, mean=mean, step=step, table_sets=[table_set])
    z = pictures[0].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    data = {
        (quality, level): Coder(folder, "0" * 16).code(z, 64, 64, Settings(quality=quality, effort=level)).data
        for quality in (9, 10)
        for level in (0, 2)
    }
    assert data[9, 2] != data[9, 0]
    assert data[10, 2] == data[10, 0]


def test_without_images_nothing_is_searched(fitted: Fitted) -> None:
    _, *coding = fitted
    assert search_below(Pixels(lambda z: z), [], *coding) == 0
