"""What the formats of a latent cache cost on disk and in reading, against one .npy file per image.

    caches -> samples in a random order, warm -> images/s: bytes to moments, and `LatentDataset` items
    the same moments, fp16 -> one .npy per image, in a temporary folder -> the same two, in turns with each cache

All in one process. Files are in the system's cache, so it is the work that is measured, not a disk; small files lose
more where a disk or a network stands behind. Imports torch.
"""

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from codec.errors import UsageError
from train.cache.moments import Moments
from train.cache.reader import CacheReader
from train.cache.tokens import Tokens, stored_type
from train.latent_dataset import LatentDataset
from train.token_dataset import TokenDataset

_MOST_BYTES = 2_000_000_000  # of .npy files


class _NpyFolder(ABC):
    """One .npy per image in a folder, which holds what the cache holds of image and mirror.

    Attributes:
        size_bytes: of all files.
    """

    type_name: str
    bytes_each: int

    def __init__(self, folder: Path, reader: CacheReader, numbers: Sequence[int]) -> None:
        self._folder = folder
        self.size_bytes = 0
        for number in numbers:
            np.save(self._path(number), self._array(reader, number))
            self.size_bytes += self._path(number).stat().st_size

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.npy"

    @abstractmethod
    def _array(self, reader: CacheReader, number: int) -> np.ndarray:
        """Return what the file of a sample holds."""

    @abstractmethod
    def read(self, number: int, mirrored: bool) -> Any:
        """Do what the cache's reader does."""

    @abstractmethod
    def item(self, dataset: Any, number: int) -> torch.Tensor:
        """Do to an image's file what the dataset does to its sample."""


