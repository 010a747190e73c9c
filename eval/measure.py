"""One function over every image of a set, on one process or many: the same result, failures listed, nothing lost.

    sources -> this rank's share -> load -> Protocol.prepare -> work(name, x) -> gathered in the order of the sources

Entry: `over_images`. Every result of `codec-eval` that is about images goes through it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from codec import images
from codec.console import progress, stderr
from codec.errors import ModelError
from codec.files import Source
from codec.launch import Launch
from codec.pipeline import FAILURES
from eval.protocol import Protocol

_Value = TypeVar("_Value")
SHA256_OF = "shape and pixels of the prepared images, each hashed, in this order"


@dataclass
class Measured(Generic[_Value]):
    """What was measured of a set of images, the same on every rank.

    Attributes:
        names: of the images that count, in the order of the sources.
        values: what `work` returned for each of them.
        failed: {"image", "path", "reason"} of those that could not be measured; they count for nothing.
        sha256: of the images that count, see SHA256_OF.
    """

    names: list[str] = field(default_factory=list)
    values: list[_Value] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    sha256: str = ""

    def dataset(self, name: str) -> dict[str, Any]:
        """Return what a result says about its images."""
        return {
            "name": name,
            "n_images": len(self.names),
            "names": self.names,
            "sha256": self.sha256,
            "sha256_of": SHA256_OF,
        }


def names_of(sources: Sequence[Source]) -> list[str]:
    """Return a name for each image: its path below the folder that was named, or its whole path where these clash."""
    names = [str(source.relative) for source in sources]
    return names if len(set(names)) == len(names) else [str(source.path) for source in sources]


def over_images(
    sources: Sequence[Source],
    protocol: Protocol,
    work: Callable[[str, np.ndarray], _Value],
    launch: Launch | None = None,
    title: str = "measure",
) -> Measured[_Value]:
    """Call `work` with the name and the prepared pixels of every image, each on exactly one rank.

    Args:
        sources: the images, from `codec.files.find`, the same on every rank.
        protocol: how they are prepared; its number of images must fit.
        work: called with a name and (H, W, 3) uint8; returns something that pickle takes. It raises one of
            `codec.pipeline.FAILURES` where this image cannot be measured.
        launch: this process among its like; None = alone.
        title: of the progress bar.

    Returns:
        The same on every rank.

    Raises:
        UsageError: a named set is there only in part.
        ModelError: from `work` on any rank, on every rank: no image would fare better.
    """
    protocol.check_count(len(sources))
    launch = launch or Launch()
    own: list[tuple[int, str, Any, str]] = []  # index, digest of the pixels, value, reason
    fatal: str | None = None
    names = names_of(sources)
    with progress(disable=not stderr.is_terminal or launch.index > 0) as bar:
        for index in bar.track(launch.share(range(len(sources))), description=title):
            path = str(sources[index].path)
            try:
                x = protocol.prepare(images.load(sources[index].path))
                digest = hashlib.sha256(f"{x.shape}".encode() + x.tobytes()).hexdigest()
                own.append((index, digest, work(names[index], x), ""))
            except ModelError as exception:
                fatal = str(exception)
                break
            except FAILURES as exception:
                reason = str(exception) or type(exception).__name__
                own.append((index, "", None, reason if reason.startswith(path) else f"{path}: {reason}"))
    every = launch.gather((own, fatal))
    for _, stopped in every:
        if stopped is not None:
            raise ModelError(stopped)
    measured: Measured[_Value] = Measured()
    digests = []
    for index, digest, value, reason in sorted((row for rows, _ in every for row in rows), key=lambda row: row[0]):
        if reason:
            measured.failed.append({"image": names[index], "path": str(sources[index].path), "reason": reason})
        else:
            measured.names.append(names[index])
            measured.values.append(value)
            digests.append(digest)
    measured.sha256 = hashlib.sha256("".join(digests).encode()).hexdigest()
    return measured
