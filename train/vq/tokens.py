"""The latents of one optimizer step, over its batches and ranks, and what is summed and drawn of them.

    batch after batch -> StepTokens.add -> totals, draws; each reduced over ranks, so that all come to equal bits

A draw is a function of (seed, position of the step): neither ranks nor accumulation change which latents it takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from train.draws import rng
from train.task import Step

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Averages a tensor over ranks."""


@dataclass(frozen=True)
class _Batch:
    z: torch.Tensor  # (B, h*w, d)
    indices: torch.Tensor | None  # (B*h*w,)
    positions: range
    frequencies: torch.Tensor | None


@dataclass(frozen=True)
class Extent:
    """How much a step has looked at.

    Attributes:
        n_images: over all ranks.
        n_tokens: over all ranks.
        rank: this one.
        n_ranks: how many there are.
    """

    n_images: int
    n_tokens: int
    rank: int
    n_ranks: int


class StepTokens:
    """This rank's latents of the step that is being computed."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []

    def add(
        self,
        z: torch.Tensor,
        indices: torch.Tensor | None,
        positions: range,
        frequencies: torch.Tensor | None = None,
    ) -> None:
        """Take note of one batch.

        Args:
            z: (B, d, h, w) float32, as they were compared with the codebook.
            indices: (B, h, w) of the vectors that they became; None where they passed as they are.
            positions: of its images in the run's sequence.
            frequencies: see `train.vq.quantiser.Codes`.
        """
        flat = z.detach().flatten(2).movedim(1, -1)  # (B, h*w, d)
        self._batches.append(_Batch(flat, None if indices is None else indices.flatten(), positions, frequencies))

    def clear(self) -> None:
        """Forget the step."""
        self._batches = []

    def extent(self, step: Step, reduce: Reduce) -> Extent:
        """Return what all ranks have looked at together; `step`: as given to `train.task.Task.after_step`."""
        positions = self._batches[0].positions
        n_images = sum(len(batch.positions) for batch in self._batches)
        n_tokens = sum(batch.z.shape[0] * batch.z.shape[1] for batch in self._batches)
        is_first = float(positions.start == step.images)
        own = torch.tensor([n_images, n_tokens, is_first], device=self._batches[0].z.device)
        images, tokens, one_of = reduce(own).tolist()  # the mean of 1, 0, 0 ... says how many ranks there are
        rank = (positions.start - step.images) // len(positions)
        return Extent(round(images / one_of), round(tokens / one_of), rank, round(1 / one_of))

    def totals(self, size: int, reduce: Reduce, *, sums: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what share of the tokens of all ranks chose each vector, and their sum.

        Args:
            size: K.
            reduce: see `Reduce`.
            sums: whether the second is wanted.

        Returns:
            (K,) shares, whose sum is 1, and (K, d) sums of latents by vector, over the number of all tokens; or None.
        """
        z = torch.cat([batch.z.flatten(0, 1) for batch in self._batches])
        indices = torch.cat([batch.indices for batch in self._batches if batch.indices is not None])
        width = z.shape[1] if sums else 0
        total = z.new_zeros(size, width + 1)
        values = torch.cat([z[:, :width], z.new_ones(len(z), 1)], dim=1)
        total.index_add_(0, indices, values)
        total = reduce(total)
        counts = total[:, -1]
        n_tokens = counts.sum()
        return counts / n_tokens, total[:, :width] / n_tokens if sums else None

    def mean_frequencies(self) -> torch.Tensor:
        """Return the mean of the batches' frequencies, of this rank."""
        return torch.stack([batch.frequencies for batch in self._batches if batch.frequencies is not None]).mean(0)

    def draw(self, n: int, stream: int, step: Step, extent: Extent, reduce: Reduce) -> torch.Tensor:
        """Draw latents of the step at random: evenly from its images, anywhere in each, none twice before all of it.

        Args:
            n: how many.
            stream: of random numbers, see `train.draws`.
            step: whose position decides, with the seed.
            extent: of `extent`.
            reduce: see `Reduce`.

        Returns:
            (n, d), equal on all ranks.
        """
        random = rng(step.seed, stream, step.images)
        order = random.permutation(n)
        images, turns = step.images + order % extent.n_images, order // extent.n_images
        seeds = random.integers(1 << 63, size=extent.n_images)
        first = self._batches[0].z
        found = first.new_zeros(n, first.shape[2] + 1)
        for batch in self._batches:
            own = np.flatnonzero((images >= batch.positions.start) & (images < batch.positions.stop))
            if not len(own):
                continue
            used, which = np.unique(images[own], return_inverse=True)
            n_tokens = batch.z.shape[1]
            places = np.stack([np.random.default_rng(seeds[at - step.images]).permutation(n_tokens) for at in used])
            chosen = (own, images[own] - batch.positions.start, places[which, turns[own] % n_tokens])
            rows, image, token = (torch.from_numpy(each).to(first.device) for each in chosen)
            found[rows, :-1] = batch.z[image, token]
            found[rows, -1] = 1.0
        found = reduce(found)
        return found[:, :-1] / found[:, -1:]  # each was found by one rank alone
