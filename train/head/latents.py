"""What a head learns from: latents of an image set in memory, held-out ones apart, and a condition for each.

    caches -> LatentSet (N, M, D, h, w) normalized, M = 1 or 2 with the mirror; label = class, or row of the embeddings

The feed is `train.denoiser_feed.LatentFeed`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codec.errors import ModelError, UsageError
from codec.head.config import Space
from codec.head.folder import Origin
from train.cache.dataset import labels_of
from train.cache.model import CacheModel
from train.cache.reader import CacheReader
from train.denoiser_feed import LatentSet
from train.head.config import LatentDataConfig
from train.set_feed import hold_out


@dataclass(frozen=True, kw_only=True)
class HeadData:
    """What a head is trained on, and measured on.

    Attributes:
        training: learned from; normalized. Labels are classes, rows of `embeddings`, or all 0 without a condition.
        held_out: only measured on.
        classes: names of the labels 0, 1, ...; empty with embeddings, and without a condition.
        embeddings: (R, E) float32; None without.
        origin: whose latents these are.
        n_dropped: training samples left out because their image is held out.
        digests: 16 hex digits of each part, equal where it is the same in the same order.
    """

    training: LatentSet
    held_out: LatentSet
    classes: Sequence[str]
    embeddings: torch.Tensor | None
    origin: Origin
    n_dropped: int
    digests: tuple[str, str]

    @property
    def space(self) -> Space:
        """What a head of these latents is for."""
        channels, height, width = self.training.shape
        n = 0 if self.embeddings is None else self.embeddings.shape[1]
        return Space(channels=channels, height=height, width=width, n_classes=len(self.classes), embedding_width=n)

    @property
    def has_conditions(self) -> bool:
        """Whether samples have a condition."""
        return self.embeddings is not None or len(self.classes) > 0

    def condition_digest(self, latents: LatentSet) -> str:
        """Return 16 hex digits of the conditions of one part: equal where these are, in the same order."""
        c, dtype = self.conditions(latents.labels), "<i8" if self.embeddings is None else "<f4"
        return hashlib.sha256(np.ascontiguousarray(c.numpy(), dtype).tobytes()).hexdigest()[:16]

    def conditions(self, labels: torch.Tensor) -> torch.Tensor:
        """Return what the network is told of samples with such labels: (B,) classes or (B, E) embeddings."""
        return labels if self.embeddings is None else self.embeddings[labels.cpu()].to(labels.device)

    def told(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `conditions` of labels, (B,), and which of them are none, (B,) bool: all, without conditions."""
        return self.conditions(labels), torch.full((len(labels),), not self.has_conditions, device=labels.device)


@dataclass(frozen=True)
class _Read:
    """One cache, whole."""

    latents: LatentSet
    sha256s: Sequence[str]

    def some(self, chosen: Sequence[int]) -> "_Read":
        latents = self.latents
        part = LatentSet(
            keys=[latents.keys[n] for n in chosen],
            labels=latents.labels[chosen],
            mean=latents.mean[chosen],
            std=None if latents.std is None else latents.std[chosen],
        )
        return _Read(part, [self.sha256s[n] for n in chosen])

    def digest(self) -> str:
        sha = hashlib.sha256("\n".join([*self.latents.keys, "", *self.sha256s]).encode(errors="surrogateescape"))
        sha.update(np.ascontiguousarray(self.latents.mean.numpy(), dtype="<f4").tobytes())
        return sha.hexdigest()[:16]


def load_data(config: LatentDataConfig, classes: Sequence[str] | None = None) -> HeadData:
    """Read the caches of a recipe.

    Args:
        config: which, and what conditions are.
        classes: names of the labels 0, 1, ...; None = those of `cache`.

    Raises:
        UsageError: no cache is named, or one is missing, unfinished, or of indices; a sample has no class or no
            embedding; nothing is left to train or to measure on; a held-out class or shape that the training has not.
        ModelError: the held-out latents are of another encoder.
        FormatError: a cache is damaged.
    """
    if not config.cache:
        raise UsageError("trained on what? Set data.cache=FOLDER (codec-train cache writes one)")
    reader = CacheReader(config.cache)
    reader.require_latents()
    conditions = _Conditions(config, reader, classes)
    training = _read(reader, conditions, config.mirror)
    if config.validation_cache:
        other = CacheReader(config.validation_cache)
        other.require_latents()
        _check_fits(other, reader)
        held_out = _read(other, conditions, mirror=False)
        hashes = set(held_out.sha256s)
    else:
        hashes = hold_out(training.sha256s, config.n_validation)
        held_out = training.some([n for n, sha256 in enumerate(training.sha256s) if sha256 in hashes])
    kept = [n for n, sha256 in enumerate(training.sha256s) if sha256 not in hashes]
    if not kept or len(held_out.latents) < 2:
        n_held_out = len(held_out.latents)
        raise UsageError(
            f"{config.cache}: {len(kept)} samples to learn from, {n_held_out} (of at least 2) to measure on"
        )
    n_dropped = len(training.latents) - len(kept) if config.validation_cache else 0
    training = training.some(kept)
    return HeadData(
        training=training.latents,
        held_out=held_out.latents,
        classes=conditions.classes,
        embeddings=conditions.vectors,
        origin=origin_of(reader.model),
        n_dropped=n_dropped,
        digests=(training.digest(), held_out.digest()),
    )


