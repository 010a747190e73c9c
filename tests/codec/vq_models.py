"""A tiny VQModel with fitted index tables, for tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel

from codec import adopt
from codec.latent_model import CodebookModel
from tests.conftest import photo


def make_vq(path: Path, seed: int = 0, k: int = 32, **more: Any) -> Path:
    """Write the model folder of a tiny VQModel (f2) with random weights and fitted tables; return the folder."""
    network = vq_network(seed, k, **more)
    network.save_pretrained(path)
    model = CodebookModel(network)
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
