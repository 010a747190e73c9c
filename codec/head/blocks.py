"""What the head's networks are made of: the condition as a vector, blocks that it modulates (FiLM), other grids.

    c -> Condition -> e (B, F) -> Film of every Block: scale and shift of each channel

Imports torch alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codec.head.config import WIDTH_UNIT


class Condition(nn.Module):
    """What a condition is to the networks: a vector; of no condition, a learned one."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, *, n_classes: int = 0, embedding_width: int = 0) -> None:
        """Build it; what a condition is, see `codec.head.config.Space`.

        Args:
            features: of the vector.
            n_classes: how many classes there are; 0 = an embedding, or nothing.
            embedding_width: numbers of an embedding; 0 = a class, or nothing.
        """
        super().__init__()
        self.n_classes, self.width = n_classes, embedding_width
        n_rows = 1 if self.width else self.n_classes + 1  # the last one stands for no condition
        self.table = nn.Parameter(torch.randn(n_rows, features))
        self.project = nn.Linear(self.width, features) if self.width else None
        self.register_buffer("mean", torch.zeros(self.width))  # of the training's embeddings
        self.register_buffer("deviation", torch.ones(self.width))
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(features, features), nn.SiLU())

    def forward(self, c: Tensor, hidden: Tensor) -> Tensor:
        """Return the vectors, (B, features).

        Args:
            c: (B,) int64 classes, or (B, E) float32 embeddings; what a hidden one says is not looked at.
            hidden: (B,) bool: the networks shall know no condition.
        """
        if self.project is not None:
            known: Tensor = self.project((c.float() - self.mean) / self.deviation)
            found = torch.where(hidden[:, None], self.table[-1].to(known.dtype), known)
        else:
            found = self.table[c.masked_fill(hidden, self.n_classes)]
        mixed: Tensor = self.mix(found)
        return mixed

    def none(self, n: int) -> Tensor:
        """Return the vector of no condition n times, (n, features)."""
        shape = (n, self.width) if self.width else (n,)
        c = torch.zeros(shape, dtype=torch.float32 if self.width else torch.int64, device=self.table.device)
        found: Tensor = self(c, torch.ones(n, dtype=torch.bool, device=self.table.device))
        return found


def start_small(layer: nn.Linear | nn.Conv2d, size: float) -> None:
    """Draw weights that make about `size` of inputs of deviation 1, and no bias."""
    nn.init.normal_(layer.weight, std=size * layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Film(nn.Module):
    """A scale and a shift of every channel, which a vector decides; Perez et al. 2017, arXiv:1709.07871 eq. 2."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 2 * channels)
        start_small(self.linear, 0.3)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return x, (B, C, ...), modulated by e, (B, features)."""
        made: Tensor = self.linear(e)
        scale, shift = made.reshape(*made.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        return x * (1 + scale) + shift


def norm(channels: int) -> nn.GroupNorm:
    """Return the normalisation of a block."""
    return nn.GroupNorm(max(1, channels // WIDTH_UNIT), channels)


class Block(nn.Module):
    """Two convolutions beside the identity, modulated between them."""

    def __init__(self, channels_in: int, channels: int, features: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norm(channels_in), norm(channels)
        self.conv_1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = Film(features, channels)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        start_small(self.conv_2, 0.3)  # near the identity at the start

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return (B, channels, h, w) of x, (B, channels_in, h, w), and e, (B, features)."""
        y = self.conv_1(F.silu(self.norm_1(x)))
        y = self.conv_2(F.silu(self.film(self.norm_2(y), e)))
        out: Tensor = self.skip(x) + y
        return out


class Blocks(nn.Module):
    """Blocks one after the other; the first changes the number of channels."""

    def __init__(self, channels_in: int, channels: int, features: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels if n else channels_in, channels, features) for n in range(depth))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """See `Block`."""
        for block in self.blocks:
            x = block(x, e)
        return x


class Halve(nn.Module):
    """Half the grid, odd sides rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(h / 2), ceil(w / 2)) of x, (B, C, h, w)."""
        out: Tensor = self.conv(x)
        return out


class Double(nn.Module):
    """Twice the grid, or one less where a side was rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (B, C, *size) of x, (B, C, h, w)."""
        enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest")[..., : size[0], : size[1]]
        out: Tensor = self.conv(enlarged)
        return out


def widths(width: int, n_grids: int) -> list[int]:
    """Return the channels at each of so many grids, the finest first."""
    return [width if n == 0 else 2 * width for n in range(n_grids)]