def origin_of(model: CacheModel) -> Origin:
    """Return whose latents a cache holds, as a head remembers it."""
    return Origin(
        model=Path(model.name).name,
        encoder_id=model.encoder_id,
        decoder_id=model.decoder_id,
        f=model.f,
        normalisation=model.normalisation,
    )


def _check_fits(other: CacheReader, reader: CacheReader) -> None:
    if other.model.encoder_id != reader.model.encoder_id:
        raise ModelError(
            f"{other.folder}: latents of encoder {other.model.encoder_id} (model {other.model.name}), {reader.folder} "
            f"of {reader.model.encoder_id} ({reader.model.name})"
        )
    if other.header["shape"] != reader.header["shape"]:
        shapes = f"{other.header['shape']}, {reader.folder} of {reader.header['shape']}"
        raise UsageError(f"{other.folder}: latents of shape (D, h, w) {shapes}")


class _Conditions:
    """The condition of each sample of a cache, as a number."""

    def __init__(self, config: LatentDataConfig, reader: CacheReader, classes: Sequence[str] | None) -> None:
        self.kind = config.condition
        self.classes: list[str] = []
        self.vectors: torch.Tensor | None = None
        self._rows: dict[str, int] = {}
        if self.kind == "class":
            if not reader.header["classes"]:
                raise UsageError(
                    f"{reader.folder}: no sample has a class (shards of class folders give them); "
                    "data.condition=none learns without"
                )
            self.classes = list(reader.header["classes"] if classes is None else classes)
        if self.kind == "embedding":
            self._file = Path(config.embeddings)
            keys, vectors = _read_embeddings(self._file)
            self._rows = {key: n for n, key in enumerate(keys)}
            self.vectors = torch.from_numpy(vectors)

    def labels(self, reader: CacheReader, keys: Sequence[str]) -> torch.Tensor:
        """Return the number of each sample's condition, (N,) int64."""
        if self.kind == "none":
            return torch.zeros(len(keys), dtype=torch.int64)
        if self.kind == "class":
            labels = labels_of(reader, self.classes, given=True)
            missing, what = [key for key, label in zip(keys, labels, strict=True) if label < 0], "class"
        else:
            labels = np.array([self._rows.get(key, -1) for key in keys], np.int64)
            missing, what = [key for key, label in zip(keys, labels, strict=True) if label < 0], f"row in {self._file}"
        if missing:
            raise UsageError(
                f"{reader.folder}: {len(missing)} of {len(keys)} samples have no {what}; first: {missing[0]}"
            )
        return torch.from_numpy(labels)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Return arrays of an .npz file; raises UsageError where it is none, or has one of them not."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return [found[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError) as exception:
        what = f"{', '.join(names[:-1])} and {names[-1]}"
        raise UsageError(f"{path}: not an .npz file with {what}: {exception}") from exception


def _read_embeddings(path: Path) -> tuple[list[str], np.ndarray]:
    """Return names and vectors, (N, E) float32; raises UsageError for anything else."""
    keys, vectors = read_arrays(path, "keys", "vectors")
    sound = keys.ndim == 1 and keys.dtype.kind == "U" and vectors.ndim == 2 and vectors.dtype.kind == "f"
    if not sound or len(keys) != len(vectors) or not vectors.size or not np.isfinite(vectors).all():
        shapes = f"keys {keys.shape} {keys.dtype}, vectors {vectors.shape} {vectors.dtype}"
        raise UsageError(f"{path}: {shapes}, expected (N,) strings and (N, E) finite floats")
    return [str(key) for key in keys], vectors.astype(np.float32)


def _read(reader: CacheReader, conditions: _Conditions, mirror: bool) -> _Read:
    shape = (len(reader), 1 + mirror, *reader.header["shape"])
    mean, std = np.empty(shape, np.float32), np.empty(shape, np.float32)
    keys, names, hashes, has_std = [], [], [], False
    for number in range(len(reader)):
        for side in range(1 + mirror):
            moments, facts = reader.read(number, bool(side))
            mean[number, side] = moments.mean
            has_std = moments.std is not None
            if moments.std is not None:
                std[number, side] = moments.std
        names.append(facts["key"])
        keys.append(f"{facts['key']}#{facts['crop']}")
        hashes.append(facts["sha256"])
    reader.close()
    labels = conditions.labels(reader, names)
    normalisation = reader.model.normalisation
    flat = torch.from_numpy(mean).flatten(0, 1)
    latents = LatentSet(
        keys=keys,
        labels=labels,
        mean=normalisation.normalize(flat).reshape(shape),
        std=torch.from_numpy(std) / normalisation.deviation(flat) if has_std else None,
    )
    return _Read(latents, hashes)
