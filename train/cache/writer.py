"""Making shards of a latent cache, in one process: what is there is taken over, the rest goes through a network.

    Part -> images -> [read, crop] -> [encoder: image and mirror] -> [format, read back, measured] -> shard, index
                      threads         threads on a CPU, else here    threads, or processes for lcx

Every image passes alone, or in a batch whose size never varies; on a CPU by one thread. So neither jobs nor ranks nor
what was done before change a byte. Imports torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from codec import images
from codec.engine import EngineConfig
from codec.errors import FormatError, ImageError, NonFiniteError, UsageError
from codec.pipeline import pipelined
from codec.shards import SampleRef, read_sample
from codec.workers import Processes
from train.cache.formats import make_format
from train.cache.index import Place, Sample, read_members, write_shard
from train.cache.model import Encoder
from train.cache.plan import CacheConfig, Entry, Part
from train.cache.source import Box, Preprocessing
from train.cache.stage import Cropped, Finish, Loaded, Unit
from train.cache.tokens import INDICES

Kept = Mapping[tuple[str, int], Place]
"""(SHA-256 of the image, number of the crop) -> where its latents lie already."""


@dataclass(frozen=True)
class PartReport:
    """What became of a part.

    Attributes:
        number: of the part.
        name: file name of its shard.
        n_encoded: samples that went through the network.
        bad: (key, reason) of each image that could not be encoded.
    """

    number: int
    name: str
    n_encoded: int
    bad: tuple[tuple[str, str], ...]


class CacheWriter:
    """A network and all else that makes shards, one in each process that takes part; works within `with`."""

    def __init__(self, config: CacheConfig, settings: Mapping[str, Any], jobs: int, local_rank: int = 0) -> None:
        """Load the network.

        Args:
            config: what was asked for.
            settings: of the header.
            jobs: images being worked on at once, >= 1.
            local_rank: which GPU "auto" means.

        Raises:
            ModelError: the folder is missing or damaged.
            UsageError: no such device, or the size does not fit into its memory.
        """
        engine = EngineConfig(device=config.device, dtype=settings["dtype"])
        self._encoder = Encoder(
            config.model, engine, config.size, config.batch, local_rank, as_indices=config.format == INDICES
        )
        self._out, self._jobs, self._batch = config.out, jobs, config.batch
        self._preprocessing: Preprocessing = config.preprocessing
        self._format = make_format(settings, config.out)
        self._stack = ExitStack()

    def __enter__(self) -> "CacheWriter":
        """Start threads that read (and encode, on a CPU), and what codes: processes where a format is slow."""
        self._stack.callback(torch.set_num_threads, torch.get_num_threads())
        alone = _one_thread if self._encoder.on_cpu else None
        self._threads = ThreadPoolExecutor(self._jobs, "cache", initializer=alone)
        self._coders: Executor = Processes(self._jobs) if self._format.slow and self._jobs > 1 else self._threads
        for executor in {id(each): each for each in (self._threads, self._coders)}.values():
            self._stack.callback(executor.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what waits, and let what runs end."""
        self._stack.close()

    def describe(self) -> str:
        """Return where and in which type the network runs, for the user."""
        return self._encoder.describe()

    def write(self, part: Part, kept: Kept) -> Iterator[int | PartReport]:
        """Make one shard.

        Args:
            part: with its captions.
            kept: what may be taken over, if it is sound.

        Yields:
            How many images were done since the last time; at the end, what became of the part.

        Raises:
            UsageError: a source cannot be read.
            OSError: the shard cannot be written.
        """
        samples: list[Sample] = []
        bad: list[tuple[str, str]] = []
        n_encoded = 0
        outcomes = pipelined(
            self._chunks(part, kept),
            self._load,
            lambda _, loaded: loaded if self._encoder.on_cpu else self._encode(loaded),
            Finish(self._format),
            readers=self._threads,
            writers=self._coders,
            ahead=self._jobs + 1,
        )
        for outcome in outcomes:
            if outcome.value is None:
                assert outcome.failure is not None
                raise outcome.failure
            for made in outcome.value:
                samples += made.samples
                n_encoded += made.n_encoded
                if made.reason is not None:
                    bad.append((made.ref.key, made.reason))
            yield len(outcome.value)
        write_shard(self._out / part.name, part.stem, samples, bad, self._format.extensions)
        yield PartReport(part.number, part.name, n_encoded, tuple(bad))

    def _chunks(self, part: Part, kept: Kept) -> Iterator[tuple[Unit, ...]]:
        """Put images together until their new crops fill a batch."""
        chunk: list[Unit] = []
        n_new = 0
        numbers = range(self._preprocessing.n_crops)
        for entry in part.entries:
            places = tuple(kept.get((entry.ref.sha256, number)) for number in numbers)
            chunk.append(Unit(entry, places))
            n_new += sum(place is None for place in places)
            if n_new >= max(1, self._batch // 2) or len(chunk) >= max(16, self._batch):
                yield tuple(chunk)
                chunk, n_new = [], 0
        if chunk:
            yield tuple(chunk)

    def _load(self, chunk: Sequence[Unit]) -> list[Loaded]:
        loaded = [self._load_image(unit) for unit in chunk]
        return self._encode(loaded) if self._encoder.on_cpu else loaded

    def _load_image(self, unit: Unit) -> Loaded:
        """Read one image and cut its crops out; what was kept is read where it lies."""
        entry = unit.entry
        crops = {number: crop for number, place in enumerate(unit.kept) if (crop := _taken_over(entry, place))}
        if len(crops) < len(unit.kept):
            try:
                picture = images.load_picture(_read_source(entry.ref), name=entry.ref.name)
            except ImageError as exception:
                return Loaded(entry, reason=str(exception))
            boxes = self._preprocessing.boxes(*picture.size, entry.ref.sha256)
            for number, box in enumerate(boxes):
                if number not in crops:
                    facts = _facts(entry, number, (picture.height, picture.width), box)
                    crops[number] = Cropped(facts, pixels=self._preprocessing.piece(picture, box))
        return Loaded(entry, tuple(crops[number] for number in sorted(crops)))

    def _encode(self, loaded: Sequence[Loaded]) -> list[Loaded]:
        """Run the network for all crops of a chunk that have pixels."""
        pieces = [crop.pixels for one in loaded for crop in one.crops if crop.pixels is not None]
        if not pieces:
            return list(loaded)
        try:
            found: Iterator[Any] = iter(self._encoder(pieces))
        except NonFiniteError:
            if len(loaded) > 1:  # find out whose latents they are
                return [encoded for one in loaded for encoded in self._encode([one])]
            entry = loaded[0].entry
            return [Loaded(entry, reason=f"{entry.ref.name}: its latents are not finite")]

        def encoded(crop: Cropped) -> Cropped:
            return crop if crop.pixels is None else replace(crop, pixels=None, sides=next(found))

        return [replace(one, crops=tuple(encoded(crop) for crop in one.crops)) for one in loaded]


def _one_thread() -> None:
    """With more, a network's last bits may depend on how many there are."""
    torch.set_num_threads(1)


def _facts(entry: Entry, number: int, size: tuple[int, int], box: Box) -> dict[str, Any]:
    """Return the JSON of a sample but for what its format adds; `size` is (H, W) of the upright image."""
    ref = entry.ref
    return {
        "key": ref.key,
        "class": ref.label,
        "caption": entry.caption,
        "original_size": list(size),
        "crop_box": list(box),
        "crop": number,
        "sha256": ref.sha256,
    }


def _taken_over(entry: Entry, place: Place | None) -> Cropped | None:
    """Read what was kept of a crop; None where that is nothing, or damaged. Key, class and caption may be new."""
    if place is None:
        return None
    try:
        file = os.open(place.tar, os.O_RDONLY)
        try:
            text, *members = read_members(file, place)
        finally:
            os.close(file)
    except (OSError, FormatError):
        return None
    old = json.loads(text)
    facts = _facts(entry, old["crop"], tuple(old["original_size"]), tuple(old["crop_box"]))
    return Cropped(
        {**facts, **{name: value for name, value in old.items() if name not in facts}}, members=tuple(members)
    )


def _read_source(ref: SampleRef) -> bytes:
    """Read an image; a disk that fails ends all, a file that is not what its index says is one bad image.

    Raises:
        ImageError: truncated, or changed since the index was made.
        UsageError: the system refuses.
    """
    try:
        data = read_sample(ref)
    except ImageError as exception:
        if isinstance(exception.__cause__, OSError):
            raise UsageError(f"{exception} (the same command goes on)") from exception
        raise
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ImageError(f"{ref.name}: not the image that the index of its shard describes: its SHA-256 differs")
    return data
