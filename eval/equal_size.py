"""One image through several codecs at the nearest file size that each can make, for fair pictures side by side."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from eval.baselines import Baseline, encode_near
from eval.rd import Model

COARSE = tuple(range(0, 101, 5))  # the qualities that a model is asked for first


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One codec's file of an image.

    Attributes:
        codec: the codec's label, unique within a run.
        quality: of this file; None for a VQ model, which has but its own.
        size_bytes: of the whole file.
        bpp: bits per pixel of the whole file.
        pixels: decoded, (H, W, 3) uint8.
    """

    codec: str
    quality: int | None
    size_bytes: int
    bpp: float
    pixels: np.ndarray


def labels(models: Sequence[Model], baselines: Sequence[Baseline]) -> list[str]:
    """Return a label for each codec, models first; a number is added to the later ones of the same name."""
    names = [model.name for model in models] + [baseline.label for baseline in baselines]
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]


def at_equal_size(x: np.ndarray, models: Sequence[Model], baselines: Sequence[Baseline], bpp: float) -> list[Coded]:
    """Code an image with every codec at nearly the same file size.

    The first codec comes as near to `bpp` as it can (a model on its coarse qualities), and sets the size for the rest.

    Args:
        x: (H, W, 3) uint8.
        models: searched over coarse qualities, and those after the first then one by one around the best.
        baselines: searched over their whole range of quality.
        bpp: bits per pixel to aim at.

    Returns:
        One file per codec, models first.
    """
    names = labels(models, baselines)
    codecs: list[Model | Baseline] = [*models, *baselines]
    if not codecs:
        return []
    size_bytes = bpp * x.shape[0] * x.shape[1] / 8
    coded = [_coded(names[0], codecs[0], x, size_bytes, fine=False)]
    size_bytes = coded[0].size_bytes
    for name, codec in zip(names[1 : len(models)], models[1:], strict=True):
        coded.append(_coded(name, codec, x, size_bytes))
    rest = range(len(coded), len(codecs))  # each runs on one thread
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        coded += pool.map(lambda index: _coded(names[index], codecs[index], x, size_bytes), rest)
    return coded


def _coded(name: str, codec: Model | Baseline, x: np.ndarray, size_bytes: float, fine: bool = True) -> Coded:
    if isinstance(codec, Baseline):
        quality, data = encode_near(functools.partial(codec.encode, x), codec.quality_range, size_bytes)
    elif not codec.has_quality:
        quality, data = None, codec.encode_many(x, [None])[0]
    else:
        quality, data = _nearest(codec, x, COARSE, size_bytes)
        if fine:
            around = [q for q in range(quality - 4, quality + 5) if 0 <= q <= 100]
            quality, data = _nearest(codec, x, around, size_bytes)
    bpp = 8 * len(data) / (x.shape[0] * x.shape[1])
    return Coded(codec=name, quality=quality, size_bytes=len(data), bpp=bpp, pixels=codec.decode(data))


def _nearest(model: Model, x: np.ndarray, qualities: Sequence[int], size_bytes: float) -> tuple[int, bytes]:
    files = model.encode_many(x, qualities)
    best = min(range(len(files)), key=lambda index: abs(len(files[index]) - size_bytes))
    return qualities[best], files[best]
