"""The network of a prior: each codebook index from those before it, in raster order, and the class.

    index at i - 1 -> row of a table: projected codebook vector + learned residual --+
    row, column of i; class (the last one: hidden) ---------------------------------+-> blocks -> logits of index i
    table, once more: logits = head(x) . table / sqrt(width) + bias

The probability of a grid is the product of these: exact. Sampling keeps keys and values of what is decided
(`Memory`), so that each index costs one position. Imports torch alone.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.prior.config import HEAD, NetworkConfig

_BASE = 100.0  # of the rotations' frequencies: grids have some tens of rows


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is predicted.

    Attributes:
        codebook_size: K.
        channels: d of a codebook vector.
        height: h.
        width: w.
        n_classes: labels are 0 .. n_classes - 1; n_classes stands for a hidden one.
    """

    codebook_size: int
    channels: int
    height: int
    width: int
    n_classes: int

    @property
    def n(self) -> int:
        """Indices of an image."""
        return self.height * self.width

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Memory:
    """Keys and values of the positions that are decided, of every block."""

    def __init__(self, network: "PriorNetwork", batch: int) -> None:
        shape = (batch, network.n_heads, network.grid.n, HEAD)
        self.blocks = [(network.bias.new_empty(shape), network.bias.new_empty(shape)) for _ in network.blocks]


class Block(nn.Module):
    """Attention to what came before, then a network of each position alone; norms first (GPT-2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def heads(self, x: Tensor, turns: Tensor) -> list[Tensor]:
        """Return queries, keys and values, (B, heads, n, HEAD) each, of x (B, n, width)."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return [_turned(q, turns).to(v.dtype), _turned(k, turns).to(v.dtype), v]

    def attended(self, found: Tensor) -> Tensor:
        """Return what attention adds, (B, n, width), of (B, heads, n, HEAD)."""
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out

    def alone(self, x: Tensor) -> Tensor:
        """Return what the network of each position adds."""
        out: Tensor = self.narrow(functional.gelu(self.widen(self.norm_2(x))))
        return out


