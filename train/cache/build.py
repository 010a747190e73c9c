"""Caches of latents for diffusion training: `codec-train cache`.

    shards -> parts -> this process's share -> shards of the cache -> all processes: cache.json, complete

What a shard is made of is in its name, so a killed run goes on, and a refresh makes new shards beside the old ones,
encodes what it finds in none of them, and puts them in their place by one rename: of cache.json, which lists what
counts. Until then readers have the cache as it was. Imports torch.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codec import model_folder
from codec.console import progress
from codec.errors import ModelError, UsageError
from codec.files import check_writable, remove_abandoned, write_atomic
from codec.launch import Launch
from codec.model_folder import ModelFolder
from codec.shards import SampleRef, read_index, read_json
from codec.version import __version__
from train.cache.codebook import VECTORS, Codebook
from train.cache.formats import TABLES, make_format
from train.cache.index import BAD_IMAGES, HEADER, VERSION, index_path, places, read_shard_index, sort_classes
from train.cache.model import CacheModel, engine_config
from train.cache.plan import CacheConfig, Part, images_per_shard, plan_parts, with_captions
from train.cache.tokens import INDICES
from train.cache.writer import CacheWriter, Kept, PartReport


@dataclass(frozen=True)
class CacheReport:
    """What `write_cache` did, or found done; the same on all processes.

    Attributes:
        header: cache.json.
        n_encoded: samples that went through the network in this run.
        n_removed: samples of the cache as it was that are no longer among the sources, or changed.
        changed: whether anything was written.
        bad: (key, reason) of each image that could not be encoded, in this run or when its shard was made.
    """

    header: Mapping[str, Any]
    n_encoded: int
    n_removed: int
    changed: bool
    bad: list[tuple[str, str]]


@dataclass
class _Job:
    """What this run is about, once all is checked.

    Attributes:
        config: what was asked for.
        model: whose latents.
        settings: of the header.
        vectors: of the codebook, (K, d) float32, for a cache of indices; None for one of latents.
        refs: all images of the sources.
        before: cache.json as it stands; {} for none.
        parts: the plan, without captions.
        mine: this process's share of it, with them.
    """

    config: CacheConfig
    model: CacheModel
    settings: Mapping[str, Any]
    vectors: np.ndarray | None = None
    refs: Sequence[SampleRef] = ()
    before: Mapping[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    mine: list[Part] = field(default_factory=list)

    def header(self) -> dict[str, Any]:
        """Return what cache.json says before anything was encoded."""
        return {
            "version": VERSION,
            "tool": f"latent-codec {__version__}",
            "complete": False,
            "model": self.model.to_json(),
            "settings": dict(self.settings),
            "shape": self.shape,
        }

    @property
    def shape(self) -> list[int]:
        """(D, h, w) of a sample; (h, w) of indices."""
        side = self.config.size // self.model.f
        return [side, side] if self.config.format == INDICES else [self.model.channels, side, side]


def write_cache(config: CacheConfig, launch: Launch | None = None, engine: str = "local") -> CacheReport:
    """Make, finish or refresh a cache; each process of a launch makes its share of the shards.

    Args:
        config: what is asked for.
        launch: this process among its like; None = alone.
        engine: "local", or "ray": the shards are made by the workers of a Ray cluster.

    Raises:
        UsageError: no images, `out` cannot be written or holds something else, other settings than the cache was made
            with, a size that does not fit the model, or none of the images can be encoded.
        ModelError: the model is missing, is not the one of the cache, or has no tables for lcx or no codebook for
            indices.
    """
    launch = launch or Launch()
    job, tables = _check(config, launch)
    if launch.index == 0:
        read_index(config.shards)  # where a scan is needed, it is made once, and says what is lost
    launch.gather(None)
    job.refs = read_index(config.shards, quiet=True)
    _refuse_other_sources(job)
    if launch.index == 0:
        _begin(job, tables)
    launch.gather(None)
    count = images_per_shard(4 * 2 * math.prod(job.shape), config.preprocessing.n_crops)
    job.parts = plan_parts(job.refs, count, {"model": job.model.encoder_id, **job.settings})
    job.mine = with_captions(launch.share(job.parts))
    todo = [part for part in job.mine if read_shard_index(config.out / part.name) is None]
    kept = _find_kept(config.out, todo)
    if engine == "ray":
        try:
            from train.cache.ray import write_parts
        except ImportError as exception:
            raise UsageError(f"--engine ray: {exception}: pip install 'latent-codec[ray]'") from exception
        reports = list(_counted(write_parts(config, job.settings, todo, kept), todo, launch))
    else:
        reports = list(_counted(_write_here(job, todo, kept, launch), todo, launch))
    mine = [(part.number, part.name) for part in job.mine]
    told = launch.gather((mine, len(reports), sum(one.n_encoded for one in reports)))
    names = [name for _, name in sorted(pair for pairs, *_ in told for pair in pairs)]
    n_written, n_encoded = (sum(one[at] for one in told) for at in (1, 2))
    report = _commit(job, names, n_written, n_encoded) if launch.index == 0 else None
    found: CacheReport = launch.gather(report)[0]
    return found


def _check(config: CacheConfig, launch: Launch) -> tuple[_Job, ModelFolder | None]:
    """Check all that can be checked before the sources are read."""
    check_writable(config.out)
    model, tables = CacheModel.of(config.model)
    if config.size % model.f or config.preprocessing.size < model.f:
        raise UsageError(f"--size {config.size}, expected a multiple of {model.f}, the model's downsampling factor")
    settings = config.settings(engine_config(config.device, config.dtype, launch.local).dtype)
    vectors = None
    if config.format == INDICES:
        codebook, vectors = Codebook.read(config.model, "--format indices needs")
        settings["codebook"] = {"size": codebook.size, "id": codebook.codebook_id}
    job = _Job(config, model, settings, vectors)
    job.before = _standing(job)
    if config.format == "lcx":
        if job.before:  # it goes on with its own tables, even if the model has others by now
            settings["tables"] = job.before["settings"]["tables"]
        elif tables is None:
            raise ModelError(f"{config.model}: no entropy tables, which --format lcx needs (not a model of the codec)")
        else:
            settings["tables"] = {
                "stream_id": model.stream_id,
                "decoder_id": model.decoder_id,
                "deviation": model.deviation,
                "posterior_std": list(model.posterior_std),
            }
    return job, tables


def _standing(job: _Job) -> Mapping[str, Any]:
    """Return the header that stands in the folder, {} in an empty one; refuse what cannot be gone on with."""
    out = job.config.out
    if not (out / HEADER).exists():
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise UsageError(f"{out}: not empty, and not a latent cache (no {HEADER}); choose another folder")
        return {}
    before = read_json(out / HEADER)
    remedy = "choose another folder or delete this one"
    if before.get("version") != VERSION:
        raise UsageError(f"{out}: a cache of version {before.get('version')}, expected {VERSION}; {remedy}")
    then, now = CacheModel.from_json(before["model"]), job.model
    if then.encoder_id != now.encoder_id:
        raise ModelError(
            f"{out}: this cache was made with encoder {then.encoder_id} (model {then.name}), "
            f"not with {now.encoder_id} ({now.name}); {remedy}"
        )
    old, new = (_flat(settings) for settings in (before["settings"], job.settings))
    for name, value in new.items():
        if old.get(name) != value:
            raise UsageError(f"{out}: this cache was made with {name} {old.get(name)}, not {value}; {remedy}")
    return before


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a user would name them: those of the preprocessing first, without the digest of them."""
    rest = {name: value for name, value in settings.items() if name not in ("preprocessing", "preprocessing_id")}
    told = {
        "preprocessing version" if name == "version" else name: value
        for name, value in settings["preprocessing"].items()
    }
    return told | rest


