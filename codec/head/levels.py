"""The way up and the way down of a head: latents -> units, units -> features; the second level in between.

    z, e -> Encoder: grid by grid down to 4 x 4 or less -> posterior of u1, features on the second level's grid
    u1, e -> TopDown.upper -> features there -> Second: prior and posterior of u2 -> TopDown.lower -> features

Imports torch alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codec.head.blocks import Blocks, Double, Halve, norm, start_small, widths
from codec.head.config import NetworkConfig, Space
from codec.head.gaussian import Gaussian


@dataclass(frozen=True)
class Encoded:
    """What the way up gives.

    Attributes:
        posterior: q(u1|z, c) before any flow, (B, U).
        context: (B, features) float32 of a flow after it; None without.
        features: (B, C, h2, w2) on the second level's grid.
    """

    posterior: Gaussian
    context: Tensor | None
    features: Tensor


class Encoder(nn.Module):
    """Standardised latents and condition -> q(u1|z, c)."""

    def __init__(self, config: NetworkConfig, space: Space, features: int) -> None:
        super().__init__()
        grids, channels = space.grids, widths(config.width, len(space.grids))
        self._second = space.second
        self.first = nn.Conv2d(space.channels, channels[0], 3, padding=1)
        before = [channels[0], *channels[:-1]]
        self.blocks = nn.ModuleList(
            Blocks(c_in, c, features, config.depth) for c_in, c in zip(before, channels, strict=True)
        )
        self.coarser = nn.ModuleList(Halve(c) for c in channels[:-1])
        self.norm = norm(channels[-1])
        n_last = channels[-1] * grids[-1][0] * grids[-1][1]
        self.last = nn.Linear(n_last, 2 * config.units)
        self.context = nn.Linear(n_last, features) if config.posterior == "iaf" else None

    def forward(self, z: Tensor, e: Tensor) -> Encoded:
        """Return what stands for z, (B, D, h, w) standardised, under e, (B, features)."""
        x, kept = self.first(z), z
        for number, blocks in enumerate(self.blocks):
            x = blocks(x if number == 0 else self.coarser[number - 1](x), e)
            if number == self._second:
                kept = x
        flat = F.silu(self.norm(x)).flatten(1).float()
        with torch.autocast(z.device.type, enabled=False):  # what the KL is made of
            context = None if self.context is None else self.context(flat) + e.float()
            return Encoded(Gaussian.of(self.last(flat)), context, kept)


class TopDown(nn.Module):
    """Units and condition -> features of every position, for the decoder."""

    def __init__(self, config: NetworkConfig, space: Space, features: int) -> None:
        super().__init__()
        self.grids = space.grids
        self._split = space.second if config.levels == 2 else 0
        channels = widths(config.width, len(self.grids))
        rows, columns = self.grids[-1]
        self.modulate = nn.Linear(config.units, features)
        self.first = nn.Linear(config.units, channels[-1] * rows * columns)
        after = [*channels[1:], channels[-1]]
        self.blocks = nn.ModuleList(
            Blocks(c_in, c, features, config.depth) for c_in, c in zip(after, channels, strict=True)
        )
        self.finer = nn.ModuleList(Double(c) for c in channels[1:])
        self.take = nn.Conv2d(config.spatial_units, channels[self._split], 1) if config.levels == 2 else None

    def upper(self, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return features down to the second level's grid, or with one level to the latents', and what modulates all.

        Args:
            u: (B, U).
            e: (B, features) of the condition.

        Returns:
            (B, C, rows, columns) and (B, features).
        """
        v = e + self.modulate(u)
        x = self.first(u).reshape(len(u), -1, *self.grids[-1])
        return self._through(x, v, len(self.grids) - 1, self._split), v

    def lower(self, x: Tensor, v: Tensor, units: tuple[Tensor, ...]) -> Tensor:
        """Return features of the latents' grid, (B, width, h, w), of what `upper` gave and the second level's units."""
        if self.take is None:
            return x
        return self._through(x + self.take(units[1]), v, self._split - 1, 0)

    def _through(self, x: Tensor, v: Tensor, first: int, last: int) -> Tensor:
        for number in range(first, last - 1, -1):
            if number < len(self.grids) - 1:
                x = self.finer[number](x, self.grids[number])
            x = self.blocks[number](x, v)
        return x


class Second(nn.Module):
    """p(u2|u1, c) and q(u2|z, u1, c), Gaussians on a grid."""

    def __init__(self, config: NetworkConfig, space: Space, features: int) -> None:
        super().__init__()
        channels = widths(config.width, len(space.grids))[space.second]
        self.join = Blocks(2 * channels, channels, features, 1)
        self.norm_q, self.norm_p = norm(channels), norm(channels)
        self.last_q, self.last_p = (nn.Conv2d(channels, 2 * config.spatial_units, 3, padding=1) for _ in range(2))
        start_small(self.last_p, 0.0)

    def posterior(self, features: Tensor, x: Tensor, v: Tensor) -> Gaussian:
        """Return q, (B, U2, h2, w2), of the encoder's features and what `TopDown.upper` gave."""
        joined = self.join(torch.cat([features, x], dim=1), v)
        return _gaussian(self.last_q, F.silu(self.norm_q(joined)))

    def prior(self, x: Tensor) -> Gaussian:
        """Return p, (B, U2, h2, w2), of what `TopDown.upper` gave."""
        return _gaussian(self.last_p, F.silu(self.norm_p(x)))


def _gaussian(last: nn.Module, x: Tensor) -> Gaussian:
    with torch.autocast(x.device.type, enabled=False):
        return Gaussian.of(last(x.float()))
