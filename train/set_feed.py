"""Batches out of a set that lies in memory: position k of a run -> a sample, a function of (seed, k) alone.

So neither ranks nor batches change what stands where, and a run is resumed by its position alone.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.bad_samples import BadSamples

ORDER, MIRROR = 0, 23  # streams of `train.draws`


def hold_out(sha256s: Iterable[str], n: int) -> set[str]:
    """Return the n images of a set that are only measured on, by the hash of their bytes: all crops and copies of one
    are on one side."""
    return set(sorted(set(sha256s), key=lambda sha256: hashlib.sha256(b"validation" + sha256.encode()).digest())[:n])


class SetFeed(ABC):
    """The batches of one rank; see `train.task.Source`.

    Attributes:
        bad: what could not be read: nothing.
    """

    def __init__(self, n: int, out: Path, *, batch_size: int, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        """Lay out the sequence.

        Args:
            n: samples of the set, at least one.
            out: the run folder.
            batch_size: B of one rank.
            seed: of the order, and of all that is drawn for a batch.
            rank: this rank.
            n_ranks: how many there are.
        """
        self.bad = BadSamples(out / "bad_samples.jsonl", 0.0)
        self._n, self._batch_size, self._seed = n, batch_size, seed
        self._rank, self._n_ranks = rank, n_ranks
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def batches_per_epoch(self) -> float:
        """Of one rank."""
        return self._n / (self._batch_size * self._n_ranks)

    def stage(self, share: float) -> bool:
        """See `train.task.Source.stage`: all of a run is alike."""
        return False

    def batches(self, share: float, start: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of this rank, without end; see `train.task.Source.batches`."""
        position = start + self._rank * self._batch_size
        while True:
            yield self._batch(range(position, position + self._batch_size))
            position += self._batch_size * self._n_ranks

    @abstractmethod
    def _batch(self, positions: range) -> dict[str, Any]:
        """Return what stands at some positions."""

    def _index(self, position: int) -> int:
        """Every epoch is one random order of all samples."""
        epoch, place = divmod(position, self._n)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, ORDER, epoch)).permutation(self._n)
            self._epoch = epoch
        return int(self._order[place])
