"""Folders of images -> WebDataset tar shards with an index each, which `codec.shards` reads by offset.

    find -> keys -> plan (a pure function of the source list and settings) -> for each shard:
        worker processes read and decode every image (the proof that it is one) -> tar, renamed -> index, renamed
    -> bad_files.jsonl -> shards.json, complete

A shard counts as done when its index stands, which is written last. So a killed run is resumed by the same command,
with bytes equal to those of an uninterrupted one. Original bytes are packed unchanged.

Sample: `<key>.<ext>` (the image) and `<key>.json` (path, source, width, height, class, sha256). Index, one per shard:
where the image bytes lie in the tar. Must not import torch at module level: the worker processes import this.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from codec import images
from codec.console import progress
from codec.errors import ImageError, UsageError
from codec.files import Source, check_writable, find, write_atomic
from codec.shards import MANIFEST, VERSION, finished, index_name, read_json, shard_name

BAD_FILES = "bad_files.jsonl"
_MAX_KEY = 80  # a tar header holds names of 100 bytes


@dataclass(frozen=True)
class ShardReport:
    """What `write_shards` did, or found done."""

    n_images: int
    """Images packed, over all shards."""
    n_shards: int
    n_bad: int
    """Files that could not be read, and are in no shard."""
    size_bytes: int
    """All tar files together."""
    reused_shards: int
    """Shards found finished; equal to n_shards when there was nothing to do."""
    bad: list[tuple[str, str]]
    """(path, reason) of each unreadable file."""


@dataclass(frozen=True)
class _Item:
    """One source file with its place in the plan."""

    source: Source
    origin: str
    """Name of the source folder."""
    size_bytes: int
    key: str = ""

    @property
    def ext(self) -> str:
        suffix = self.source.path.suffix.lower()
        if suffix not in images.EXTENSIONS:
            return "img"
        return "jpg" if suffix in (".jpeg", ".jpe", ".jfif") else suffix[1:]

    @property
    def label(self) -> str | None:
        return self.source.relative.parent.name or None


@dataclass(frozen=True)
class _Examined:
    """What a worker found: the bytes and facts of an image, or the reason why it is none."""

    data: bytes = b""
    width: int = 0
    height: int = 0
    sha256: str = ""
    reason: str | None = None


def write_shards(
    sources: Sequence[str | Path], out: Path, *, shard_mb: float = 64, jobs: int | None = None
) -> ShardReport:
    """Pack images into tar shards, or finish what an interrupted run began, or find that all is done.

    The sources are the same as before when the same relative paths with the same sizes are found: a file that was
    edited in place without a change of size is not noticed, a moved or copied data set is not made again.

    Args:
        sources: files and folders, see `codec.files.find`.
        out: folder of the shards; created if missing; empty, or holding shards of the same sources and settings.
        shard_mb: largest size of a shard in 10^6 bytes, > 0; an image larger than that gets a shard of its own.
        jobs: worker processes, >= 1; 1 works in this process; None takes one per available core.

    Raises:
        UsageError: nothing found, `out` unwritable or holding something else, no file readable, a worker killed.
    """
    jobs = len(os.sched_getaffinity(0)) if jobs is None and hasattr(os, "sched_getaffinity") else jobs or os.cpu_count()
    if not shard_mb > 0 or not jobs or jobs < 1:
        raise UsageError(f"shard size must be > 0 MB and jobs >= 1, got {shard_mb} and {jobs}")
    items = _assign_keys(_list_items(sources))
    plan = _plan_shards(items, shard_mb)
    check_writable(out)
    manifest: dict[str, Any] = {
        "version": VERSION,
        "settings": {"shard_mb": float(shard_mb)},
        "n_sources": len(items),
        "sources_sha256": _digest(items),
        "n_shards": len(plan),
        "complete": False,
    }
    before = _check_out(out, manifest)
    done = {index: found for index in range(len(plan)) if (found := finished(out, index)) is not None}
    todo = [index for index in range(len(plan)) if index not in done]
    try:
        if todo or not before.get("complete"):
            _write_json(out / MANIFEST, manifest)
            for stray in out.glob(".*.tmp"):
                stray.unlink()
            report = _finish(out, plan, done, todo, jobs)
            totals = {"n_images": report.n_images, "n_bad": report.n_bad, "size_bytes": report.size_bytes}
            _write_json(out / MANIFEST, manifest | totals | {"complete": True})
        else:
            report = _report(done, reused_shards=len(plan))
    except BrokenProcessPool as exception:
        raise UsageError(
            f"{out}: a worker process was killed (out of memory?); the same command resumes"
        ) from exception
    except OSError as exception:  # sources that fail are ImageErrors, counted; so this is the output
        raise UsageError(
            f"{out}: cannot write: {exception.strerror or exception}; the same command resumes"
        ) from exception
    return report


def _list_items(sources: Sequence[str | Path]) -> list[_Item]:
    items = []
    for source in find(sources, images.EXTENSIONS):
        folder = source.path.absolute().parents[len(source.relative.parts) - 1]
        try:
            size_bytes = source.path.stat().st_size
        except OSError:  # a link that leads nowhere: counted as bad when it is read
            size_bytes = 0
        items.append(_Item(source, folder.resolve().name, size_bytes))
    return sorted(items, key=lambda item: (item.origin, item.source.relative))


def _assign_keys(items: Sequence[_Item]) -> list[_Item]:
    """Give every item a key of [A-Za-z0-9_-], unique without regard to case; those that collide get a hash."""
    cleaned = [
        "_".join(re.sub(r"[^A-Za-z0-9_-]+", "-", part) for part in item.source.relative.with_suffix("").parts)
        for item in items
    ]
    count = Counter(key.lower() for key in cleaned)
    taken = {key for key, n in count.items() if n == 1}
    result = []
    for item, key in zip(items, cleaned, strict=True):
        n = 0
        if count[key.lower()] > 1 or len(key) > _MAX_KEY:
            stem = key[: _MAX_KEY - 9]
            while n == 0 or key.lower() in taken:
                identity = f"{item.origin}/{item.source.relative}#{n}"
                key = f"{stem}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:8]}"
                n += 1
            taken.add(key.lower())
        result.append(_Item(item.source, item.origin, item.size_bytes, key))
    return result


def _plan_shards(items: Sequence[_Item], shard_mb: float) -> list[list[_Item]]:
    """Cut the list into shards whose tar files stay within the size."""
    # A tar ends with two empty blocks and is filled up to whole records.
    limit = shard_mb * 1e6 // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE
    plan: list[list[_Item]] = [[]]
    used = 0
    for item in items:
        metadata_bytes = len(json.dumps([str(item.source.relative), item.origin, item.label])) + 300
        blocks = 2 + -(-item.size_bytes // tarfile.BLOCKSIZE) + -(-metadata_bytes // tarfile.BLOCKSIZE)
        if plan[-1] and used + blocks * tarfile.BLOCKSIZE > limit:
            plan.append([])
            used = 0
        plan[-1].append(item)
        used += blocks * tarfile.BLOCKSIZE
    return plan


def _digest(items: Iterable[_Item]) -> str:
    """SHA-256 over source folder name, relative path and size of every file, in order."""
    sha = hashlib.sha256()
    for item in items:
        sha.update(os.fsencode(f"{item.origin}/{item.source.relative}\0{item.size_bytes}\0"))
    return sha.hexdigest()


def _check_out(out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest that stands in the folder, {} in an empty one; refuse what cannot be resumed."""
    if not (out / MANIFEST).exists():
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise UsageError(f"{out}: not empty, and not a shard folder (no {MANIFEST}); choose another folder")
        return {}
    before = read_json(out / MANIFEST)
    remedy = "choose another folder or delete this one"
    if before.get("version") != VERSION:
        raise UsageError(f"{out}: shards of version {before.get('version')}, expected {VERSION}; {remedy}")
    if before.get("settings") != manifest["settings"]:
        then, now = (json.dumps(settings) for settings in (before.get("settings"), manifest["settings"]))
        raise UsageError(f"{out}: these shards were made with settings {then}, not {now}; {remedy}")
    if before.get("sources_sha256") != manifest["sources_sha256"]:
        counts = f"{before.get('n_sources')} files then, {manifest['n_sources']} now"
        raise UsageError(
            f"{out}: these shards were made from other sources ({counts}; paths or sizes differ); {remedy}"
        )
    return before


