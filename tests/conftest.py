"""Fixtures for all tests: synthetic photographs, and tiny real models made in a second."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from codec import images, model_folder, tables
from codec.latent_model import KLModel, decoder_id
from codec.pixels import to_float


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Torch's threads wait for each other on a busy machine; the networks here are too small to gain from two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _nothing_from_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No perceptual features or models that the machine happens to have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        for name in ("LATENT_CODEC_FEATURES", "CODEC_MODELS"):
            patch.delenv(name, raising=False)
        patch.setattr(model_folder, "PACKAGE_MODELS", tmp_path_factory.mktemp("none"))
        yield


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth, photograph-like (H, W, 3) uint8 picture: shaded blobs and an edge, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.zeros((height, width, 3))
    for _ in range(6):
        centre, scale = rng.random(2) * (height, width), (0.1 + 0.4 * rng.random()) * max(height, width, 4)
        blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / scale**2)
        image += blob[..., None] * rng.normal(0, 90, 3)
    image[(x + 0.5 * y) > 0.8 * width] += 40
    return np.clip(image + 120 + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """A folder tree with three PNG photographs of different sizes."""
    folder = tmp_path / "photos"
    for n, (name, size) in enumerate({"a.png": (96, 80), "sub/b.png": (50, 70), "sub/c.png": (64, 64)}.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(photo(*size, seed=n)))
    return folder


def make_model(path: Path, seed: int = 0, channels: int = 4) -> Path:
    """Write the model folder of a tiny AutoencoderKL (f2) with random weights and fitted tables; return the folder."""
    torch.manual_seed(seed)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()
    network.save_pretrained(path)
    with torch.no_grad():
        z = KLModel(network).encode(to_float(photo(64, 64))[None]).mean[0].numpy()
    mean, step = z.mean(axis=(1, 2)), 4 * z.std(axis=(1, 2))
    info = {
        "name": path.name,
        "family": "kl",
        "f": 2,
        "latent_channels": channels,
        "decoder_id": decoder_id(network),
    }
    model_folder.write(path, info=info, mean=mean, step=step, table_sets=[tables.fit([z], mean, step)])
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder, shared by all tests: do not change it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def new_model(tmp_path: Path) -> Callable[..., Path]:
    """Make further tiny model folders: new_model(name, seed=1, channels=4)."""
    return lambda name, **how: make_model(tmp_path / name, **how)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """All that was printed since it was last asked."""
    captured = capsys.readouterr()
    return captured.out + captured.err
