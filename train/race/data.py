"""The pictures of a race: labelled images of a folder or of shards, cropped to one size, in memory, some held out.

    folder of class folders, or shards -> Protocol folder-<size> -> (size, size, 3) uint8, label -> training, held out

What is held out is decided by a hash of the file's bytes. Must not import torch.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from codec import files, images
from codec.errors import ImageError, UsageError
from codec.shard_scan import list_shards
from codec.shards import MANIFEST, read_index, read_sample
from eval.protocol import folder_of

UNLABELLED = "(no class)"
_MOST_HELD_OUT = 0.2  # of the images, where nobody says which are held out


@dataclass(frozen=True)
class Picture:
    """One image, ready to be encoded.

    Attributes:
        key: its name in the folder or the shards.
        label: its class.
        sha256: of the file's bytes.
        pixels: (size, size, 3) uint8 sRGB.
    """

    key: str
    label: str
    sha256: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Pictures:
    """What a race is run on.

    Attributes:
        training: learned from.
        held_out: only measured on.
        classes: names of the labels 0, 1, ...; those of the training images.
        failed: a line for each image that could not be used.
    """

    training: Sequence[Picture]
    held_out: Sequence[Picture]
    classes: Sequence[str]
    failed: Sequence[str]

    def labels(self, pictures: Sequence[Picture]) -> list[int]:
        """Return the class numbers of pictures."""
        number = {name: n for n, name in enumerate(self.classes)}
        return [number[picture.label] for picture in pictures]

    def digest(self) -> str:
        """Return a hash of which pixels are learned from and which are held out, 16 hex digits."""
        sha = hashlib.sha256()
        for part in (self.training, self.held_out):
            for picture in part:
                sha.update(f"{picture.key}\0{picture.label}\0{picture.sha256}\n".encode(errors="surrogateescape"))
            sha.update(b"\n")
        return sha.hexdigest()[:16]

    def asked(self, n: int) -> list[int]:
        """Return the classes of n images to draw: those of the held-out ones, in their order, from the start again."""
        labels = self.labels(self.held_out)
        return [labels[k % len(labels)] for k in range(n)]

    def control(self, n: int) -> list[int]:
        """Return n training images of the classes of `asked`, none twice as long as a class has others.

        They stand for what a perfect generator would give.
        """
        by_class: dict[int, list[int]] = {label: [] for label in range(len(self.classes))}
        labels = self.labels(self.training)
        for index in sorted(range(len(self.training)), key=lambda index: (self.training[index].sha256, index)):
            by_class[labels[index]].append(index)
        used = [0] * len(self.classes)
        chosen = []
        for label in self.asked(n):
            chosen.append(by_class[label][used[label] % len(by_class[label])])
            used[label] += 1
        return chosen


def load_pictures(
    data: Path,
    held_out: Path | None,
    *,
    size: int,
    n_held_out: int,
    limit: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Pictures:
    """Read a labelled image set.

    Args:
        data: a folder, whose images have the name of the folder directly holding them as class, or a folder of shards.
        held_out: another such folder, of which all that has a known class is measured on (at most n_held_out, chosen
            by hash); None: a part of `data` is held out.
        size: side in pixels that images are reduced and cropped to.
        n_held_out: how many to hold out; without `held_out` at most a fifth of all.
        limit: at most so many training images, chosen by hash; None = all.
        advance: called after each image.

    Raises:
        UsageError: a folder is missing or without images, or too few of them can be used.
    """
    failed: list[str] = []
    pictures = list(_read(data, size, failed, advance))
    if held_out is None:
        count = min(n_held_out, int(_MOST_HELD_OUT * len(pictures)))
        chosen = {picture.sha256 for picture in _by_hash(pictures)[:count]}  # copies of an image stay on one side
        measured = [picture for picture in pictures if picture.sha256 in chosen]
    else:
        measured = _by_hash(list(_read(held_out, size, failed, advance)))[:n_held_out]
        chosen = {picture.sha256 for picture in measured}
    training = [picture for picture in pictures if picture.sha256 not in chosen]
    training = sorted(_by_hash(training)[:limit], key=lambda picture: picture.key)
    classes = sorted({picture.label for picture in training})
    for picture in measured:
        if picture.label not in classes:
            failed.append(f"{picture.key}: held out, and of class {picture.label}, of which no image is learned from")
    measured = sorted((p for p in measured if p.label in classes), key=lambda picture: picture.key)
    if not measured or not training:
        found = f"{len(training)} images to learn from and {len(measured)} to measure on"
        first = f"; the first that could not be used: {failed[0]}" if failed else ""
        raise UsageError(f"{data}: {found}, expected some of both, of {size} pixels or more{first}")
    return Pictures(training, measured, classes, failed)


def _by_hash(pictures: Sequence[Picture]) -> list[Picture]:
    return sorted(pictures, key=lambda p: (hashlib.sha256(b"validation" + p.sha256.encode()).digest(), p.key))


def _read(folder: Path, size: int, failed: list[str], advance: Callable[[], None]) -> Iterator[Picture]:
    protocol = folder_of(size)
    for key, label, read in _listed(folder):
        try:
            data = read()
            pixels = protocol.prepare(images.load(data, name=key))
        except ImageError as exception:
            text = str(exception)
            failed.append(text if text.startswith(key) else f"{key}: {text}")
            continue
        finally:
            advance()
        yield Picture(key, label or UNLABELLED, hashlib.sha256(data).hexdigest(), pixels)


def _listed(folder: Path) -> Iterator[tuple[str, str | None, Callable[[], bytes]]]:
    """Yield name, class and reader of each image of a folder or of shards."""
    if (folder / MANIFEST).is_file() or (folder.is_dir() and list_shards(folder)):
        for ref in read_index(folder):
            yield ref.key, ref.label, partial(read_sample, ref)
        return
    for source in files.find([folder], images.EXTENSIONS):
        yield str(source.relative), source.relative.parent.name or None, partial(images.read, source.path)