def _find_kept(out: Path, todo: Sequence[Part]) -> Kept:
    """Return where samples of these parts lie in the folder, in listed shards and in those that a killed run left."""
    wanted = {entry.ref.sha256 for part in todo for entry in part.entries}
    kept = {}
    for tar in sorted(out.glob("shard-*.tar")) if wanted else []:
        index = read_shard_index(tar)
        if index is not None:
            columns = index["samples"]
            for sha256, crop, place in zip(columns["sha256"], columns["crop"], places(tar, index), strict=True):
                if sha256 in wanted:
                    kept[sha256, crop] = place
    return kept


def _refuse_other_sources(job: _Job) -> None:
    """Keep a slip of the keyboard from emptying a finished cache."""
    out, now = job.config.out, {ref.sha256 for ref in job.refs}
    listed = [shard["name"] for shard in job.before.get("shards", [])]
    if listed and all(now.isdisjoint(sha256 for sha256, _ in _ids(out, [name])) for name in listed):
        raise UsageError(
            f"{out}: none of the {job.before['n_samples']} samples of this cache is of an image in "
            f"{job.config.shards}; choose another folder or delete this one"
        )


def _begin(job: _Job, tables: ModelFolder | None) -> None:
    out = job.config.out
    remove_abandoned([out])
    if not job.before:
        if job.config.format == "lcx":
            assert tables is not None
            for name in (model_folder.CODEC_JSON, model_folder.CODEC_TENSORS):
                write_atomic(out / TABLES / name, (tables.path / name).read_bytes())
        if job.vectors is not None:
            file = io.BytesIO()
            np.save(file, job.vectors)
            write_atomic(out / VECTORS, file.getvalue())
        _write_json(out / HEADER, job.header())


