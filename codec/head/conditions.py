"""What users give as conditions and numbers -> what a conditional network takes. Imports torch alone.

["hat", 3, None], or embeddings (B, E) -> labels (B,) or embeddings, and which are none (B,)
seed, number of an image, what for     -> a random generator
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.errors import UsageError

Conditions = Sequence[Any] | np.ndarray | Tensor | None
"""One of each image: name or number of its class, None = no condition; or embeddings, (B, E). None = none at all."""


def conditions_of(
    c: Conditions, n: int | None, classes: Sequence[str], where: str, embedding_width: int = 0
) -> tuple[Tensor, Tensor]:
    """Return conditions as a network takes them: classes (B,) or embeddings (B, E), and which are none, (B,) bool.

    Args:
        c: see `Conditions`.
        n: how many there have to be; None = as many as there are.
        classes: names of the labels 0, 1, ...
        where: begins the message of an error.
        embedding_width: numbers of an embedding; 0 = conditions are classes.

    Raises:
        UsageError: an unknown class, or embeddings of another width.
        ValueError: another number of conditions, or a single name.
    """
    if isinstance(c, str):
        raise ValueError(f"conditions: {c!r}, expected one for each image: [{c!r}]")
    found = [None] * (n or 0) if c is None else list(c)
    if not found or (n is not None and len(found) != n):
        raise ValueError(f"conditions: {len(found)}, expected {n or '1 or more'}")
    hidden = torch.tensor([one is None for one in found])
    if embedding_width:
        rows = [_embedding(one, embedding_width, where) for one in found]
        return torch.from_numpy(np.stack(rows)), hidden
    return torch.tensor([_label(one, classes, where) for one in found]), hidden


def _label(one: Any, classes: Sequence[str], where: str) -> int:
    if one is None:
        return 0
    if isinstance(one, str):
        if one in classes:
            return list(classes).index(one)
    elif isinstance(one, int | np.integer) and not isinstance(one, bool) and 0 <= one < len(classes):
        return int(one)
    raise UsageError(f"{where}: no class {one} among {', '.join(classes) or 'none'}")


def _embedding(one: Any, width: int, where: str) -> np.ndarray:
    if one is None:
        return np.zeros(width, np.float32)
    row = np.asarray(one.detach().cpu() if isinstance(one, Tensor) else one)
    if row.dtype.kind not in "fiu" or row.shape != (width,):
        what = f"{row.shape[0]} numbers" if row.dtype.kind in "fiu" and row.ndim == 1 else repr(one)[:40]
        raise UsageError(f"{where}: an embedding of {what}, expected {width} numbers")
    if not np.isfinite(row).all():
        raise UsageError(f"{where}: an embedding of numbers that are not finite")
    return row.astype(np.float32)


def generators(seed: int, numbers: Sequence[int], purpose: str) -> list[np.random.Generator]:
    """Return a generator for each number; it depends on seed, number and purpose alone."""
    found = []
    for number in numbers:
        digest = hashlib.sha256(f"{seed}\0{number}\0{purpose}".encode()).digest()
        found.append(np.random.default_rng(int.from_bytes(digest[:16], "little")))
    return found