class _NpyMoments(_NpyFolder):
    """Float16, with the moments of image and mirror: (4, D, h, w), or (2, D, h, w) without std."""

    type_name, bytes_each = "fp16", 2

    def _array(self, reader: CacheReader, number: int) -> np.ndarray:
        sides = [reader.read(number, mirrored)[0] for mirrored in (False, True)]
        parts = [part for side in sides for part in (side.mean, side.std) if part is not None]
        shape = sides[0].mean.shape
        return np.stack([np.broadcast_to(part, shape) for part in parts]).astype(np.float16)

    def read(self, number: int, mirrored: bool) -> Moments:
        array = np.load(self._path(number))
        first = mirrored * (len(array) // 2)
        std = array[first + 1].astype(np.float32) if len(array) == 4 else None
        return Moments(array[first].astype(np.float32), std)

    def item(self, dataset: LatentDataset, number: int) -> torch.Tensor:
        rng = np.random.default_rng((0, 0, number))
        moments = self.read(number, bool(rng.integers(2)))
        z = torch.from_numpy(moments.mean)
        if moments.std is not None:
            noise = rng.standard_normal(moments.mean.shape, dtype=np.float32)
            z = z + torch.from_numpy(moments.std) * torch.from_numpy(noise)
        return dataset.normalize(z)


class _NpyTokens(_NpyFolder):
    """The indices of image and mirror, (2, h, w), in the cache's type."""

    def _array(self, reader: CacheReader, number: int) -> np.ndarray:
        kind = np.dtype(stored_type(reader.require_indices().size))
        self.type_name, self.bytes_each = kind.name, kind.itemsize
        return np.stack([reader.read_tokens(number, mirrored)[0].indices for mirrored in (False, True)]).astype(kind)

    def read(self, number: int, mirrored: bool) -> Tokens:
        return Tokens(np.load(self._path(number))[int(mirrored)].astype(np.int64))

    def item(self, dataset: TokenDataset, number: int) -> torch.Tensor:
        rng = np.random.default_rng((0, 0, number))
        return torch.from_numpy(self.read(number, bool(rng.integers(2))).indices)


def compare_formats(
    folders: Sequence[Path], n_images: int, repeats: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure caches of the same images.

    Args:
        folders: of the caches.
        n_images: samples that are read in a block, at most.
        repeats: blocks of each side, which take turns.
        say: told what is being measured.

    Returns:
        `rows`, one for each cache and one for the .npy files of the first; medians over the blocks.

    Raises:
        UsageError: a folder holds no finished cache, or their samples differ in number or shape.
    """
    datasets = [_opened(folder) for folder in folders]
    first = datasets[0]
    for dataset in datasets[1:]:
        if (len(dataset), dataset.shape) != (len(first), first.shape):
            raise UsageError(
                f"{dataset.reader.folder}: {len(dataset)} samples of {dataset.shape}, "
                f"{first.reader.folder} has {len(first)} of {first.shape}: compare caches of the same images"
            )
    numbers = np.random.default_rng(0).permutation(len(first))
    numbers = numbers[: min(n_images, _MOST_BYTES // (8 * int(np.prod(first.shape))))]
    of_tokens = isinstance(first, TokenDataset)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        make = _NpyTokens if of_tokens else _NpyMoments
        npy = make(Path(temporary), first.reader, numbers.tolist())
        for dataset in datasets:
            say(f"{dataset.reader.folder}: reading")
            rows.append(_row(dataset, npy, numbers.tolist(), repeats))
        n = len(numbers)
        rates = {name: median([row["npy"][name] for row in rows]) for name in ("read", "items")}
    mean_only = 2 * npy.bytes_each * int(np.prod(first.shape))
    rows.append(
        {
            "format": f".npy {npy.type_name}",
            "file_bytes": npy.size_bytes / n,
            "payload_bytes": npy.size_bytes / n,
            **rates,
        }
    )
    for row in rows:
        row["of_fp16_means"] = row["payload_bytes"] / mean_only
    sizes = {"n_samples": len(first), "n_read": n, "shape": first.shape}
    return {**sizes, "fp16_means_bytes": mean_only, "plain": npy.type_name, "rows": rows}


def _opened(folder: Path) -> LatentDataset | TokenDataset:
    return TokenDataset(folder) if CacheReader(folder).codebook is not None else LatentDataset(folder)


def _row(
    dataset: LatentDataset | TokenDataset, npy: _NpyFolder, numbers: Sequence[int], repeats: int
) -> dict[str, Any]:
    header = dataset.reader.header
    sides: dict[str, Callable[[int], object]] = {
        "read": lambda number: dataset.reader.side(number, bool(number % 2)),
        "items": lambda number: dataset[number],
    }
    npy_sides: dict[str, Callable[[int], object]] = {
        "read": lambda number: npy.read(number, bool(number % 2)),
        "items": lambda number: npy.item(dataset, number),
    }
    ours: dict[str, list[float]] = {name: [] for name in sides}
    theirs: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(repeats + 1):
        for name in sides:
            found = _rate(sides[name], numbers), _rate(npy_sides[name], numbers)
            if block:  # the first one warms up
                ours[name].append(found[0])
                theirs[name].append(found[1])
    n = header["n_samples"]
    rates = {name: median(ours[name]) for name in sides}
    against = {name: median(theirs[name]) for name in sides}
    return {
        "format": header["settings"]["format"],
        "folder": str(dataset.reader.folder),
        "file_bytes": header["size_bytes"] / n,
        "payload_bytes": header["payload_bytes"] / n,
        **{name: header["statistics"].get(name) for name in ("mse", "psnr_db", "snr_db")},  # indices are exact
        **rates,
        "over_npy": {name: rates[name] / against[name] for name in sides},
        "npy": against,
        "blocks": {"ours": ours, "npy": theirs},
    }


def _rate(read: Callable[[int], object], numbers: Sequence[int]) -> float:
    start = time.perf_counter()
    for number in numbers:
        read(number)
    return len(numbers) / (time.perf_counter() - start)


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines to print for a result of `compare_formats`."""
    plain = result["plain"]
    names = ("file B", "payload B", f"of {plain}", "PSNR dB", "SNR dB", "read/s", "x npy", "items/s", "x npy")
    axes = "(D, h, w)" if len(result["shape"]) == 3 else "(h, w)"
    against = "the means alone in float16" if plain == "fp16" else f"the indices alone in {plain}"
    lines = [
        f"{result['n_samples']} samples of {axes} = {tuple(result['shape'])}, image and mirror; {result['n_read']} "
        "read in a random order, warm, in this process",
        f"of {plain}: bytes of the payload against {against}, {result['fp16_means_bytes']} bytes; "
        "PSNR: peak of 6 standard deviations",
        f"{'format':<12}" + "".join(f"{name:>11}" for name in names),
    ]
    for row in result["rows"]:
        over = row.get("over_npy", {"read": 1.0, "items": 1.0})
        sizes = (row["file_bytes"], row["payload_bytes"], row["of_fp16_means"], row.get("psnr_db"), row.get("snr_db"))
        cells = (*sizes, row["read"], over["read"], row["items"], over["items"])
        lines.append(f"{row['format']:<12}" + "".join(f"{_cell(cell):>11}" for cell in cells))
    return lines


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
