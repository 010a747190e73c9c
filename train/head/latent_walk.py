"""Ways through a head's units: between two images, along single units, sums of images. Imports torch.

units u -> (u - mean) / deviation of the prior's draws -> linear, spherical -> back -> Head.decode
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.head import Head
from codec.head.network import Units

Path = Callable[[Tensor, Tensor, Tensor], Tensor]
"""a and b of one shape, t (T,) in [0, 1] -> (T, ...): a at 0, b at 1."""

_DRAWS = 256  # of the prior, for its mean and deviation
_LEAST_DEVIATION = 1e-6
_LOOKED = 4  # steps of a flow-matching decoder where units are only ranked
_PARALLEL = 1e-5  # sine of an angle below which directions have no one way between them


def linear(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return (1 - t) a + t b; see `Path`."""
    at = t.reshape(-1, *[1] * a.ndim)
    return (1 - at) * a + at * b


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Turn from the direction of a to that of b at constant speed, while the norm goes linearly; see `Path`.

    Draws of N(0, I) in many dimensions have norms close to each other, a straight line between two is shorter in the
    middle (White 2016, arXiv:1609.04468; the formula: Shoemake 1985). Where one is 0, or both lie on one line through
    0, it is the straight line.
    """
    # In float64: near the ends sines of small angles are divided.
    one, other = a.double().flatten(), b.double().flatten()
    norms = one.norm(), other.norm()
    if not min(norms) > 0:
        return linear(a, b, t)
    cosine = float(one @ other / (norms[0] * norms[1]))
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1)).to(a.device)
    if float(angle.sin()) < _PARALLEL:
        return linear(a, b, t)
    at = t.double().to(a.device)[:, None]
    direction = torch.sin((1 - at) * angle) * one / norms[0] + torch.sin(at * angle) * other / norms[1]
    found: Tensor = direction / angle.sin() * ((1 - at) * norms[0] + at * norms[1])
    return found.reshape(-1, *a.shape).to(a.dtype)


PATHS: dict[str, Path] = {"linear": linear, "spherical": spherical}


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of what a prior draws, each unit by itself, level by level, without a batch axis."""

    mean: Units
    deviation: Units

    @classmethod
    def of(cls, head: Head, c: Sequence[Any]) -> "Spread":
        """Return those under conditions, evenly mixed, of 256 draws whose seed is fixed."""
        each = -(-_DRAWS // len(c))
        units = head.draw_units([one for one in c for _ in range(each)], seed=0)
        mean, deviation = (tuple(part) for part in zip(*((u.mean(0), u.std(0)) for u in units), strict=True))
        return cls(mean, tuple(each.clamp_min(_LEAST_DEVIATION) for each in deviation))


def between(a: Units, b: Units, n_steps: int, path: Path, spread: Spread) -> Units:
    """Return units on the way from one image to another, (n_steps, ...) for each level.

    Args:
        a: of one image, (1, ...) for each level.
        b: of another one.
        n_steps: 2 or more, both ends among them.
        path: of `PATHS`.
        spread: where 0 lies and how long each unit is.
    """
    t = torch.linspace(0, 1, n_steps, device=a[0].device)
    found = []
    for one, other, mean, deviation in zip(a, b, spread.mean, spread.deviation, strict=True):
        way = path((one[0] - mean) / deviation, (other[0] - mean) / deviation, t)
        found.append(way * deviation + mean)
    return tuple(found)


def along(units: Units, unit: int, values: Tensor, spread: Spread) -> Units:
    """Return units of one image with one of the first level at several values, (T, ...) for each level.

    Args:
        units: (1, ...) for each level.
        unit: which one moves.
        values: (T,) in deviations of the prior from its mean.
        spread: of the prior.
    """
    moved = [each.repeat(len(values), *[1] * (each.ndim - 1)) for each in units]
    moved[0][:, unit] = spread.mean[0][unit] + values.to(moved[0]) * spread.deviation[0][unit]
    return tuple(moved)


def effects(head: Head, units: Units, c: Any, spread: Spread) -> Tensor:
    """Return what each unit of the first level does to an image's latents, (U,) float32.

    The root mean square, over D, h, w, of the difference of standardised latents with the unit one deviation below the
    prior's mean and one above it. A unit that has collapsed does nothing.
    """
    n, ends = units[0].shape[1], torch.tensor([-1.0, 1.0])
    parts = [along(units, unit, ends, spread) for unit in range(n)]
    batch = tuple(torch.cat(level) for level in zip(*parts, strict=True))
    z = head.decode(batch, [c] * 2 * n, numbers=[0] * 2 * n, steps=min(head.steps, _LOOKED))
    seen = head.network.standardised(z)
    return (seen[1::2] - seen[::2]).square().mean((1, 2, 3)).sqrt()


def combined(units: Units, weights: Sequence[float]) -> Units:
    """Return the weighted sum of images' units, (1, ...) for each level, of (B, ...)."""
    return tuple(torch.tensordot(torch.tensor(weights).to(each), each, dims=1)[None] for each in units)
