"""Training and validation images out of indexed shards.

    shards + index -> SampleSequence(position k) -> image, crop, mirror -> {"image": (3, S, S) in [-1, 1], "key": str}

What stands at position k of a run is a pure function of (seed, k): neither ranks nor workers change the sequence.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from codec import images
from codec.errors import ImageError, UsageError
from codec.pixels import to_float
from codec.shards import SampleRef, read_sample
from train.config import DataConfig

_LONGEST = 8  # an image that has to be enlarged is cut to this many times its short side
_REPLACEMENTS = 16  # unreadable samples in a row at one position before the run gives up


def split(samples: Sequence[SampleRef], n_validation: int) -> tuple[list[SampleRef], list[SampleRef]]:
    """Split samples into (training, validation); a hash of the image decides, so more data moves few of them.

    Raises:
        UsageError: fewer than n_validation + 1 samples.
    """
    if len(samples) <= n_validation:
        raise UsageError(f"{len(samples)} images in the shards, expected more than data.n_validation = {n_validation}")
    order = sorted(samples, key=lambda sample: hashlib.sha256(b"validation" + sample.sha256.encode()).digest())
    held_out = {sample.sha256 for sample in order[:n_validation]}  # copies of an image stay on one side
    return [s for s in samples if s.sha256 not in held_out], [s for s in samples if s.sha256 in held_out]


class SampleSequence(Dataset[dict[str, Any]]):
    """The endless sequence of training samples, addressed by position."""

    def __init__(self, samples: Sequence[SampleRef], config: DataConfig, seed: int) -> None:
        self._samples = list(samples)
        self._config = config
        self._seed = seed
        self._cache: dict[str, np.ndarray] = {}
        self._cache_bytes = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._side = config.crop
        self._final: SampleSequence | None = None

    def stage(self, fraction: float) -> "SampleSequence":
        """Return the sequence to read from when `fraction` (0..1) of the run is done: this one, or with final crops."""
        if self._config.final_crop == 0 or fraction < 1 - self._config.final_part:
            return self
        if self._final is None:
            self._final = copy.copy(self)  # shares the cache
            self._final._side = self._config.final_crop
        return self._final

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return image (3, crop, crop) float32 in [-1, 1], key, and the unreadable samples met on the way.

        An unreadable sample keeps its position: its replacement is drawn from (seed, position) too.

        Raises:
            UsageError: too many unreadable samples in a row.
        """
        rng = np.random.default_rng((self._seed, 1, position))
        sample = self._samples[self._index(position)]
        bad: list[tuple[str, str]] = []
        for _ in range(_REPLACEMENTS):
            try:
                image = self._load(sample)
            except (ImageError, OSError) as exception:
                bad.append((sample.key, str(exception)))
                sample = self._samples[int(rng.integers(len(self._samples)))]
                continue
            crop = random_crop(image, self._side, rng)
            if self._config.flip and rng.random() < 0.5:
                crop = crop[:, ::-1]
            return {"image": to_float(crop), "key": sample.key, "bad": bad}
        raise UsageError(f"{_REPLACEMENTS} unreadable samples in a row; the first: {bad[0][1]}")

    def _load(self, sample: SampleRef) -> np.ndarray:
        """Decode a sample, or take it from the cache, which fills once: in a random order nothing is worth evicting."""
        image = self._cache.get(sample.key)
        if image is None:
            image = images.load(read_sample(sample), name=f"{sample.shard.name}/{sample.key}")
            if self._cache_bytes + image.nbytes <= self._config.cache_mb * 1e6:
                self._cache[sample.key] = image
                self._cache_bytes += image.nbytes
        return image

    def _index(self, position: int) -> int:
        """Every epoch is one random order of all samples."""
        epoch, place = divmod(position, len(self._samples))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._samples))
            self._epoch = epoch
        return int(self._order[place])


def random_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a (side, side, 3) square out of (H, W, 3) uint8; an image smaller than that is enlarged first (Lanczos)."""
    image = _at_least(image, side)
    top = int(rng.integers(image.shape[0] - side + 1))
    left = int(rng.integers(image.shape[1] - side + 1))
    return image[top : top + side, left : left + side]


def centre_crop(image: np.ndarray, side: int, multiple: int) -> np.ndarray:
    """Cut the middle of an image: sides at most `side`, multiples of `multiple` (small images are enlarged to one)."""
    image = _at_least(image, multiple)
    height, width = (min(side, n) // multiple * multiple for n in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _at_least(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) >= side:
        return image
    longest = _LONGEST * min(height, width)  # enlarging a hair-thin strip would fill the memory
    image = image[:longest, :longest]
    height, width = image.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


class _RankBatches(Sampler[list[int]]):
    """Positions of one rank: global batch n holds positions n * B * ranks ..., each rank takes its contiguous share."""

    def __init__(self, batch_size: int, rank: int, n_ranks: int, start: int) -> None:
        self._batch_size, self._rank, self._n_ranks, self._start = batch_size, rank, n_ranks, start

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start + self._rank * self._batch_size
        while True:
            yield list(range(position, position + self._batch_size))
            position += self._batch_size * self._n_ranks


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "key": [sample["key"] for sample in samples],
        "bad": [bad for sample in samples for bad in sample["bad"]],
    }


def batches(
    sequence: SampleSequence, batch_size: int, workers: int, *, rank: int = 0, n_ranks: int = 1, start: int = 0
) -> DataLoader[dict[str, Any]]:
    """Return an endless loader of {"image": (B, 3, S, S), "key": [...], "bad": [...]} for one rank.

    Args:
        sequence: what to read.
        batch_size: B, per rank.
        workers: reading processes; 0 reads in this one.
        rank: this rank.
        n_ranks: how many there are; the loader must not be sharded a second time.
        start: position of the first sample of the first global batch.
    """
    return DataLoader(
        sequence,
        batch_sampler=_RankBatches(batch_size, rank, n_ranks, start),
        num_workers=workers,
        collate_fn=_collate,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )


def whole_images(
    samples: Sequence[SampleRef], side: int, multiple: int, bad: list[tuple[str, str]] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, image) of each sample once, centre-cropped to at most `side` pixels a side, multiples of `multiple`.

    Args:
        samples: what to read.
        side: pixels.
        multiple: pixels; f.
        bad: takes (key, reason) of each sample that cannot be read, which is then left out; None raises instead.

    Raises:
        ImageError: a sample cannot be read, and `bad` is None.
    """
    for sample in samples:
        try:
            image = images.load(read_sample(sample), name=f"{sample.shard.name}/{sample.key}")
        except ImageError as exception:
            if bad is None:
                raise
            bad.append((sample.key, str(exception)))
            continue
        yield sample.key, centre_crop(image, side, multiple)
