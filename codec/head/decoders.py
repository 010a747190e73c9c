"""Decoders of a head: features of every position -> p(z|u, c) of standardised latents z.

    gaussian:       features -> mean; one variance for each channel
    flow-matching:  z_t, features, t, vector -> U-Net -> velocity: latents are drawn by following it from noise

Imports torch alone.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codec.head.blocks import Blocks, Double, Halve, norm, start_small, widths
from codec.head.config import WIDTH_UNIT, NetworkConfig, Space
from codec.head.gaussian import LEAST_LOGVAR, MOST_LOGVAR, Gaussian
from codec.rectified_flow import mix

HEAD = 32
"""Channels of an attention head; half as many where these do not divide a grid's."""
_MOST_ATTENDED = 256  # positions of a grid that attention looks at


class GaussianDecoder(nn.Module):
    """A mean at every position, a variance for each channel."""

    def __init__(self, config: NetworkConfig, space: Space) -> None:
        super().__init__()
        self.norm = norm(config.width)
        self.last = nn.Conv2d(config.width, space.channels, 3, padding=1)
        self.logvar = nn.Parameter(torch.zeros(space.channels))

    def forward(self, x: Tensor) -> Gaussian:
        """Return p(z|u, c), (B, D, h, w), of features (B, width, h, w)."""
        mean = self.last(F.silu(self.norm(x))).float()
        logvar = self.logvar.float().clamp(LEAST_LOGVAR, MOST_LOGVAR)[:, None, None]
        return Gaussian(mean, logvar.expand_as(mean))

    def error(self, z: Tensor, x: Tensor) -> Tensor:
        """Return -log p(z|u, c) in nats, mean over D, h, w: (B,)."""
        found: Gaussian = self(x)
        return -found.log_prob(z).mean((1, 2, 3))


class Attention(nn.Module):
    """Every position looks at all others, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.n_heads = channels // (HEAD if channels % HEAD == 0 else WIDTH_UNIT)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        start_small(self.out, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, h, w) of the same."""
        b, c, h, w = x.shape
        qkv: Tensor = self.qkv(self.norm(x))
        q, k, v = qkv.reshape(b, 3, self.n_heads, c // self.n_heads, h * w).transpose(3, 4).unbind(1)
        found = F.scaled_dot_product_attention(q, k, v)  # (B, heads, h*w, C / heads)
        out: Tensor = x + self.out(found.transpose(2, 3).reshape(b, c, h, w))
        return out


class _Level(nn.Module):
    """Blocks at one grid, and attention where it is small."""

    def __init__(self, channels_in: int, channels: int, features: int, depth: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.blocks = Blocks(channels_in, channels, features, depth)
        self.attention = Attention(channels) if math.prod(size) <= _MOST_ATTENDED else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        out: Tensor = self.attention(self.blocks(x, e))
        return out


class FlowDecoder(nn.Module):
    """The velocity of a rectified flow (`codec.rectified_flow`) from noise to latents, given units and condition.

    Features enter beside z_t; time and the vector of units and condition modulate every block.
    """

    def __init__(self, config: NetworkConfig, space: Space, features: int) -> None:
        super().__init__()
        self.grids = space.grids
        channels = widths(config.width, len(self.grids))
        levels = list(zip(channels, self.grids, strict=True))
        self.features = features
        self.time = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features))
        self.vector = nn.Linear(features, features)
        self.first = nn.Conv2d(space.channels + config.width, channels[0], 3, padding=1)
        before = [channels[0], *channels[:-1]]
        self.down = nn.ModuleList(
            _Level(c_in, c, features, config.depth, size) for c_in, (c, size) in zip(before, levels, strict=True)
        )
        self.coarser = nn.ModuleList(Halve(c) for c in channels[:-1])
        after = [*channels[1:], channels[-1]]
        self.up = nn.ModuleList(
            _Level(c_in + c, c, features, config.depth, size) for c_in, (c, size) in zip(after, levels, strict=True)
        )
        self.finer = nn.ModuleList(Double(c) for c in channels[1:])
        self.norm = norm(channels[0])
        self.last = nn.Conv2d(channels[0], space.channels, 3, padding=1)
        start_small(self.last, 0.0)

    def forward(self, z_t: Tensor, t: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """Return the velocity, (B, D, h, w) float32.

        Args:
            z_t: (B, D, h, w) standardised latents and noise, see `codec.rectified_flow.mix`.
            t: (B,) in [0, 1].
            x: (B, width, h, w) features of units and condition.
            v: (B, features) vector of units and condition.
        """
        e = F.silu(self.time(_waves(t, self.features)) + self.vector(v))
        y, kept = self.first(torch.cat([z_t, x], dim=1)), []
        for number, level in enumerate(self.down):
            y = level(y if number == 0 else self.coarser[number - 1](y), e)
            kept.append(y)
        for number in reversed(range(len(self.grids))):
            if number < len(self.grids) - 1:
                y = self.finer[number](y, self.grids[number])
            y = self.up[number](torch.cat([y, kept[number]], dim=1), e)
        velocity: Tensor = self.last(F.silu(self.norm(y))).float()
        return velocity

    def error(self, z: Tensor, x: Tensor, v: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the squared error of the velocity at z_t, mean over D, h, w: (B,)."""
        z_t, velocity = mix(z, noise, t)
        predicted: Tensor = self(z_t, t, x, v)
        return (predicted - velocity).square().mean((1, 2, 3))


def _waves(t: Tensor, n: int) -> Tensor:
    """Return cosines and sines of times, (B, n) float32, of 1 to 1000 radians on the way from 0 to 1."""
    rates = torch.exp(torch.linspace(0, math.log(1000), n // 2, device=t.device))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
