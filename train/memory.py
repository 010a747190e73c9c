"""A whole image set in memory, where the networks are: decoded once, cut there.

    samples -> decode (threads) -> uint8 (3, H, W) on the device -> position k -> slice, mirror -> float32 in [-1, 1]

What stands at position k, and where it is cut, is drawn as `train.data.SampleSequence` draws it: the same batches.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.errors import ImageError
from codec.shards import SampleRef
from train.crops import at_least, corner, turns
from train.data import RankBatches, SampleSequence, collate
from train.samples import load_picture

_Place = tuple[Path, int]


class MemoryImages:
    """The images of a sequence on a device."""

    def __init__(self, sequence: SampleSequence, device: torch.device) -> None:
        """Decode them all; one that is unreadable is met again, and counted, wherever the sequence has it.

        Args:
            sequence: plain crops of RGB images (`data.memory`).
            device: takes about 3 * H * W bytes for each image.
        """
        self._device = device
        self._sides = sequence.config.sides
        self._images: dict[_Place, torch.Tensor] = {}
        self._enlarged: dict[tuple[_Place, int], torch.Tensor] = {}  # of images smaller than a crop of that side
        self._bad: dict[_Place, ImageError | OSError] = {}
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes outside Python's lock
            for sample, found in zip(sequence.samples, pool.map(self._decoded, sequence.samples), strict=True):
                if isinstance(found, ImageError | OSError):
                    self._bad[_place(sample)] = found
                    continue
                self._images[_place(sample)] = self._moved(found[0])
                for side, image in found[1].items():
                    self._enlarged[_place(sample), side] = self._moved(image)

    @property
    def size_bytes(self) -> int:
        """Bytes that the images take."""
        return sum(image.numel() for image in (*self._images.values(), *self._enlarged.values()))

    def _decoded(self, sample: SampleRef) -> tuple[np.ndarray, dict[int, np.ndarray]] | ImageError | OSError:
        """Return an image, (H, W, 3) uint8, and what is cut instead for each side that it is too small for."""
        try:
            picture = load_picture(sample)
            larger = {side: at_least(picture, side) for side in self._sides if min(picture.size) < side}
            return np.asarray(picture), {side: np.asarray(image) for side, image in larger.items()}
        except (ImageError, OSError) as exception:
            return exception

    def _moved(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0))).to(self._device)

    def _image(self, sample: SampleRef) -> SampleRef:
        """Return a sample that there is an image of; raises what reading it has raised."""
        if _place(sample) in self._bad:
            raise self._bad[_place(sample)]
        return sample

    def _cut(self, sequence: SampleSequence, position: int) -> dict[str, Any]:
        """Return what `sequence[position]` does, its image as uint8 on the device."""
        sample, (_, side), rng, told = sequence.find(position, self._image)
        image = self._enlarged.get((_place(sample), side), self._images[_place(sample)])
        top, left = corner(image.shape[1], image.shape[2], side, rng)
        piece = image[:, top : top + side, left : left + side]
        return {"image": piece.flip(-1) if sequence.config.flip and turns(rng) else piece, **told}

    def batches(
        self, sequence: SampleSequence, batch_size: int, *, rank: int = 0, n_ranks: int = 1, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield the batches of one rank, without end; see `train.data.batches`.

        Args:
            sequence: of these images, in the stage that the run is in.
            batch_size: B, per rank.
            rank: this rank.
            n_ranks: how many there are.
            start: position of the first sample of the first global batch.

        Raises:
            UsageError: see `SampleSequence.require_whole_batches` and `SampleSequence.find`.
        """
        sequence.require_whole_batches(batch_size, start)
        for positions in RankBatches(batch_size, rank, n_ranks, start):
            batch = collate([self._cut(sequence, position) for position in positions])
            # The operations of `codec.pixels.to_float`, which takes arrays.
            yield batch | {"image": batch["image"].to(torch.float32).div_(127.5).sub_(1.0)}


def _place(sample: SampleRef) -> _Place:
    return sample.shard, sample.offset
