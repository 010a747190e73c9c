"""What recipes of tasks set alike that learn from a set in memory: a head, a prior. Must not import torch."""

from dataclasses import dataclass
from typing import ClassVar

from train.checks import require


@dataclass(frozen=True, kw_only=True)
class SetDataConfig:
    """What is trained on; all of it is held in memory."""

    cache: str = ""
    """Folder of `codec-train cache`; for a prior with `--format indices`."""
    validation_cache: str = ""
    """Another such folder, of the same encoder, whose images are held out; empty = a part of `cache`."""
    n_validation: int = 300
    """Images of `cache` that are held out without `validation_cache`, chosen by a hash of their bytes."""
    mirror: bool = True
    """Learn from the mirror of an image half of the time."""

    least_validation: ClassVar[int] = 1

    def __post_init__(self) -> None:
        least = self.least_validation
        require(self.n_validation >= least, "data.n_validation", self.n_validation, f">= {least}")


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What the model card says beside what was measured."""

    name: str = ""
    """Short name; empty = the run folder's name."""
    licence: str = ""
    """Licence of the weights, e.g. apache-2.0; empty = the card says that none is granted."""
    data_licence: str = ""
    """Licence of the training images; empty = the card says that it is not stated."""
