"""Labelled images in memory: a folder of class folders, each image prepared by one protocol. Must not import torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codec import files, images
from codec.errors import ImageError, UsageError
from eval.protocol import Protocol

UNLABELLED = "any"
"""Label of images whose folders are no classes."""


@dataclass(frozen=True)
class Photo:
    """One image.

    Attributes:
        key: its path in the folder.
        label: the folder that directly holds it, or `UNLABELLED`.
        pixels: (S, S, 3) uint8.
    """

    key: str
    label: str
    pixels: np.ndarray


def side_of(folder: Path, labelled: bool = True) -> int:
    """Return the shorter side of the first image that `listed` gives, in pixels.

    Raises:
        UsageError: there is none.
        ImageError: it cannot be read.
    """
    first = listed(folder, labelled)[0]
    height, width = images.load(images.read(first.path), name=str(first.path)).shape[:2]
    return int(min(height, width))


def listed(folder: Path, labelled: bool = True) -> list[files.Source]:
    """Return the images in class folders; those directly in the folder (a sheet of samples) are of no class.

    Args:
        folder: holds them.
        labelled: False = folders are no classes: where there are none, images directly in the folder count.

    Raises:
        UsageError: there is none.
    """
    every = files.find([folder], images.EXTENSIONS)
    found = [source for source in every if source.relative.parent.name]
    if not found and not labelled:
        return every
    if not found:
        raise UsageError(f"{folder}: no image in a class folder (expected {folder}/<class>/<image>)")
    return found


def read_photos(
    folder: Path,
    protocol: Protocol,
    failed: list[str],
    advance: Callable[[], None] = lambda: None,
    labelled: bool = True,
) -> list[Photo]:
    """Read a folder of class folders, or of images without classes.

    Args:
        folder: holds them.
        protocol: how images are prepared; gives squares of one size.
        failed: takes a line for each image that cannot be used.
        advance: called after each image.
        labelled: see `listed`; False = all are `UNLABELLED`.

    Raises:
        UsageError: none can be used.
    """
    found = []
    for source in listed(folder, labelled):
        try:
            pixels = protocol.prepare(images.load(images.read(source.path), name=str(source.path)))
            label = source.relative.parent.name if labelled else UNLABELLED
            found.append(Photo(str(source.relative), label, pixels))
        except ImageError as exception:
            text = str(exception)
            failed.append(text if text.startswith(str(source.path)) else f"{source.path}: {text}")
        advance()
    if not found:
        raise UsageError(f"{folder}: none of the images can be used; the first: {failed[-1]}")
    return found


def labels_of(photos: Sequence[Photo], classes: Sequence[str]) -> np.ndarray:
    """Return the class number of each, (n,) int64."""
    number = {name: n for n, name in enumerate(classes)}
    return np.array([number[photo.label] for photo in photos], np.int64)


def by_class(photos: Sequence[Photo], classes: Sequence[str]) -> dict[str, list[int]]:
    """Return the positions of each class's photographs."""
    found: dict[str, list[int]] = {name: [] for name in classes}
    for n, photo in enumerate(photos):
        found[photo.label].append(n)
    return found
