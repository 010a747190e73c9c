"""Latents that every pipeline normalizes alike, whether or not it knows `shift_factor`.

    encoder -> quant_conv -> z - mean -> post_quant_conv(z - mean + mean) -> decoder

Pipelines of Stable Diffusion 1 and 2, SDXL, PixArt, DiT and latent diffusion ignore `shift_factor`: a model trained on
latents from which it was taken gets images of another tone from them. With the mean inside the weights, or left alone,
all agree.
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from codec.adopt import Measured


def measured_shift(network: nn.Module, mean: float) -> float:
    """Return the `shift_factor` for a network whose normalisation is measured; `mean`: of its latents.

    It is the mean where the pipelines that such a network is for apply it, which are those of Stable Diffusion 3 and
    Flux: their AutoencoderKL has no quant convolutions. Else 0: what the others ignore must not be there.
    """
    applied = isinstance(network, AutoencoderKL) and network.quant_conv is None and network.post_quant_conv is None
    return mean if applied else 0.0


def centred(network: nn.Module, measured: Measured) -> tuple[nn.Module, Measured]:
    """Return a copy of a network whose latents have mean zero in every channel, and what measuring it would say.

    Only the biases of `quant_conv` and `post_quant_conv` change, so that the reconstruction stays the same but for
    rounding. A network without them is returned as it is, as is one of another class: the padding of 3 x 3 convolutions
    is zero, whatever the latents' mean.

    Args:
        network: an autoencoder of diffusers.
        measured: its latents.
    """
    if not isinstance(network, AutoencoderKL) or network.quant_conv is None or network.post_quant_conv is None:
        return network, measured
    mean = measured.summary.mean.astype(np.float32)
    moved = copy.deepcopy(network)
    with torch.no_grad():
        shift = torch.from_numpy(mean).to(moved.quant_conv.bias)
        moved.quant_conv.bias[: len(mean)] -= shift  # the mean's half of the moments; the rest is the log-variance
        moved.post_quant_conv.bias += moved.post_quant_conv.weight[:, :, 0, 0] @ shift
    summary = measured.summary
    global_std = float(np.sqrt((summary.std**2).mean()))
    new = replace(
        summary,
        mean=np.zeros_like(summary.mean),
        kl_nats=summary.kl_nats - 0.5 * summary.mean**2,
        global_mean=0.0,
        global_std=global_std,
        sampled_std=float(np.sqrt(global_std**2 + (summary.posterior_std**2).mean())),
    )
    return moved, replace(measured, summary=new, grids=[grid - mean[:, None, None] for grid in measured.grids])
