"""What changes over a run: moments, ramps, the learning rate, the KL's weight. Must not import torch.

A moment is a number of images ("20000") or a share of the run ("20%"). Everything is a function of the images seen and
of the share of the run that is done, so that a resumed run goes on exactly.
"""

import math
from dataclasses import dataclass

from train.checks import require


@dataclass(frozen=True)
class Moment:
    """A point or a length in a run: either images or a share is set, the other is 0."""

    images: int = 0
    share: float = 0.0

    def passed(self, images: float, share: float) -> float:
        """Return how much of this length has passed, 0..1, after so many images and such a share of the run."""
        if self.images > 0:
            return min(1.0, max(0.0, images / self.images))
        return min(1.0, max(0.0, share / self.share)) if self.share > 0 else 1.0


def parse_moment(text: str) -> Moment:
    """Parse "20000" or "20%"; raises ValueError for anything else."""
    if text.endswith("%"):
        share = float(text[:-1]) / 100
        if not 0 <= share <= 1:
            raise ValueError(text)
        return Moment(share=share)
    images = int(text)
    if images < 0:
        raise ValueError(text)
    return Moment(images=images)


def check_moment(name: str, text: str, more: str = "") -> None:
    """Raise ValueError naming the field unless `text` is a moment."""
    try:
        parse_moment(text)
    except ValueError:
        require(False, name, text, f'images ("20000"), a share of the run ("20%") {more}'.rstrip())


def learning_rate_factor(
    schedule: str, final_ratio: float, warmup_images: int, images_seen: int, share: float
) -> float:
    """Return the learning rate / its peak: linear warm-up times constant or cosine (arXiv:1608.03983 eq. 5).

    Args:
        schedule: "constant" or "cosine".
        final_ratio: the cosine's value at the end of the run.
        warmup_images: images over which the rate grows from 0.
        images_seen: so far.
        share: of the run that is done, 0..1.
    """
    warm = warmed(warmup_images, images_seen)
    if schedule == "constant":
        return warm
    return warm * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * share)))


def warmed(length: int, images: int) -> float:
    """Return the part of the rate that a linear warm-up lets through after so many images, 0..1; length 0 = all."""
    return min(1.0, images / length) if length else 1.0


def kl_factor(schedule: str, ramp: Moment, cycles: int, cycle_ramp: float, images_seen: int, share: float) -> float:
    """Return the KL's weight / its final value, 0..1; for "capacity", C / its final value.

    linear: grows evenly over the ramp. sigmoid: 1 / (1 + exp(-12 (p - 1/2))), p the part of the ramp that has passed,
    scaled to run from 0 to 1. exponential: (exp(5 p) - 1) / (exp(5) - 1). cyclical: `cycles` times over the run,
    growing linearly over `cycle_ramp` of each cycle, then 1 (Fu et al. 2019, arXiv:1903.10145 eq. 6 and 7).
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cyclical":
        return 1.0 if share >= 1 else min(1.0, (share * cycles % 1.0) / cycle_ramp)
    part = ramp.passed(images_seen, share)
    if schedule == "sigmoid":
        low, value = (1 / (1 + math.exp(-12 * (p - 0.5))) for p in (0.0, part))
        return (value - low) / (1 - 2 * low)
    if schedule == "exponential":
        return math.expm1(5 * part) / math.expm1(5)
    return part
