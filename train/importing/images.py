"""The images that a foreign autoencoder's latents are measured on: out of a folder or out of shards, random order."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codec import files, images, shards
from codec.console import progress, stderr
from codec.errors import ImageError, UsageError
from codec.images import EXTENSIONS
from codec.shard_scan import list_shards

_CHECKED = 2  # images of which the reconstruction is looked at


@dataclass
class FitImages:
    """Images to fit to, read one after the other.

    Attributes:
        path: the folder.
        entries: what to read, in random order.
        used: how many were read so far.
        bad: (name, reason) of each that could not be.
        first: the first ones that were read, (H, W, 3) uint8.
    """

    path: Path
    entries: list[Any]
    used: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

    @classmethod
    def open(cls, path: Path, limit: int) -> "FitImages":
        """List the images of a folder, or of the shards in it; reads none.

        Args:
            path: a folder of images, a folder of tar shards, or one image.
            limit: how many are used at most, drawn with a fixed seed.

        Raises:
            UsageError: there is nothing to read.
        """
        is_shards = path.is_dir() and ((path / shards.MANIFEST).is_file() or bool(list_shards(path)))
        entries: list[Any] = [*(shards.read_index(path) if is_shards else files.find([path], EXTENSIONS))]
        order = np.random.default_rng(0).permutation(len(entries))[:limit]
        return cls(path, [entries[index] for index in order])

    def __len__(self) -> int:
        return len(self.entries)

    def read(self) -> Iterator[np.ndarray]:
        """Yield (H, W, 3) uint8 images; what cannot be read goes to `bad`.

        Raises:
            UsageError: none could be read.
        """
        with progress(disable=not stderr.is_terminal) as bar:
            for entry in bar.track(self.entries, description="measure latents"):
                is_sample = isinstance(entry, shards.SampleRef)
                name = entry.name if is_sample else str(entry.path)
                try:
                    image = images.load(shards.read_sample(entry) if is_sample else entry.path, name=name)
                except ImageError as exception:
                    self.bad.append((name, str(exception).removeprefix(f"{name}: ")))
                    continue
                self.used += 1
                self._digest.update(f"{image.shape}".encode() + image.tobytes())
                if len(self.first) < _CHECKED:
                    self.first.append(image)
                yield image
        if not self.used:
            raise UsageError(
                f"{self.path}: none of {len(self.entries)} images can be read; the first: {self.bad[0][1]}"
            )

    def describe(self) -> dict[str, Any]:
        """Return what was read, for codec.json."""
        return {
            "fitted_to": self.path.resolve().name,
            "n_images": self.used,
            "sha256": self._digest.hexdigest(),
            "sha256_of": "shape and pixels of these images in this order",
        }
