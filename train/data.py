"""Training and validation images out of indexed shards.

    shards + index -> SampleSequence(position k) -> image -> crop, mirror -> {"image": (C, H, W) in [-1, 1], "key": str}

What stands at position k of a run is a pure function of (seed, k): neither ranks nor workers change the sequence, and
a run is resumed by its position alone. Where the shape of a batch varies it is a function of (seed, k // batch_size).
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from codec.errors import ImageError, UsageError
from codec.pixels import to_float
from codec.shards import SampleRef
from train.bad_samples import BadSample, bad_sample
from train.config import DataConfig
from train.crops import centre_cover, centre_crop, cover_crop, mirrored, random_crop
from train.order import bucket_ratios, bucket_shape, epoch_batches, epoch_order, nearest_bucket
from train.samples import Picture, finished, load_array, load_picture
from train.signals import leave_to_the_run

_ORDER, _PIECE, _SIDE = 0, 1, 3  # which numbers are drawn with a seed; 2 is the trainer's noise
_REPLACEMENTS = 16  # unreadable samples in a row at one position before the run gives up
Found = TypeVar("Found")


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


def is_final(config: DataConfig, share: float) -> bool:
    """Whether the crops are `final_crop` when `share` (0..1) of the run is done."""
    return config.final_crop > 0 and share >= 1 - config.final_part


class SampleSequence(Dataset[dict[str, Any]]):
    """The endless sequence of training samples, addressed by position."""

    def __init__(
        self,
        samples: Sequence[SampleRef],
        config: DataConfig,
        seed: int,
        *,
        batch_size: int = 1,
        multiple: int = 1,
        channels: int = 3,
        classes: Sequence[str] = (),
    ) -> None:
        """Lay out the sequence; nothing is read yet.

        Args:
            samples: what to read, at least one.
            config: how.
            seed: of order and crops.
            batch_size: B of one rank; so many samples from a multiple of it on have one shape. Matters only with
                `crops` or `aspect_buckets`.
            multiple: f; sides of the buckets' shapes are multiples of it.
            channels: C of the images, see `train.samples.load_picture`.
            classes: names of the labels 0, 1, ..., which samples then have; none = they have none.
        """
        self.config = config
        self.samples = list(samples)
        self.batch_size = batch_size
        self._seed = seed
        self._multiple = multiple
        self._channels = channels
        self._labels = {name: label for label, name in enumerate(classes)}
        self._cache: dict[tuple[Path, int], Picture] = {}
        self._cached_bytes = [0]  # a list: shared by copies, as the cache is
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._sides = config.crops or (config.crop,)
        self._ratios = bucket_ratios(config.aspect_buckets) if config.aspect_buckets else None
        self._buckets = nearest_bucket(samples, config.aspect_buckets) if config.aspect_buckets else None
        self._final: SampleSequence | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All (height, width) in pixels that a batch can have."""
        return sorted({self._shape_of(ratio, side) for side in self._sides for ratio in self._used_ratios()})

    @property
    def epoch_length(self) -> int:
        """Positions until every sample was there once; more than samples where buckets fill up their last batches."""
        if self._buckets is None:
            return len(self.samples)
        return epoch_batches(self._buckets, self.batch_size) * self.batch_size

    def stage(self, share: float) -> "SampleSequence":
        """Return the sequence to read from when `share` (0..1) of the run is done: this one, or with final crops."""
        if not is_final(self.config, share):
            return self
        if self._final is None:
            self._final = copy.copy(self)  # shares the cache
            self._final._sides = (self.config.final_crop,)
        return self._final

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return image (C, H, W) float32 in [-1, 1], key, label (with classes), and the `BadSample`s met on the way.

        Raises:
            UsageError: see `find`.
        """
        image, (height, width), rng, told = self.find(position, self._load)
        if self._buckets is not None or self.config.whole:
            crop = cover_crop(image, height, width, rng)
        else:
            crop = random_crop(image, width, rng, self.config.random_resize)
        crop = finished(crop, image)
        crop = mirrored(crop, rng) if self.config.flip else crop
        return {"image": to_float(crop), **told}

    def find(
        self, position: int, load: Callable[[SampleRef], Found]
    ) -> tuple[Found, tuple[int, int], np.random.Generator, dict[str, Any]]:
        """Return what stands at a position, before its piece is cut out.

        An unreadable sample keeps its position: its replacement is drawn from (seed, position) too.

        Args:
            position: in the sequence.
            load: gives a sample's image; raises ImageError or OSError where it cannot be read.

        Returns:
            The image, (height, width) of the piece in pixels, what draws its place, and key, label and bad samples.

        Raises:
            UsageError: too many unreadable samples in a row.
        """
        rng = np.random.default_rng((self._seed, _PIECE, position))
        index = self._index(position)
        shape = self._shape(position, index)
        sample = self.samples[index]
        bad: list[BadSample] = []
        for _ in range(_REPLACEMENTS):
            try:
                image = load(sample)
            except (ImageError, OSError) as exception:
                bad.append(bad_sample(sample.key, sample.name, exception))
                sample = self.samples[int(rng.integers(len(self.samples)))]
                continue
            told = {"label": self._labels[str(sample.label)]} if self._labels else {}
            return image, shape, rng, {"key": sample.key, "bad": bad, **told}
        raise UsageError(f"{_REPLACEMENTS} unreadable samples in a row; the first: {bad[0].key}: {bad[0].reason}")

    def require_whole_batches(self, batch_size: int, start: int) -> None:
        """Refuse batches whose samples would not have one shape.

        Raises:
            UsageError: shapes differ from batch to batch, and these are other batches than the sequence was made for.
        """
        shaped = len(self._sides) > 1 or self._buckets is not None
        if shaped and (batch_size != self.batch_size or start % batch_size):
            raise UsageError(
                f"batches of {batch_size} from sample {start} on: expected multiples of {self.batch_size}, because "
                "data.crops and data.aspect_buckets give each batch a shape; resume with the same optim.batch_size"
            )

    def _load(self, sample: SampleRef) -> Picture:
        """Decode a sample, or take it from the cache, which fills once: in a random order nothing is worth evicting."""
        place = (sample.shard, sample.offset)
        image = self._cache.get(place)
        if image is None:
            image = load_picture(sample, self._channels)
            n_bytes = max(4, self._channels) * image.width * image.height  # 4: Pillow's RGB
            if self._cached_bytes[0] + n_bytes <= self.config.cache_mb * 1e6:
                self._cache[place] = image
                self._cached_bytes[0] += n_bytes
        return image

    def _index(self, position: int) -> int:
        """Every epoch is one random order of all samples."""
        epoch, place = divmod(position, self.epoch_length)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, _ORDER, epoch))
            if self._buckets is None:
                self._order = rng.permutation(len(self.samples))
            else:
                self._order = epoch_order(self._buckets, self.batch_size, rng)
            self._epoch = epoch
        return int(self._order[place])

    def _shape(self, position: int, index: int) -> tuple[int, int]:
        side = self._sides[0]
        if len(self._sides) > 1:
            rng = np.random.default_rng((self._seed, _SIDE, position // self.batch_size))
            side = self._sides[int(rng.integers(len(self._sides)))]
        bucket = 0 if self._buckets is None else int(self._buckets[index])
        return self._shape_of(None if self._ratios is None else float(self._ratios[bucket]), side)

    def _shape_of(self, ratio: float | None, side: int) -> tuple[int, int]:
        return (side, side) if ratio is None else bucket_shape(ratio, side, self._multiple)

    def _used_ratios(self) -> Sequence[float | None]:
        if self._ratios is None or self._buckets is None:
            return [None]
        return [float(ratio) for ratio in self._ratios[np.unique(self._buckets)]]


class RankBatches(Sampler[list[int]]):
    """Positions of one rank: global batch n holds positions n * B * ranks ..., each rank takes its contiguous share."""

    def __init__(self, batch_size: int, rank: int, n_ranks: int, start: int) -> None:
        self._batch_size, self._rank, self._n_ranks, self._start = batch_size, rank, n_ranks, start

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start + self._rank * self._batch_size
        while True:
            yield list(range(position, position + self._batch_size))
            position += self._batch_size * self._n_ranks


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of one shape to a batch; labels, where there are some, become (B,) int64."""
    labels = [sample["label"] for sample in samples if "label" in sample]
    return ({"label": torch.tensor(labels)} if labels else {}) | {
        "image": torch.stack([sample["image"] for sample in samples]),
        "key": [sample["key"] for sample in samples],
        "bad": [bad for sample in samples for bad in sample["bad"]],
    }


