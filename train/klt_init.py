"""A start for autoencoders: the Karhunen-Loeve transform of images that are correlated as photographs are.

A downsampling convolution sees blocks of 2 x 2 pixels whole, so a chain of them can hold any transform of f x f blocks,
stage by stage, as far as its widths reach. What transform codes best needs no training to know: the eigenvectors of
the pixels' covariance (Goyal 2001, "Theoretical foundations of transform coding"). They need no images either: pixels
of a first-order Gauss-Markov process, rho = 0.95 between neighbours, with the covariance of photographs' colours, have
nearly the same ones; that is where the discrete cosine transform comes from.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

RHO = 0.95
"""Correlation of neighbouring pixels."""
COLOURS = ((0.29, 0.25, 0.23), (0.25, 0.27, 0.26), (0.23, 0.26, 0.30))
"""Covariance of R, G and B in [-1, 1], of photographs, rounded."""
ANCHOR = 3.0
"""Size of the pattern that `train.networks.initialize_linear` gives to the channels before the last norms."""
_CONTENT = 0.4  # deviation of what passes the encoder's last norm: small beside that norm's anchor
_QUIET = 0.1  # of the channels beside it there
NOISE = 0.05
"""Deviation of the noise on coefficients that the guess expects, and of the posterior at first; units of pixels."""


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
    line = _line(side)
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


def equal_steps(kept: Sequence[int], latent_channels: int) -> torch.Tensor:
    """Return steps of the latents of `initialize_klt`, (D,), whose errors are equal in the image.

    Under the inverse of the transform, that is; the decoder's guess, which cannot be that, passes less of the last.
    """
    return 1 / transform(kept)[1][:latent_channels]


def synthesis(stages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return how a decoder best guesses what each stage has taken, coarsest stage first.

    A decoder doubles each place and convolves by 3 x 3: linear, but not any linear map, so the transform's inverse is
    not among them. This is the least squares estimate under the covariance above, with NOISE on
    the coefficients.

    Args:
        stages: of `transform`.

    Returns:
        (k_before, k, 3, 3) convolutions of the doubled coefficients.
    """
    kernels = [torch.eye(3, dtype=torch.float64)[:, :, None, None]]  # (k, 3, side, side), from pixels
    for stage in stages:
        k, side = len(stage), 2 * kernels[-1].shape[-1]
        kernels.append(torch.einsum("kbyx,bcij->kcyixj", stage.double(), kernels[-1]).reshape(k, 3, side, side))
    found = []
    for fine, coarse in reversed(list(itertools.pairwise(kernels))):
        k, side, half = len(coarse), coarse.shape[-1], fine.shape[-1]
        line = _line(3 * side)
        colours = torch.tensor(COLOURS, dtype=torch.float64)
        known = torch.zeros(3, 3, k, 3, 3 * side, 3 * side, dtype=torch.float64)  # coefficients of 3 x 3 blocks
        for row, column in itertools.product(range(3), range(3)):
            known[row, column, :, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = coarse
        spread = torch.einsum("pqkcyx,cd,yv,xw->pqkdvw", known, colours, line, line)
        covariance = torch.einsum("pqkdvw,rsldvw->pqkrsl", spread, known)
        covariance += NOISE**2 * torch.eye(9 * k, dtype=torch.float64).reshape(covariance.shape)
        left = torch.zeros(9 * k, 9 * k, dtype=torch.float64)
        right = torch.zeros(9 * k, len(fine), dtype=torch.float64)
        for row, column in itertools.product(range(2), range(2)):
            rows, columns = ([(at + tap) // 2 + 1 for tap in (-1, 0, 1)] for at in (row, column))
            seen = covariance[rows][:, columns][:, :, :, rows][:, :, :, :, columns]
            left += seen.reshape(9 * k, 9 * k)
            y, x = side + row * half, side + column * half
            crossed = torch.einsum("pqkdvw,ldvw->pqkl", spread[..., y : y + half, x : x + half], fine)
            right += crossed[rows][:, columns].reshape(9 * k, -1)
        solved = torch.linalg.solve(left, right)
        found.append(solved.reshape(3, 3, k, -1).permute(3, 2, 0, 1).float())
    return found


def _line(side: int) -> torch.Tensor:
    """Covariance of the pixels of a line, (side, side), of variance 1."""
    at = torch.arange(side, dtype=torch.float64)
    line: torch.Tensor = RHO ** (at[:, None] - at).abs()
    return line


@torch.no_grad()
def initialize_klt(
    encoder: Encoder, decoder: Decoder, kept: Sequence[int], latent_channels: int, *, white: bool = True
) -> None:
    """Let an encoder start as this transform, and its decoder as the guess of what it took, both in place.

    The latents (raw) are its first coefficients, each of deviation 1 or the first one alone. Channels that these do not
    need stay as they are: random features of what passes. SiLU behind the last norm lets v pass in a pair v, -v:
    silu(v) - silu(-v) = v.

    Args:
        encoder: of images (B, 3, H, W) in [-1, 1], f = 2^len(kept), widths that do not fall; one that
            `train.networks.initialize_linear` has seen, so that all residual branches are zero.
        decoder: its own.
        kept: coefficients that pass each halving, see `train.config.ModelConfig.klt_channels`.
        latent_channels: D, 1 to half of the encoder's last width and to the last of `kept`.
        white: give all latents deviation 1; False = only the first, and the others by as much less as they count in the
            image: for quantisers that take the nearest vector, which then is nearest in the image, too.

    Raises:
        RuntimeError: from torch, where the widths cannot hold it; `train.config.Config` has refused these.
    """
    *blocks, last = encoder.down_blocks
    stages, deviations = transform(kept)
    deviations = deviations[:latent_channels]
    units = deviations if white else deviations[:1].expand(latent_channels)
    pairs = torch.zeros(2 * latent_channels, kept[-1])
    pairs[0::2, :latent_channels] = torch.diag(_CONTENT / deviations)
    pairs[1::2] = -pairs[0::2]
    analysis = [*stages]
    if last.resnets[0].conv_shortcut is None:
        analysis[-1] = torch.einsum("pk,kcyx->pcyx", pairs, stages[-1])
    _pass(encoder.conv_in, torch.eye(3)[:, :, None, None])
    for block, kernel in zip(blocks, analysis, strict=True):
        _pass_block(block, block.downsamplers[0].conv, kernel)
    back = 2 * torch.linalg.pinv(pairs[:, :latent_channels]) / units[:, None]
    _pass_out(encoder, last, pairs, back)
    if encoder.conv_out.out_channels == 2 * latent_channels:  # log-variances: equal noise in units of pixels
        encoder.conv_out.bias[latent_channels:] = 2 * (NOISE / units).clamp(max=1).log()
    _pass(decoder.conv_in, torch.diag(units)[:, :, None, None])
    pairs = torch.eye(3).repeat_interleave(2, dim=0) * (_CONTENT / COLOURS[1][1] ** 0.5)
    pairs[1::2] *= -1
    *ups, final = decoder.up_blocks
    for block, kernel in zip(ups, synthesis([*stages[:-1], stages[-1][:latent_channels]]), strict=True):
        if block is ups[-1] and final.resnets[0].conv_shortcut is None:
            kernel = torch.einsum("pk,kcyx->pcyx", pairs, kernel)
        _pass_block(block, block.upsamplers[0].conv, kernel)
    _pass_out(decoder, final, pairs, 2 * torch.linalg.pinv(pairs))
    for part in (encoder, decoder):
        levels = [*(encoder.down_blocks if part is encoder else decoder.up_blocks), part.mid_block]
        for resnet in (resnet for level in levels for resnet in level.resnets):
            if resnet.conv2.bias.abs().max() < ANCHOR:
                nn.init.zeros_(resnet.conv2.bias)
        for attention in part.mid_block.attentions:
            if attention is not None:
                nn.init.zeros_(attention.to_out[0].weight)
                nn.init.zeros_(attention.to_out[0].bias)


def _pass_block(block: Any, conv: nn.Conv2d, kernel: torch.Tensor) -> None:
    """Let a block's first channels pass its shortcut as they are, and its convolution between levels by a kernel."""
    if block.resnets[0].conv_shortcut is not None:
        _pass(block.resnets[0].conv_shortcut, torch.eye(kernel.shape[1])[:, :, None, None])
    _pass(conv, kernel)


def _pass_out(part: Encoder | Decoder, last: Any, pairs: torch.Tensor, back: torch.Tensor) -> None:
    """Let what passes go through the last norm and SiLU in pairs v, -v.

    Args:
        part: whose norm and last convolution these are.
        last: its last block before them; a block without a shortcut has its pairs from the convolution before it.
        pairs: (2 k, k_before), what becomes of the channels.
        back: (k, 2 k), its inverse behind SiLU.
    """
    if last.resnets[0].conv_shortcut is not None:
        _pass(last.resnets[0].conv_shortcut, pairs[:, :, None, None], _QUIET)
    norm = part.conv_norm_out  # its weight is the deviation that it will divide by: the anchor's, and the pairs' share
    norm.weight.fill_((ANCHOR**2 + len(pairs) / norm.num_channels * _CONTENT**2) ** 0.5)
    nn.init.zeros_(part.conv_out.weight)
    _pass(part.conv_out, back[:, :, None, None])


def _pass(conv: nn.Conv2d, kernel: torch.Tensor, others: float = 1.0) -> None:
    """Make the first channels of a convolution those that a kernel gives of its first inputs.

    Args:
        conv: of a kernel at least as large. This one lies in its middle, or with stride 2 at its first row and column:
            diffusers pads a downsampling convolution at the far ends alone.
        kernel: (k, k_before, y, x).
        others: what the weights of the other channels are multiplied by.
    """
    k, before, y, x = kernel.shape
    assert conv.bias is not None
    conv.weight[:k] = 0
    conv.weight[k:] *= others
    conv.bias.zero_()
    top = (conv.kernel_size[0] - y) // 2 if conv.stride[0] == 1 else 0
    conv.weight[:k, :before, top : top + y, top : top + x] = kernel
