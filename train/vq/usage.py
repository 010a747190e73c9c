"""How much of a codebook is used: counts of indices, what they say, and what they cost to code."""

from dataclasses import dataclass

import numpy as np
import torch

from codec.codebook_model import CodebookModel

ENOUGH_TOKENS = 16  # per code; with fewer a codebook looks less used than it is


@dataclass(frozen=True)
class CodeCounts:
    """How often each vector of a codebook was chosen; such counts can be added, over images and ranks.

    Attributes:
        counts: (K,) int64.
        prefix: what the names of its figures begin with, where there are several codebooks.
    """

    counts: np.ndarray
    prefix: str = ""

    @classmethod
    def of(cls, indices: torch.Tensor, size: int, prefix: str = "") -> "CodeCounts":
        """Count indices, int64 of any shape in [0, K)."""
        return cls(np.bincount(indices.flatten().cpu().numpy(), minlength=size), prefix)

    @classmethod
    def by_map(cls, model: CodebookModel, indices: torch.Tensor) -> list["CodeCounts"]:
        """Count the indices of each map of a model, (B, h, w) or (B, C, h, w) int64 as it gives them."""
        levels = zip(model.grids(indices), model.maps, model.prefixes, strict=True)
        return [cls.of(grid, each.codebook_size, prefix) for grid, each, prefix in levels]

    @classmethod
    def none(cls, model: CodebookModel) -> list["CodeCounts"]:
        """Return counts of nothing for each map of a model."""
        pairs = zip(model.maps, model.prefixes, strict=True)
        return [cls(np.zeros(each.codebook_size, np.int64), prefix) for each, prefix in pairs]

    def __add__(self, other: "CodeCounts") -> "CodeCounts":
        return CodeCounts(self.counts + other.counts, self.prefix)

    @property
    def n_tokens(self) -> int:
        """How many indices were counted."""
        return int(self.counts.sum())

    @property
    def tokens_per_code(self) -> float:
        """How many indices were counted for each vector."""
        return self.n_tokens / len(self.counts)

    @property
    def usage(self) -> float:
        """The share of the vectors that was chosen at all, 0..1."""
        return float(np.mean(self.counts > 0))

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the indices in nats: 1 .. K vectors, used equally often, would have the same."""
        return perplexity(self.counts / max(1, self.n_tokens))

    def bits_under(self, other: "CodeCounts") -> float:
        """Return the ideal length of these indices under the frequencies of others, bits per index.

        Args:
            other: counts that a static table would be made of; half a count is added to each, so that none is 0.
        """
        smoothed = other.counts + 0.5
        return float(-(self.counts * np.log2(smoothed / smoothed.sum())).sum() / max(1, self.n_tokens))

    def figures(self) -> dict[str, float]:
        """Return tokens per code, usage and perplexity, as bounds from below where the tokens are too few."""
        bound = "" if self.tokens_per_code >= ENOUGH_TOKENS else "_at_least"
        return {
            f"{self.prefix}tokens_per_code": self.tokens_per_code,
            f"{self.prefix}usage{bound}": self.usage,
            f"{self.prefix}perplexity{bound}": self.perplexity,
        }


def perplexity(shares: np.ndarray) -> float:
    """Return exp of the entropy, in nats, of shares, (K,) that sum to 1."""
    used = shares[shares > 0].astype(np.float64)
    return float(np.exp(-(used * np.log(used)).sum()))
