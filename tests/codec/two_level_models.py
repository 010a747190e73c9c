"""A tiny VQ model of two levels, for tests."""

from typing import Any

import torch

from codec.two_level import TwoLevelVQModel


def two_level_network(seed: int = 0, **more: Any) -> TwoLevelVQModel:
    """Return a TwoLevelVQModel (f4, the fine level f2) of random weights, whose codebooks cover its latents."""
    torch.manual_seed(seed)
    shape = {"block_out_channels": (8, 8, 12), "latent_channels": 4, "vq_embed_dim": 3, "norm_num_groups": 4}
    sizes = {"num_vq_embeddings": 32, "num_coarse_vq_embeddings": 20, "scaling_factor": 0.5}
    network = TwoLevelVQModel(**(shape | sizes | more)).eval()
    for quantize in (network.coarse_quantize, network.quantize):
        torch.nn.init.normal_(quantize.embedding.weight, std=0.5)
    return network
