"""Training images out of shards that cannot be indexed: webdataset URLs, read as streams.

    URLs -> resampled shards -> open, members of the tar -> shuffle buffer -> image -> crop, mirror -> batches

Each reading process (rank and worker) draws shards at random, with replacement, from the whole list, by a random stream
of its own; nothing is split by rank or worker, here or later, so no process can run out of shards. The loader must not
be given to accelerate, which would split it.

What a resumed run gets: the random draws depend on (seed, rank, worker, start), so it goes on with other shards, crops
and mirrorings than the uninterrupted run would have had. Sampling with replacement has no place in an epoch to lose:
no shard is left out systematically or preferred, neither by stopping nor by other numbers of ranks or workers. Some
images are seen more often than others. Where the exact sequence matters, use indexed shards (`train.data`).

A member that is no image, a shard that cannot be opened, and one that ends too early are reported in the batch and
counted by the trainer; see `train.bad_samples`. Names are read as in `codec.shard_scan`.
"""

import re
import signal
import tarfile
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from codec import images
from codec.errors import ImageError, UsageError
from codec.pixels import to_float
from codec.shard_scan import StrictTarInfo, image_name
from train.bad_samples import BadSample, bad_sample, bad_shard
from train.config import DataConfig
from train.crops import mirrored, random_crop
from train.data import collate
from train.signals import leave_to_the_run

_STREAM = 4  # what is drawn with the run's seed; `train.data` has other numbers
_FIRST_SHUFFLED = (
    100  # samples in the buffer before the first one leaves it: later is better shuffled, but a late start
)
_DEAD_SHARDS = 16  # shards in a row without an image before a reader gives up
_BAD_IN_A_ROW = 1000  # samples that cannot be used, likewise
_CUT_SHORT = (-signal.SIGPIPE, 128 + signal.SIGPIPE)  # exit status of a command whose output is closed, or its shell's
_PROBED_SHARDS = 3
_PROBED_IMAGES = 10


class _Member(NamedTuple):
    """The bytes of one image file out of a shard."""

    key: str
    data: bytes


def stream_batches(
    config: DataConfig,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    n_ranks: int = 1,
    start: int = 0,
    final: bool = False,
) -> Iterator[dict[str, Any]]:
    """Return endless batches {"image": (B, 3, S, S), "key": [...], "bad": [BadSample, ...]} for one rank.

    Args:
        config: `shards` holds the URLs.
        batch_size: B, per rank.
        seed: the run's.
        rank: this rank.
        n_ranks: how many there are.
        start: images seen so far, over all ranks; another start gives other random draws.
        final: crops of `final_crop` instead of `crop`, see `train.data.is_final`.

    Raises:
        UsageError: no URLs; while reading, out of a worker process with its traceback in front: nothing but unreadable
            shards or samples for a long time.
    """
    if not 0 <= rank < n_ranks:
        raise ValueError(f"rank = {rank}, allowed: 0 to n_ranks - 1 = {n_ranks - 1}")
    sides = (config.final_crop,) if final else config.crops or (config.crop,)
    loader = DataLoader(
        _Stream(list_urls(config), config, sides, batch_size, (seed, _STREAM, rank, start)),
        batch_size=batch_size,
        num_workers=config.workers,
        collate_fn=collate,
        prefetch_factor=4 if config.workers else None,
        multiprocessing_context="spawn" if config.workers else None,
        worker_init_fn=leave_to_the_run,
        generator=torch.Generator(),  # else it draws from the global one
    )
    return iter(loader)


def list_urls(config: DataConfig) -> list[str]:
    """Return the URLs that `data.shards` stands for: braces and ${WDS_...} expanded, "::" between several patterns.

    Raises:
        UsageError: none, or the pattern is malformed.
    """
    from webdataset.shardlists import expand_urls  # here, because it takes its time to import

    try:
        urls = [url for url in expand_urls(config.shards) if url]
    except (ValueError, AssertionError) as exception:  # unbalanced braces; a variable that is not set
        raise UsageError(f"data.shards = {config.shards!r}: {exception}") from exception
    if not urls:
        raise UsageError("data.shards is empty, expected webdataset URLs, e.g. https://host/{000..127}.tar")
    return urls


def check_stream(config: DataConfig, n_ranks: int = 1) -> str:
    """Prove that the first shards can be read, and return one line on what a run reads, for its start.

    Every rank may call it; each then opens one shard. Later failures are counted, not fatal; see the module.

    Raises:
        UsageError: no shards, or no readable image in any of the first few (the message has a URL and the reason).
    """
    urls = list_urls(config)
    reasons = []
    for url in urls[:_PROBED_SHARDS]:
        reason = _why_unusable(url)
        if not reason:
            break
        reasons.append(f"{url}: {reason}")
    else:
        more = f" (so are the next {len(reasons) - 1})" if len(reasons) > 1 else ""
        raise UsageError(f"data.shards: the first shard cannot be used{more}: {reasons[0]}")
    readers = n_ranks * max(1, config.workers)
    fewer = "; fewer shards than readers: they share them, and none runs out" if len(urls) < readers else ""
    return (
        f"streaming, {len(urls)} shard(s), {n_ranks} rank(s) x {config.workers} worker(s), each drawing shards at "
        f"random through a buffer of {config.shuffle_buffer} samples{fewer}"
    )


def _why_unusable(url: str) -> str:
    """Return why no image comes out of a shard; "" where one does."""
    bad: list[BadSample] = []
    reason = ""
    with closing(_members(url, bad)) as members:
        for member in islice(members, _PROBED_IMAGES):
            try:
                images.load(member.data, name=member.key)
            except ImageError as exception:
                reason = reason or str(exception)
            else:
                return ""
    return reason or (bad[0].reason if bad else "it holds no image")