class PriorNetwork(nn.Module):
    """See the module.

    Attributes:
        grid: what is predicted.
        config: its size.
    """

    codebook: Tensor
    turns: Tensor

    def __init__(self, config: NetworkConfig, grid: Grid) -> None:
        """Build it; `initialise` gives it weights that mean something."""
        super().__init__()
        self.config, self.grid = config, grid
        self.n_heads = config.width // HEAD
        self.register_buffer("codebook", torch.zeros(grid.codebook_size, grid.channels))
        self.register_buffer("turns", _turns(grid), persistent=False)
        self.project = nn.Linear(grid.channels, config.width, bias=False)
        self.residual = nn.Parameter(torch.zeros(grid.codebook_size, config.width))
        self.bias = nn.Parameter(torch.zeros(grid.codebook_size))
        self.start = nn.Parameter(torch.zeros(config.width))
        self.rows = nn.Parameter(torch.zeros(grid.height, config.width))
        self.columns = nn.Parameter(torch.zeros(grid.width, config.width))
        self.classes = nn.Parameter(torch.zeros(grid.n_classes + 1, config.width))
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.width, bias=False)

    def initialise(self, codebook: Tensor, frequencies: Tensor, seed: int) -> None:
        """Start as the unigram model: every position has the frequencies of the training indices, exactly.

        Args:
            codebook: (K, d) vectors; standardised here, all channels by one number.
            frequencies: (K,) > 0, which sum to 1.
            seed: of the other weights.
        """
        rng = torch.Generator().manual_seed(seed)
        centred = codebook.float() - codebook.float().mean(0)
        self.codebook.copy_(centred / centred.square().mean().sqrt().clamp_min(1e-12))
        for name, parameter in sorted(self.named_parameters()):
            if parameter.ndim == 1:
                if name.endswith(".bias"):  # torch draws a layer's from the global generator
                    parameter.data.zero_()
                continue
            std = {"rows": 0.3, "columns": 0.3, "classes": 0.3, "residual": 0.0, "head.weight": 0.0}.get(name)
            if std is None:
                std = parameter.shape[1] ** -0.5
                if name.endswith(("out.weight", "narrow.weight")):  # GPT-2: the sum over blocks keeps its size
                    std /= math.sqrt(2 * self.config.depth)
            parameter.data.normal_(0, std, generator=rng) if std else parameter.data.zero_()
        self.bias.data.copy_(frequencies.log())

    def table(self) -> Tensor:
        """Return the row of each index, (K, width)."""
        table: Tensor = self.project(self.codebook) + self.residual
        return table

    def forward(self, indices: Tensor, labels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the logits of every index given those before it.

        Args:
            indices: (B, n) int64 in raster order; the last one is not looked at.
            labels: (B,) int64, n_classes = hidden.
            kept: (B, 2 depth + 1, n, width) factors of what is added, 0 or 1 / (1 - dropout); None = nothing is
                left out.

        Returns:
            (B, n, K).
        """
        table = self.table()
        before = functional.embedding(indices[:, :-1], table)
        first = self.start.expand(len(indices), 1, -1).to(before.dtype)
        x = torch.cat([first, before], dim=1) + self._places() + self.classes[labels][:, None]
        x = x if kept is None else x * kept[:, 0]
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            q, k, v = block.heads(x, self.turns)
            found = block.attended(functional.scaled_dot_product_attention(q, k, v, is_causal=True))
            x = x + (found if kept is None else found * kept[:, 2 * number + 1])
            found = block.alone(x)
            x = x + (found if kept is None else found * kept[:, 2 * number + 2])
        return self._logits(x, table)

    def step(self, previous: Tensor | None, at: int, labels: Tensor, memory: Memory) -> Tensor:
        """Return the logits of the index at one position, (B, K); positions come in turn.

        Args:
            previous: (B,) the index at the position before; None at position 0.
            at: the position, in raster order.
            labels: (B,), as in `forward`.
            memory: of the positions before; takes up this one.
        """
        table = self.table()
        row = self.start.expand(len(labels), -1) if previous is None else functional.embedding(previous, table)
        x = (row + self._places()[at] + self.classes[labels])[:, None]  # (B, 1, width)
        for block, (keys, values) in zip(self.blocks, memory.blocks, strict=True):
            assert isinstance(block, Block)
            q, keys[:, :, at : at + 1], values[:, :, at : at + 1] = block.heads(x, self.turns[at : at + 1])
            known = keys[:, :, : at + 1], values[:, :, : at + 1]
            x = x + block.attended(functional.scaled_dot_product_attention(q, *known))
            x = x + block.alone(x)
        return self._logits(x, table)[:, 0]

    def _places(self) -> Tensor:
        """Return what stands for each position, (n, width)."""
        return (self.rows[:, None] + self.columns[None]).flatten(0, 1)

    def _logits(self, x: Tensor, table: Tensor) -> Tensor:
        logits: Tensor = functional.linear(self.head(self.norm(x)) * self.config.width**-0.5, table) + self.bias
        return logits


def _turns(grid: Grid) -> Tensor:
    """Return (n, 2, HEAD / 2): cosine and sine of the angles that a position turns pairs of channels by.

    Su et al. 2021, arXiv:2104.09864 eq. 34, for two axes: half of the pairs turn with the row, half with the column, so
    that what attention sees of two positions is how far they are apart.
    """
    rates = _BASE ** -(torch.arange(HEAD // 4, dtype=torch.float64) / (HEAD // 4))
    rows = torch.arange(grid.height)[:, None, None] * rates
    columns = torch.arange(grid.width)[None, :, None] * rates
    shape = (grid.height, grid.width, HEAD // 4)
    angles = torch.cat([rows.expand(shape), columns.expand(shape)], dim=-1).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()]).movedim(0, 1)  # (n, 2, HEAD / 2)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of channels of x, (B, heads, n, HEAD), by the angles of their positions, (n, 2, HEAD / 2)."""
    cosine, sine = turns.to(torch.promote_types(x.dtype, torch.float32)).unbind(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