def batches(
    sequence: SampleSequence, batch_size: int, workers: int, *, rank: int = 0, n_ranks: int = 1, start: int = 0
) -> DataLoader[dict[str, Any]]:
    """Return an endless loader of {"image": (B, C, H, W), "key": [...], "bad": [BadSample, ...]} for one rank.

    Args:
        sequence: what to read.
        batch_size: B, per rank.
        workers: reading processes; 0 reads in this one.
        rank: this rank.
        n_ranks: how many there are; the loader must not be sharded a second time.
        start: position of the first sample of the first global batch.

    Raises:
        UsageError: see `SampleSequence.require_whole_batches`.
    """
    sequence.require_whole_batches(batch_size, start)
    return DataLoader(
        sequence,
        batch_sampler=RankBatches(batch_size, rank, n_ranks, start),
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=leave_to_the_run,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each new loader draws from the global one, which a resumed run continues
    )


def whole_images(
    samples: Sequence[SampleRef],
    side: int,
    multiple: int,
    bad: list[tuple[str, str]] | None = None,
    channels: int = 3,
    cover: int = 0,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, image) of each sample once, centre-cropped to at most `side` pixels a side, multiples of `multiple`.

    Images are (H, W, C) uint8.

    Args:
        samples: what to read.
        side: pixels.
        multiple: pixels; f.
        bad: takes (key, reason) of each sample that cannot be read, which is then left out; None raises instead.
        channels: C, see `train.samples.load_picture`.
        cover: side of a square that images are first resized to, until they just cover it, pixels; 0 = as they are.

    Raises:
        ImageError: a sample cannot be read, and `bad` is None.
    """
    for sample in samples:
        try:
            image = load_array(sample, channels)
        except ImageError as exception:
            if bad is None:
                raise
            bad.append((sample.key, str(exception)))
            continue
        yield sample.key, centre_crop(centre_cover(image, cover) if cover else image, side, multiple)


def share_of(samples: Sequence[SampleRef], rank: int, n_ranks: int) -> list[SampleRef]:
    """Return one rank's part of the samples; all ranks' parts together are every sample once, however many ranks."""
    return list(samples[rank::n_ranks])


def describe_data(sequence: SampleSequence, n_ranks: int) -> str:
    """Return one line on what a run reads, for its start."""
    config = sequence.config
    shards = len({sample.shard for sample in sequence.samples})
    batches_an_epoch = sequence.epoch_length / (sequence.batch_size * n_ranks)
    shapes = ", ".join(f"{height} x {width}" for height, width in sequence.shapes)
    return (
        f"indexed, {len(sequence.samples)} samples in {shards} shard(s), {n_ranks} rank(s) x {config.workers} "
        f"worker(s), {batches_an_epoch:.1f} batches of {sequence.batch_size} per rank and epoch, crops {shapes}"
    )
