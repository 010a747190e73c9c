"""What the datasets over caches have in common: labels, draws that belong to (seed, epoch, number), facts of a sample.

Imports torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from codec.errors import UsageError
from train.cache.index import sort_classes
from train.cache.reader import CacheReader


class CacheDataset(Dataset[dict[str, Any]]):
    """A map-style dataset over a cache; another class reads what it holds.

    Attributes:
        reader: the cache.
        classes: names of the classes; `label` is a position in it, or the number that is the name where all are whole
            numbers.
    """

    def __init__(self, folder: str | Path, *, seed: int, mirror: bool, classes: Sequence[str] | None) -> None:
        """Open a cache.

        Raises:
            UsageError: no cache, an unfinished one, a missing shard, or a class that is not among `classes`.
        """
        self.reader = CacheReader(folder)
        self.classes = list(self.reader.header["classes"] if classes is None else classes)
        self._labels = labels_of(self.reader, self.classes, given=classes is not None)
        self._seed, self._mirror = seed, mirror
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # workers that live on see it change

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Choose other draws, >= 0; workers that are running see it too."""
        self._epoch.fill_(epoch)

    def _draws(self, number: int) -> tuple[int, np.random.Generator, bool]:
        """Return the sample's number from the start, what draws for it now, and whether its mirror is taken."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number %= len(self)
        rng = np.random.default_rng((self._seed, int(self._epoch), number))
        return number, rng, bool(rng.integers(2)) and self._mirror

    def _about(self, number: int, facts: Mapping[str, Any], rng: np.random.Generator, mirrored: bool) -> dict[str, Any]:
        """Return what an item says beside its tensor; draws one of several captions."""
        caption = facts["caption"]
        if isinstance(caption, list):
            caption = caption[int(rng.integers(len(caption)))]
        return {
            "label": int(self._labels[number]),
            "caption": caption,
            "key": facts["key"],
            "crop_box": torch.tensor(facts["crop_box"], dtype=torch.float32),
            "original_size": torch.tensor(facts["original_size"]),
            "mirrored": mirrored,
        }


def labels_of(reader: CacheReader, classes: Sequence[str], given: bool) -> np.ndarray:
    """Return the label of each sample, int64; -1 for none.

    Args:
        reader: of the cache.
        classes: names of the classes.
        given: a label is the position of the name, even if all names are whole numbers.

    Raises:
        UsageError: a class is not among `classes`.
    """
    numbers = {name: n for n, name in enumerate(classes)}
    if not given and all(name.isdecimal() for name in classes):
        numbers = {name: int(name) for name in classes}
    if unknown := {name for name in reader.classes if name is not None and name not in numbers}:
        raise UsageError(f"{reader.folder}: class {sort_classes(unknown)[0]} is not among the {len(classes)} given")
    return np.array([-1 if name is None else numbers[name] for name in reader.classes], np.int64)
