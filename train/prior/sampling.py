"""Drawing indices from a prior: each from its probabilities given those before, by one number in [0, 1) of its own.

    labels, numbers (B, n) -> position by position: logits -> guidance, temperature, top-k, top-p -> index

The numbers belong to (seed, class, number of the image), and probabilities are computed in float64: what else is in a
batch, and how large it is, changes them by less than a number in [0, 1) can tell. Imports torch.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.draws import generator
from train.checks import require
from train.prior.network import Memory, PriorNetwork


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How indices are drawn.

    Attributes:
        temperature: > 0; probabilities to the power of 1 / temperature.
        top_k: only the k most probable indices; 0 = all.
        top_p: only the most probable indices, as many as it takes for this probability; 1 = all.
        guidance: weight of classifier-free guidance; 1 = none, and half the time.
        seed: of the numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "--temperature", self.temperature, "> 0")
        require(self.top_k >= 0, "--top-k", self.top_k, ">= 0")
        require(0 < self.top_p <= 1, "--top-p", self.top_p, "0 < p <= 1")
        require(0 <= self.guidance < math.inf, "--guidance", self.guidance, ">= 0")
        require(self.seed >= 0, "--seed", self.seed, ">= 0")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def numbers_of(seed: int, name: str, count: int, n: int) -> Tensor:
    """Return what decides the images of a class, (count, n) float64 in [0, 1); image k has the same whatever count."""
    rows = [generator(seed, f"{name}\0{k}", "prior").random(n) for k in range(count)]
    return torch.from_numpy(np.stack(rows))


@torch.inference_mode()
def draw(
    network: PriorNetwork,
    labels: Sequence[int],
    numbers: Tensor,
    how: Sampling,
    *,
    batch: int = 32,
    advance: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Draw images' indices.

    Args:
        network: of the prior; it is copied, to be computed in float64.
        labels: class of each image; n_classes = any.
        numbers: (B, n) float64 in [0, 1), see `numbers_of`.
        how: see `Sampling`; its seed is not looked at.
        batch: images at once; changes nothing but memory and time.
        advance: told how many images were finished.

    Returns:
        (B, h, w) int64.
    """
    grid, network = network.grid, copy.deepcopy(network).double()
    device = network.bias.device
    found = []
    for start in range(0, len(labels), batch):
        some = torch.tensor(labels[start : start + batch], device=device)
        found.append(_grids(network, some, numbers[start : start + batch].to(device), how).cpu())
        advance(len(some))
    return torch.cat(found).reshape(-1, grid.height, grid.width)


def _grids(network: PriorNetwork, labels: Tensor, numbers: Tensor, how: Sampling) -> Tensor:
    """Return indices, (B, n), of one batch."""
    hidden = torch.full_like(labels, network.grid.n_classes)
    memory, other = Memory(network, len(labels)), None
    if how.guidance != 1:
        other = Memory(network, len(labels))
    drawn: list[Tensor] = []
    for at in range(network.grid.n):
        previous = drawn[-1] if drawn else None
        logits = network.step(previous, at, labels, memory)
        if other is not None:
            # Ho & Salimans 2022, arXiv:2207.12598 eq. 6, with weight = 1 + w, of log-probabilities.
            without = network.step(previous, at, hidden, other).log_softmax(-1)
            logits = without + how.guidance * (logits.log_softmax(-1) - without)
        drawn.append(choose(probabilities(logits, how), numbers[:, at]))
    return torch.stack(drawn, dim=1)


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """Return what indices are drawn from, (B, K), of logits (B, K): temperature first, then top-k, then top-p."""
    logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[1]:
        least = logits.topk(how.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    found = logits.softmax(-1)
    if how.top_p < 1:
        ordered, places = found.sort(dim=1, descending=True, stable=True)
        enough = ordered.cumsum(1) - ordered >= how.top_p  # what stands before is enough without it
        found = torch.zeros_like(found).scatter(1, places, ordered.masked_fill(enough, 0.0))
        found = found / found.sum(1, keepdim=True)
    return found


def choose(shares: Tensor, numbers: Tensor) -> Tensor:
    """Return the index that each number in [0, 1) falls on, (B,), where index i takes a length of shares[:, i]."""
    ends = shares.cumsum(1)
    ends = ends / ends[:, -1:]  # which rounding leaves beside 1
    index = torch.searchsorted(ends, numbers[:, None].contiguous(), right=True)[:, 0]
    return index.clamp_max(shares.shape[1] - 1)
