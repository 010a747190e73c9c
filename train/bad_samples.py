"""Samples that could not be used: why, how many, and when they are too many. Must not import torch."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codec.console import error
from codec.errors import UsageError

_ALWAYS_ALLOWED = 10
_LOST_SHARD = "shard"
# What the reasons of `codec.images` and `codec.shards` begin with or hold, in the order of the search.
_KINDS = {
    "truncated": "truncated",
    "damaged": "damaged",
    "no such file": "missing",
    "not an image": "not an image",
    "empty file": "not an image",
    "no pixels": "not an image",
    "more than": "too large",
    "not supported": "not supported",
}


class BadSample(NamedTuple):
    """One sample, or one shard of a stream, that could not be used."""

    key: str
    """Of the sample; the URL of a shard."""
    kind: str
    """truncated, damaged, missing, not an image, too large, not supported, unreadable; or shard."""
    reason: str


class TooManyBadError(UsageError):
    """More of the samples than `data.max_bad_share` could not be used; the message counts them by kind."""


def bad_sample(key: str, name: str, exception: Exception) -> BadSample:
    """Say why a sample could not be read.

    Args:
        key: the sample's.
        name: what the exception's message calls it, which is cut off before the kind is looked for.
        exception: ImageError or OSError.
    """
    reason = str(exception).removeprefix(f"{name}: ")
    lower = reason.lower()
    return BadSample(key, next((kind for words, kind in _KINDS.items() if words in lower), "unreadable"), reason)


def bad_shard(url: str, reason: str) -> BadSample:
    """Say why a shard, or the rest of it, could not be read."""
    return BadSample(url, _LOST_SHARD, reason)


class BadSamples:
    """Counts a rank's bad samples by kind, lists each of them once, and ends a run that has too many."""

    def __init__(self, path: Path, max_share: float) -> None:
        """Start with none.

        Args:
            path: file of JSON lines that each new one is appended to; its folder must exist.
            max_share: the largest share of the samples read that may be bad, 0..1; ten may be bad in any case.
        """
        self._path = path
        self._max_share = max_share
        self._counts: Counter[str] = Counter()
        self._known: set[str] = set()
        self._n_read = 0

    @property
    def total(self) -> int:
        """How often a sample could not be used."""
        return self._counts.total()

    @property
    def n_read(self) -> int:
        """Samples read, good and bad."""
        return self._n_read

    @property
    def counts(self) -> dict[str, int]:
        """Bad samples by kind."""
        return dict(self._counts)

    def add(self, bad: Sequence[BadSample], n_good: int, images: int) -> None:
        """Take in what one batch reports.

        Args:
            bad: the batch's "bad".
            n_good: the images in the batch.
            images: images seen in the run so far, for the list.

        Raises:
            OSError: the list cannot be written.
        """
        self._n_read += n_good + len(bad)
        for key, kind, reason in bad:
            self._counts[kind] += 1
            if key not in self._known:
                self._known.add(key)
                error(f"sample {key}: {reason} (replaced; listed in {self._path})")
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "kind": kind, "reason": reason, "images": images}) + "\n")

    def require_few(self, total: float, n_read: float) -> None:
        """Raise TooManyBadError when too many samples could not be used.

        Args:
            total: bad samples of all ranks, so that they stop together.
            n_read: samples read by all ranks.
        """
        if round(total) > max(_ALWAYS_ALLOWED, self._max_share * n_read):
            raise TooManyBadError(
                f"{total:.0f} of {n_read:.0f} samples could not be used (of this rank: {self._by_kind()}), more than "
                f"data.max_bad_share = {self._max_share:g} allows; they are listed in {self._path}"
            )

    def _by_kind(self) -> str:
        return ", ".join(f"{n} {kind}" for kind, n in self._counts.most_common())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from, in plain JSON types."""
        return {"n_read": self._n_read, "counts": dict(self._counts), "known": sorted(self._known)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._n_read = int(state["n_read"])
        self._counts = Counter(state["counts"])
        self._known = set(state["known"])