def n_jobs(asked: int) -> int:
    """Return how many images are worked on at once; 0 = one per core of this process's share of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _write_here(job: _Job, todo: Sequence[Part], kept: Kept, launch: Launch) -> Iterator[int | PartReport]:
    if not todo:
        return
    writer = CacheWriter(job.config, job.settings, n_jobs(job.config.jobs), launch.local)
    with writer:
        for part in todo:
            yield from writer.write(part, kept)


def _counted(events: Iterable[int | PartReport], todo: Sequence[Part], launch: Launch) -> Iterator[PartReport]:
    """Show how many images are done, on the first process; yield the reports."""
    with progress(disable=launch.index > 0 or not todo) as bar:
        task = bar.add_task("encoding", total=sum(len(part.entries) for part in todo))
        for event in events:
            if isinstance(event, PartReport):
                yield event
            else:
                bar.advance(task, event)


def _commit(job: _Job, names: Sequence[str], n_written: int, n_encoded: int) -> CacheReport:
    """Write cache.json with all shards in it, then remove those that are in it no longer."""
    out = job.config.out
    header, bad = _summed(job, names)
    if not header["n_samples"]:
        _refuse_all_bad(job, names, bad)
    before = [shard["name"] for shard in job.before.get("shards", [])]
    removed = _ids(out, set(before) - set(names)) - _ids(out, set(names) - set(before))
    changed = n_written > 0 or json.loads(json.dumps(header)) != job.before
    if changed:
        lines = [json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n" for key, reason in bad]
        write_atomic(out / BAD_IMAGES, "".join(lines).encode())
        _write_json(out / HEADER, header)
    for tar in out.glob("shard-*.tar"):
        if tar.name not in set(names):
            with suppress(FileNotFoundError):
                index_path(tar).unlink()
            tar.unlink()
    for index in out.glob("shard-*.index.json"):  # of a tar that somebody removed
        if not (out / f"{index.name.removesuffix('.index.json')}.tar").exists():
            index.unlink()
    return CacheReport(header, n_encoded, len(removed), changed, bad)


def _summed(job: _Job, names: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the finished header, and the bad images."""
    out = job.config.out
    form = make_format(job.settings, out)
    sums = form.no_sums(job.model.channels)
    bad: list[tuple[str, str]] = []
    shards, labels = [], set()
    payload_bytes = 0
    for name in names:
        index = read_shard_index(out / name)
        if index is None:
            raise UsageError(f"{out / name}: gone while the cache was being made; the same command makes it again")
        bad += [(key, reason) for key, reason in index["bad"]]
        if not index["n_samples"]:
            continue
        columns = index["samples"]
        sums.add(form.sums_from(index["sums"]))
        labels |= set(columns["class"]) - {None}
        payload_bytes += sum(sum(sizes[1:]) for sizes in columns["sizes"])
        shards.append({"name": name, "n_samples": index["n_samples"], "size_bytes": index["size_bytes"]})
    totals = {name: sum(shard[name] for shard in shards) for name in ("n_samples", "size_bytes")}
    header = {
        **job.header(),
        "complete": True,
        "n_images": len(job.refs) - len(bad),
        "n_bad": len(bad),
        **totals,
        "payload_bytes": payload_bytes,
        "statistics": sums.statistics(),
        "classes": sort_classes(labels),
        "shards": shards,
    }
    return header, bad


def _refuse_all_bad(job: _Job, names: Sequence[str], bad: Sequence[tuple[str, str]]) -> None:
    """Leave nothing of this run behind, so that it can be repeated when the cause is found."""
    out = job.config.out
    for name in names:
        index_path(out / name).unlink()
        (out / name).unlink()
    if not job.before:
        for path in (*(out / TABLES).glob("*"), out / VECTORS, out / HEADER):
            path.unlink(missing_ok=True)
        if (out / TABLES).is_dir():
            (out / TABLES).rmdir()
    key, reason = bad[0]
    raise UsageError(f"none of the {len(bad)} images can be encoded; the first: {key}: {reason}")


def _ids(out: Path, names: Iterable[str]) -> set[tuple[str, int]]:
    """Return (SHA-256 of the image, number of the crop) of all samples in some shards."""
    found: set[tuple[str, int]] = set()
    for name in names:
        index = read_shard_index(out / name)
        if index is not None:
            found |= set(zip(index["samples"]["sha256"], index["samples"]["crop"], strict=True))
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
