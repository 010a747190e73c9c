"""Tiny VQ models with fitted index tables, for tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel

from codec import adopt
from codec.latent_model import CodebookModel, TwoLevelModel
from tests.codec.two_level_models import two_level_network
from tests.conftest import photo


def make_vq(path: Path, seed: int = 0, k: int = 32, **more: Any) -> Path:
    """Write the model folder of a tiny VQModel (f2) with random weights and fitted tables; return the folder."""
    return _with_tables(path, CodebookModel(vq_network(seed, k, **more)))


def make_two_level(path: Path, seed: int = 0, **more: Any) -> Path:
    """Write the model folder of a tiny TwoLevelVQModel (f4, two index maps) in the same way; return the folder."""
    return _with_tables(path, TwoLevelModel(two_level_network(seed, **more)))


def _with_tables(path: Path, model: CodebookModel) -> Path:
    network: Any = model.network
    network.save_pretrained(path)
    measured = adopt.measure_indices(model, [photo(64, 64, seed=n) for n in range(6)], 6)
    assert measured is not None
    adopt.write_vq(path, model, measured)
    return path


def vq_network(seed: int = 0, k: int = 32, **more: Any) -> VQModel:
    """Return a VQModel whose codebook covers its latents."""
    torch.manual_seed(seed)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=k,
        scaling_factor=0.5,
        **({"block_out_channels": (8, 16)} | more),
    ).eval()
    torch.nn.init.normal_(network.quantize.embedding.weight, std=0.5)
    return network
