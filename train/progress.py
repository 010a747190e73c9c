"""How far a run is, and its values in short: for the log, the progress bar and the model card."""

import math
import operator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from train.journal import environment
from train.task import Tally, Task, Values


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        images: images seen, over all ranks; the position in the run's sequence.
        time_s: seconds of training, without validation.
    """

    step: int = 0
    images: int = 0
    time_s: float = 0.0

    def fraction(self, n_images: int, time_limit_s: float) -> float:
        """The part of the run that is done, 0..1: of the images or of the time (0 = no limit), whichever is further."""
        of_time = self.time_s / time_limit_s if time_limit_s > 0 else 0.0
        return min(1.0, max(self.images / n_images, of_time))


def run_record(
    progress: Progress, validation: dict[str, float], n_bad: int, task: Task, goes: int = 1
) -> dict[str, Any]:
    """Return what a run knows about itself, for the model card; `goes`: how many trained, see `train.compact`."""
    return {
        **({"goes": goes} if goes > 1 else {}),
        "images_seen": progress.images,
        "steps": progress.step,
        "time_s": round(progress.time_s, 1),
        "validation": validation,
        "n_bad_samples": n_bad,
        "losses": task.describe()["loss"],
        **{name: value for name, value in environment().items() if name != "command"},  # it holds local paths
    }


def passed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def finite(value: float | list[float]) -> bool:
    """Whether a value, or each of a list, is finite."""
    return all(map(math.isfinite, value)) if isinstance(value, list) else math.isfinite(value)


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it; of tallies, which are added up, their figures."""
    out: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if isinstance(values[0], Tally):
            out |= reduce(operator.add, values).figures()
        else:
            out[name] = float(np.mean(values))
    return out


def brief(values: Values) -> str:
    """The weighted terms, short enough for a progress bar of 80 columns; log.jsonl has them in full."""
    shown = [
        name
        for name in ("l1", "l2", "huber", "bce", "perceptual", "ms_ssim", "kl", "rate", "vq", "commitment", "error")
        if name in values
    ]
    return " ".join(f"{name[:4]} {values[name]:.2f}" for name in shown) + f" {values.get('phase', '')}"
