"""One image on its way into a latent cache, and the last stage of that way, which runs in processes of its own.

    Unit -> [read, crop] -> Loaded -> [encoder] -> Loaded -> Finish: [format, read back, measured] -> Made

Must not import torch, which would take seconds and memory in each of the processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codec.errors import NonFiniteError
from codec.shards import SampleRef
from train.cache.index import Place, Sample
from train.cache.moments import LatentFormat, Sides
from train.cache.plan import Entry
from train.cache.tokens import Tokens


@dataclass(frozen=True)
class Unit:
    """One image to be worked on: which of its crops exist already, and where."""

    entry: Entry
    kept: tuple[Place | None, ...]


@dataclass(frozen=True)
class Cropped:
    """One crop of one image, on its way: its pixels or what was kept of it, later its latents.

    Attributes:
        facts: what its JSON says so far; all of it for one that was kept.
        pixels: (S, S, 3) uint8; None: it was kept, or is encoded.
        sides: its latents, or its indices; None: not yet, or it was kept.
        members: of one that was kept.
    """

    facts: Mapping[str, Any]
    pixels: np.ndarray | None = None
    sides: Sides | tuple[Tokens, Tokens] | None = None
    members: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """The crops of one image, or the reason why there are none."""

    entry: Entry
    crops: tuple[Cropped, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Made:
    """The samples of one image, or the reason why there are none; how many went through the network."""

    ref: SampleRef
    samples: tuple[Sample, ...] = ()
    reason: str | None = None
    n_encoded: int = 0


@dataclass(frozen=True)
class Finish:
    """Puts crops into a format, in whatever process; reads them back, for what is stored is what counts."""

    form: LatentFormat

    def __call__(self, _chunk: Sequence[Unit], loaded: Sequence[Loaded]) -> list[Made]:
        """Return the samples of some images, or why there are none."""
        return [self._made(one) for one in loaded]

    def _made(self, loaded: Loaded) -> Made:
        ref = loaded.entry.ref
        if loaded.reason is not None:
            return Made(ref, reason=loaded.reason)
        try:
            samples = tuple(self._sample(crop) for crop in loaded.crops)
        except NonFiniteError as exception:
            return Made(ref, reason=f"{ref.name}: {exception}")
        return Made(ref, samples, n_encoded=sum(crop.sides is not None for crop in loaded.crops))

    def _sample(self, crop: Cropped) -> Sample:
        facts, members = dict(crop.facts), crop.members
        if crop.sides is not None:
            written = self.form.write(crop.sides)
            facts, members = facts | written.facts, written.members
        stored = [self.form.read(members, mirrored) for mirrored in (False, True)]
        if crop.sides is not None:
            facts |= self.form.errors(stored, crop.sides)
        return Sample(facts, members, self.form.sums_of(stored, facts))