class _Stream(IterableDataset[dict[str, Any]]):
    """The samples of one rank; each worker that iterates over it has a random stream of its own."""

    def __init__(
        self, urls: list[str], config: DataConfig, sides: tuple[int, ...], batch_size: int, entropy: tuple[int, ...]
    ) -> None:
        self._urls = urls
        self._config = config
        self._sides = sides
        self._batch_size = batch_size
        self._entropy = entropy

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        sequence = np.random.SeedSequence((*self._entropy, 0 if worker is None else worker.id))
        for_shards, for_buffer, for_crops = sequence.spawn(3)
        bad: list[BadSample] = []
        members = self._shuffled(self._shards(for_shards, bad), for_buffer)
        yield from self._samples(members, np.random.default_rng(for_crops), bad)

    def _shards(self, seed: np.random.SeedSequence, bad: list[BadSample]) -> Iterator[_Member]:
        """Yield the members of randomly drawn shards, for ever."""
        from webdataset.shardlists import ResampledShards

        number = int(seed.generate_state(1, np.uint64)[0])
        n_dead = 0
        for drawn in ResampledShards(self._urls, worker_seed=lambda: number, deterministic=True):
            n_dead += 1
            for member in _members(drawn["url"], bad):
                n_dead = 0
                yield member
            if n_dead == _DEAD_SHARDS:
                why = f"; the last: {bad[-1].key}: {bad[-1].reason}" if bad else ""
                raise UsageError(f"data.shards: {n_dead} shards in a row gave no image{why}")

    def _shuffled(self, members: Iterator[_Member], seed: np.random.SeedSequence) -> Iterator[_Member]:
        from webdataset.filters import shuffle

        size = self._config.shuffle_buffer
        number = int(seed.generate_state(1, np.uint64)[0])
        yield from shuffle(size, initial=min(size, _FIRST_SHUFFLED), seed=number)(members)

    def _samples(
        self, members: Iterator[_Member], rng: np.random.Generator, bad: list[BadSample]
    ) -> Iterator[dict[str, Any]]:
        """Decode and crop; each sample takes along the bad ones, and the bad shards, since the one before."""
        n_done, n_failed, side = 0, 0, 0
        for member in members:
            try:
                image = images.load_picture(member.data, name=member.key)
            except ImageError as exception:
                bad.append(bad_sample(member.key, member.key, exception))
                n_failed += 1
                if n_failed == _BAD_IN_A_ROW:
                    raise UsageError(f"{n_failed} unreadable samples in a row; the last: {exception}") from exception
                continue
            if n_done % self._batch_size == 0:  # the loader makes a batch of so many samples of one worker
                side = self._sides[int(rng.integers(len(self._sides)))]
            crop = random_crop(image, side, rng, self._config.random_resize)
            crop = mirrored(crop, rng) if self._config.flip else crop
            yield {"image": to_float(crop), "key": member.key, "bad": list(bad)}
            bad.clear()
            n_done, n_failed = n_done + 1, 0


def _members(url: str, bad: list[BadSample]) -> Generator[_Member]:
    """Yield the image files of one shard; what cannot be read is added to `bad`, and never ends the caller's loop.

    webdataset's own expansion of tars takes a damaged header, or the end of a broken transfer, for the end of a shard.
    """
    from webdataset.gopen import gopen

    name = _short_name(url)
    try:
        stream = gopen(url)
    except (OSError, ValueError, ImportError) as exception:  # ImportError: hf:// needs a package
        bad.append(bad_shard(url, _reason(exception)))
        return
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                if (named := image_name(member.name)) is None or member.isdir():
                    continue
                key = f"{name}/{named[0]}"
                file = tar.extractfile(member) if member.isreg() else None
                if file is None:  # a link, whose file may have gone by
                    bad.append(BadSample(key, "not supported", "not a plain file"))
                    continue
                yield _Member(key, file.read())
        _require_end(stream)
    except MemoryError:
        raise
    except Exception as exception:  # decompressors and transports raise anything, and one shard must not end a run
        bad.append(bad_shard(url, _reason(exception) + _exit_status(stream)))
    finally:
        _close(stream)


def _require_end(stream: Any) -> None:
    """Read what follows the end mark, so that a pipe ends by itself, and raise where that holds data or it failed."""
    while chunk := stream.read(2**16):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("data follows the end mark (several tars joined to one?)")
    stream.close()


def _close(stream: Any) -> None:
    with suppress(Exception):  # a command that is cut short on purpose fails
        stream.close()


def _exit_status(stream: Any) -> str:
    """Say that the command of a pipe failed, which is why its data were no tar."""
    _close(stream)
    status = getattr(stream, "status", None)
    return f" (exit status {status})" if status and status not in _CUT_SHORT else ""


def _short_name(url: str) -> str:
    """The shard's name for keys: what stands before .tar, without folders, hosts and credentials."""
    found = re.search(r"([^/\s]+)\.(tar|tgz)\b", url)
    return found[1] if found else "shard"


def _reason(exception: Exception) -> str:
    if isinstance(exception, IsADirectoryError):
        return "a folder; expected URLs of tar files, e.g. folder/{000..127}.tar, or data.mode=indexed"
    text = exception.strerror if isinstance(exception, OSError) and exception.strerror else str(exception)
    return " ".join(text.split()) or type(exception).__name__
