"""A start for encoders: the Karhunen-Loeve transform of images that are correlated as photographs are.

A downsampling convolution sees blocks of 2 x 2 pixels whole, so a chain of them can hold any transform of f x f blocks,
stage by stage, as far as its widths reach. What transform codes best needs no training to know: the eigenvectors of
the pixels' covariance (Goyal 2001, "Theoretical foundations of transform coding"). They need no images either: pixels
of a first-order Gauss-Markov process, rho = 0.95 between neighbours, with the covariance of photographs' colours, have
nearly the same ones; that is where the discrete cosine transform comes from.
"""

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

RHO = 0.95
"""Correlation of neighbouring pixels."""
COLOURS = ((0.29, 0.25, 0.23), (0.25, 0.27, 0.26), (0.23, 0.26, 0.30))
"""Covariance of R, G and B in [-1, 1], of the photographs in `docs/shipped.md`, rounded."""
_CONTENT = 0.4  # deviation of what passes the encoder's last norm: small beside that norm's anchor
_NOISE = 0.05  # deviation of the posterior's first noise, in units of pixels


def transform(channels: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the transform of each halving, and how much its last coefficients vary.

    Args:
        channels: k of each stage, the number of coefficients kept; at most 4 times the stage before (3 before the
            first).

    Returns:
        One (k, k_before, 2, 2) convolution of stride 2 a stage, mean over the block in place of its sum (so that a flat
        block keeps its value), and the (k,) deviations of the last stage's coefficients, largest first.
    """
    side = 1 << len(channels)
    at = torch.arange(side, dtype=torch.float64)
    line = RHO ** (at[:, None] - at).abs()
    colours = torch.tensor(COLOURS, dtype=torch.float64)
    covariance = torch.einsum("cd,yv,xw->cyxdvw", colours, line, line)  # of the coefficients at each place of a block
    stages = []
    for k in channels:
        before, side = covariance.shape[0], side // 2
        blocks = covariance.reshape(before, side, 2, side, 2, before, side, 2, side, 2)
        first = blocks[:, 0, :, 0, :, :, 0, :, 0, :].reshape(4 * before, 4 * before)
        kernel = torch.linalg.eigh(first).eigenvectors.flip(1)[:, :k].T / 2
        kernel *= torch.where(kernel.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
        kernel = kernel.reshape(k, before, 2, 2)
        covariance = torch.einsum("kcyx,cjyixdmvnw,ldvw->kjilmn", kernel, blocks, kernel)
        stages.append(kernel.float())
    return stages, covariance[:, 0, 0, :, 0, 0].diagonal().sqrt().float()


@torch.no_grad()
def initialize_klt(encoder: Encoder, decoder: Decoder, kept: Sequence[int], latent_channels: int) -> None:
    """Let an encoder, and its decoder's first convolution, start with this transform.

    The latents are its first coefficients, each of deviation 1. Channels that these do not need stay as they are:
    random features of what passes. SiLU behind the last norm lets v pass in a pair v, -v: silu(v) - silu(-v) = v.

    Args:
        encoder: that `train.networks.initialize_linear` has seen, so that all residual branches are zero.
        decoder: its own.
        kept: coefficients that pass each halving.
        latent_channels: D, at most half of the encoder's last width.
    """
    *blocks, last = encoder.down_blocks
    stages, deviations = transform(kept)
    variance, deviations = deviations.square().sum(), deviations[:latent_channels]
    pairs = torch.zeros(2 * latent_channels, kept[-1])
    pairs[0::2, :latent_channels] = torch.diag(_CONTENT / deviations)
    pairs[1::2] = -pairs[0::2]
    if last.resnets[0].conv_shortcut is None:
        stages[-1] = torch.einsum("pk,kcyx->pcyx", pairs, stages[-1])
    _pass(encoder.conv_in, torch.eye(3)[:, :, None, None])
    for block, kernel in zip(blocks, stages, strict=True):
        if block.resnets[0].conv_shortcut is not None:
            _pass(block.resnets[0].conv_shortcut, torch.eye(kernel.shape[1])[:, :, None, None])
        _pass(block.downsamplers[0].conv, kernel)
    if last.resnets[0].conv_shortcut is not None:
        _pass(last.resnets[0].conv_shortcut, pairs[:, :, None, None])
    for attention in encoder.mid_block.attentions:
        if attention is not None:
            nn.init.zeros_(attention.to_out[0].weight)
    nn.init.zeros_(encoder.conv_out.weight)
    nn.init.zeros_(encoder.conv_out.bias)
    back = torch.linalg.pinv(pairs[:, :latent_channels]) / deviations[:, None]
    _pass(encoder.conv_out, back[:, :, None, None])
    if encoder.conv_out.out_channels == 2 * latent_channels:  # log-variances: equal noise in units of pixels
        encoder.conv_out.bias[latent_channels:] = 2 * (_NOISE / deviations).clamp(max=1).log()
    nn.init.normal_(decoder.conv_in.weight)
    decoder.conv_in.weight *= deviations[:, None, None] / (3 * variance.sqrt())


def _pass(conv: nn.Conv2d, kernel: torch.Tensor) -> None:
    """Make the first channels of a convolution those that a kernel gives of its first inputs.

    Args:
        conv: of a kernel at least as large. This one lies in its middle, or with stride 2 at its first row and column:
            diffusers pads a downsampling convolution at the far ends alone.
        kernel: (k, k_before, y, x).
    """
    k, before, y, x = kernel.shape
    assert conv.bias is not None
    conv.weight[:k] = 0
    conv.bias[:k] = 0
    top = (conv.kernel_size[0] - y) // 2 if conv.stride[0] == 1 else 0
    conv.weight[:k, :before, top : top + y, top : top + x] = kernel