def _finish(
    out: Path, plan: list[list[_Item]], done: dict[int, dict[str, Any]], todo: list[int], jobs: int
) -> ShardReport:
    """Write the missing shards and the list of bad files."""
    reused_shards = len(done)
    n_images = sum(map(len, plan))
    with progress() as bar, _mapper(jobs if todo else 1) as each:
        task = bar.add_task("shards", total=n_images, completed=n_images - sum(len(plan[index]) for index in todo))
        for index in todo:
            done[index] = _write_shard(out, index, plan[index], each, lambda: bar.advance(task))
    report = _report(done, reused_shards)
    if report.n_images == 0:
        for path in [*out.glob("shard-*.tar"), *out.glob("shard-*.index.json"), out / MANIFEST]:
            path.unlink()
        first, reason = report.bad[0]
        raise UsageError(f"none of the {report.n_bad} files can be read; the first: {first}: {reason}")
    lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in report.bad]
    write_atomic(out / BAD_FILES, "".join(lines).encode())
    return report


def _write_shard(
    out: Path, index: int, items: list[_Item], each: Callable[..., Iterator[_Examined]], advance: Callable[[], object]
) -> dict[str, Any]:
    """Write one tar and then its index, each under a temporary name first; return the index."""
    from webdataset import TarWriter  # here, because it imports torch

    name = shard_name(index)
    temporary = out / f".{name}.{os.getpid()}.tmp"
    samples: dict[str, dict[str, Any]] = {}  # by name in the tar
    bad: list[tuple[str, str]] = []
    try:
        # Fixed time, owner and sample order: the bytes depend on the sources alone.
        with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for item, found in zip(items, each(_examine, [str(item.source.path) for item in items]), strict=True):
                if found.reason is None:
                    facts = {"width": found.width, "height": found.height, "class": item.label, "sha256": found.sha256}
                    origin = {"path": str(item.source.relative), "source": item.origin}
                    tar.write({"__key__": item.key, item.ext: found.data, "json": json.dumps(origin | facts).encode()})
                    samples[f"{item.key}.{item.ext}"] = {"key": item.key, "ext": item.ext} | facts
                else:
                    bad.append((str(item.source.path), found.reason))
                advance()
        with tarfile.open(temporary) as tar:
            for member in tar:
                if member.name in samples:
                    samples[member.name] |= {"offset": member.offset_data, "length": member.size}
        size_bytes = temporary.stat().st_size
        temporary.replace(out / name)
    finally:
        temporary.unlink(missing_ok=True)
    result = {
        "version": VERSION,
        "shard": name,
        "size_bytes": size_bytes,
        "samples": list(samples.values()),
        "bad": bad,
    }
    _write_json(out / index_name(index), result)
    return result


def _examine(path: str) -> _Examined:
    """Read and fully decode one file (in a worker process)."""
    try:
        data = images.read(path)
        height, width, _ = images.load(data, name=path).shape
    except ImageError as exception:
        return _Examined(reason=str(exception).removeprefix(f"{path}: "))
    return _Examined(data, width, height, hashlib.sha256(data).hexdigest())


@contextmanager
def _mapper(jobs: int) -> Iterator[Callable[..., Iterator[_Examined]]]:
    """Give a `map` that keeps the order and works in `jobs` processes."""
    if jobs == 1:
        yield map
        return
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield partial(pool.map, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, on damaged files, which are reported anyway
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when the parent is killed; the pool would wait for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _report(done: dict[int, dict[str, Any]], reused_shards: int) -> ShardReport:
    shards = [done[index] for index in sorted(done)]
    bad = [(path, reason) for shard in shards for path, reason in shard["bad"]]
    return ShardReport(
        n_images=sum(len(shard["samples"]) for shard in shards),
        n_shards=len(shards),
        n_bad=len(bad),
        size_bytes=sum(shard["size_bytes"] for shard in shards),
        reused_shards=reused_shards,
        bad=bad,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())
