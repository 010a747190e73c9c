"""`codec-train cache --engine ray`: shards of a latent cache made by Ray Data, on a cluster or on this machine.

    parts -> ray.data.Dataset, a row each -> actors with a network each -> shards in the folder, which all machines see

The same code makes the same bytes as without Ray; Ray places the workers, and tries again where one dies. An optional
package: importing this module needs it.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.data

from train.cache.index import Place
from train.cache.plan import CacheConfig, Part
from train.cache.writer import CacheWriter, Kept, PartReport


class _Worker:
    """One process of the cluster, with a network of its own. Rows are pickled: Arrow has no types for them."""

    def __init__(self, config: CacheConfig, settings: Mapping[str, Any]) -> None:
        self._writer = CacheWriter(config, settings, max(1, config.jobs)).__enter__()

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        part, kept = pickle.loads(row["part"])
        *_, report = self._writer.write(part, kept)
        return {"report": pickle.dumps(report)}


def write_parts(
    config: CacheConfig, settings: Mapping[str, Any], parts: Sequence[Part], kept: Kept
) -> Iterator[int | PartReport]:
    """Have shards made by the cluster that this process belongs to (`RAY_ADDRESS`), or by a local one.

    Args:
        config: what was asked for; its folders are seen by all machines. `jobs` counts within one worker.
        settings: of the header.
        parts: with their captions.
        kept: what may be taken over.

    Yields:
        The number of images and the report of each part, as they are done.

    Raises:
        Exception: what `CacheWriter` raises, in whatever worker.
    """
    if not parts:
        return
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
        config = replace(
            config, shards=config.shards.absolute(), model=config.model.absolute(), out=config.out.absolute()
        )
        resources: Any = ray.cluster_resources()
        n_gpus = int(resources.get("GPU", 0)) if config.device != "cpu" else 0
        rows = [{"part": pickle.dumps((_absolute(part), _needed(part, kept)))} for part in parts]
        worker: Any = _Worker  # a class stands for its instances here
        reports = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_args=(config, dict(settings)),
            compute=ray.data.ActorPoolStrategy(size=min(len(parts), n_gpus or int(resources.get("CPU", 1)))),
            num_cpus=1,
            num_gpus=1 if n_gpus else None,
        )
        n_images = {part.number: len(part.entries) for part in parts}
        for row in reports.iter_rows():
            report: PartReport = pickle.loads(row["report"])
            yield n_images[report.number]
            yield report
    except ray.exceptions.RayTaskError as exception:
        raise exception.cause or exception from exception
    finally:
        if ours:
            ray.shutdown()


def _absolute(part: Part) -> Part:
    """Return a part whose files are named as any process finds them."""
    entries = tuple(replace(entry, ref=replace(entry.ref, shard=entry.ref.shard.absolute())) for entry in part.entries)
    return replace(part, entries=entries)


def _needed(part: Part, kept: Kept) -> dict[tuple[str, int], Place]:
    """Return what was kept of a part's images."""
    mine = {entry.ref.sha256 for entry in part.entries}
    return {key: replace(place, tar=place.tar.absolute()) for key, place in kept.items() if key[0] in mine}
