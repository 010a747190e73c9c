"""A tiny VQModel whose codebook is spread over its latents, for the tests of tokens."""

from pathlib import Path

import torch
from diffusers import VQModel

from codec.pixels import to_float
from tests.conftest import photo


def make_vq(path: Path, seed: int = 0, codebook_size: int = 16) -> Path:
    """Write the diffusers folder of a tiny VQModel (f4) with random weights; return the folder."""
    torch.manual_seed(seed)
    network = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=codebook_size,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    with torch.no_grad():
        z = torch.cat([network.encode(to_float(photo(64, 64, seed=n))[None]).latents for n in range(8)])
        vectors = z.movedim(1, -1).flatten(0, -2)
        network.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:codebook_size]])
    network.save_pretrained(path)
    return path
