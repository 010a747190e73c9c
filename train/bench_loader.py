"""Our loader against webdataset with Pillow, and against what decoding alone allows: images/s from the same shards.

    shards -> ours: train.feed.Feed, indexed ---------------------------------------+
           -> webdataset: resampled shards, shuffle, decode("pil"), crop, mirror ---+-> images/s, block by block
           -> decoding: Pillow on the bytes that ours has just read, in memory -----+

Every block opens its reader anew, and begins to count when the workers have started and no longer keep step with each
other. So what a side reads ahead is never read while the other side is measured.
"""

import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from codec.images import EXTENSIONS
from codec.shards import SampleRef, read_index, read_sample
from train.config import Config
from train.feed import Feed

_SHUFFLE_BUFFER = 1000  # samples, as in webdataset's examples
_AHEAD = 4  # batches that a worker reads ahead, as in `train.data`


def compare_loaders(
    config: Config, folder: Path, steps: int, repeats: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure the readers, without workers and with the recipe's.

    Args:
        config: of `train.bench.comparable`: one size of crops, no cache.
        folder: takes the list of bad samples.
        steps: batches in a block.
        repeats: blocks of each side.
        say: told what is being measured.

    Returns:
        What the shards hold, and under "rows" the images/s of every block for each number of workers.

    Raises:
        UsageError: the shards cannot be read.
    """
    samples = read_index(Path(config.data.shards))
    rows = []
    for workers in dict.fromkeys((0, config.data.workers)):
        say(f"loader: {workers} worker(s)")
        rates: dict[str, list[float]] = {"ours": [], "webdataset": [], "decoding": []}
        for n in range(repeats):
            one_round = _round(config, samples, workers, n, steps, folder)
            for name, rate in one_round.items():
                rates[name].append(rate)
        medians = {name: median(found) for name, found in rates.items()}
        rows.append(
            {
                "workers": workers,
                "blocks_images_per_s": rates,
                "images_per_s": medians,
                "ours_over_webdataset": medians["ours"] / medians["webdataset"],
                "share_of_decoding": medians["ours"] / medians["decoding"],
            }
        )
    return {
        "n_samples": len(samples),
        "n_shards": len({sample.shard for sample in samples}),
        "formats": dict(Counter(sample.ext for sample in samples).most_common()),
        "mean_megapixels": fmean(sample.width * sample.height for sample in samples) / 1e6,
        "mean_size_bytes": fmean(sample.length for sample in samples),
        "rows": rows,
    }


def _round(
    config: Config, samples: Sequence[SampleRef], workers: int, n: int, steps: int, folder: Path
) -> dict[str, float]:
    """Measure a block of each reader; round n of ours goes on in the sequence where round n - 1 has ended."""
    size, warm_up = config.optim.batch_size, 1 + 2 * workers
    data, run = replace(config.data, workers=workers), replace(config.run, out=tempfile.mkdtemp(dir=folder))
    feed = Feed(replace(config, data=data, run=run), samples, 1, 0, 1)
    read: list[str] = []

    def rate(batches: Iterable[Any]) -> float:
        return steps * size / _time(batches, warm_up, steps)

    rates = {"ours": rate(_noted(feed.batches(0.0, n * (warm_up + steps) * size), read))}
    urls = sorted({str(sample.shard) for sample in samples})
    rates["webdataset"] = rate(webdataset_batches(urls, size, data.crop, data.flip, workers))
    by_key = {sample.key: sample for sample in samples}
    files = [read_sample(by_key[key]) for key in read]
    rates["decoding"] = rate(_decoded(files, size, workers))
    return rates


def _time(batches: Iterable[Any], warm_up: int, steps: int) -> float:
    """Return the seconds of `steps` batches after the first `warm_up`; workers end with the iterator, on return."""
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    start = time.perf_counter()
    for _ in range(steps):
        next(iterator)
    return time.perf_counter() - start


def _noted(batches: Iterator[dict[str, Any]], keys: list[str]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        keys += batch["key"]
        yield batch


def _loader(dataset: Any, workers: int, **how: Any) -> DataLoader[Any]:
    """Return a DataLoader that reads ahead as ours does."""
    ahead: dict[str, Any] = {"prefetch_factor": _AHEAD, "multiprocessing_context": "spawn"} if workers else {}
    return DataLoader(dataset, num_workers=workers, **ahead, **how)


def webdataset_batches(urls: list[str], batch_size: int, crop: int, flip: bool, workers: int) -> DataLoader[Any]:
    """Return endless batches (B, 3, crop, crop) float32 in [-1, 1] as one reads them with webdataset and Pillow."""
    import webdataset as wds

    extensions = [extension.removeprefix(".") for extension in EXTENSIONS]
    dataset = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(_SHUFFLE_BUFFER)
        .decode(wds.imagehandler("pil", extensions))
        .map(partial(_piece, crop=crop, flip=flip))
        .batched(batch_size, collation_fn=torch.stack, partial=False)
    )
    return _loader(dataset, workers, batch_size=None)


def _piece(sample: dict[str, Any], crop: int, flip: bool) -> torch.Tensor:
    """Cut a random square out of a sample's image, smaller ones enlarged first, and turn half of them around."""
    image = next(value for value in sample.values() if isinstance(value, Image.Image))
    scale = crop / min(image.size)
    if scale > 1:
        image = image.resize((max(crop, round(image.width * scale)), max(crop, round(image.height * scale))))
    left = int(torch.randint(image.width - crop + 1, ()))
    top = int(torch.randint(image.height - crop + 1, ()))
    image = image.crop((left, top, left + crop, top + crop))
    if flip and torch.rand(()) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class _Decoding(Dataset[int]):
    """Pillow alone: each item opens and decodes a file in memory to RGB."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> int:
        with Image.open(io.BytesIO(self._files[index])) as image:
            return image.convert("RGB").width


def _decoded(files: Sequence[bytes], batch_size: int, workers: int) -> DataLoader[Any]:
    """Return batches of nothing but decoding: all files in their order, then again as far as workers read ahead."""
    whole = [list(range(n, n + batch_size)) for n in range(0, len(files), batch_size)]
    return _loader(_Decoding(files), workers, batch_sampler=whole * (1 + _AHEAD * workers), collate_fn=len)
