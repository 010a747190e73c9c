"""What a latent cache is to hold: settings, and the images of each of its shards. A pure function of its sources.

    refs of source shards -> parts, a share of a source shard each -> [captions] -> Part.name, with a digest of it all

A part's name changes with anything that its bytes depend on, so what exists need not be made. Must not import torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codec.errors import UsageError
from codec.shards import SampleRef
from train.cache.lcx import check_target
from train.cache.source import CENTRE, Caption, Preprocessing, caption_of, read_captions
from train.cache.tokens import INDICES

FORMATS = ("fp16", "bf16", "int8", "lcx", INDICES)
DEFAULT_QUALITY = 90
_SHARD_BYTES = 32_000_000  # of a shard's latents, were they float16; a killed run loses no more than one per process
_MOST_IMAGES = 2000  # of a shard


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What `train.cache.build.write_cache` is asked for.

    Attributes:
        shards: folder of tar shards with images, see `codec.shards.read_index`.
        model: model folder.
        out: folder of the cache.
        format: one of `FORMATS`.
        size: pixels a side, a multiple of f.
        crop: see `Preprocessing`.
        quality: of lcx, 0..100; None = 90, or by `latent_psnr`.
        latent_psnr: of lcx, least PSNR of each image's latents, in dB; None = by `quality`.
        contexts: of lcx: smaller, and many times slower to read.
        batch: images in the network at once, 1 or an even number; results may depend on it in their last bits.
        jobs: images being worked on at once; 0 = one per core of this process's share. Results do not depend on it.
        device: see `EngineConfig`, as is `dtype`.
        dtype: what the network computes in.
    """

    shards: Path
    model: Path
    out: Path
    format: str = "fp16"
    size: int = 256
    crop: str = CENTRE
    quality: int | None = None
    latent_psnr: float | None = None
    contexts: bool = False
    batch: int = 1
    jobs: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"--format {self.format}, expected one of {' '.join(FORMATS)}")
        if self.format != "lcx" and (self.quality is not None or self.latent_psnr is not None or self.contexts):
            raise UsageError(f"--quality, --latent-psnr and --contexts are for --format lcx, not {self.format}")
        if self.quality is not None and self.latent_psnr is not None:
            raise UsageError("--quality and --latent-psnr: one of them")
        if self.batch != 1 and (self.batch < 1 or self.batch % 2):
            raise UsageError(f"--batch {self.batch}, expected 1 or an even number (each image goes with its mirror)")
        _ = self.preprocessing  # refuses what it must
        try:
            check_target(self.latent_psnr)
        except ValueError as exception:
            raise UsageError(str(exception)) from exception

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become pieces."""
        return Preprocessing(size=self.size, crop=self.crop)

    def settings(self, dtype: str) -> dict[str, Any]:
        """Return what all samples of a cache have in common; `dtype` is what the network really computes in."""
        coder: dict[str, Any] = {}
        if self.format == "lcx":
            quality = DEFAULT_QUALITY if self.quality is None and self.latent_psnr is None else self.quality
            coder = {"quality": quality, "latent_psnr": self.latent_psnr, "contexts": self.contexts}
        preprocessing = self.preprocessing
        return {
            "format": self.format,
            **coder,
            "space": "codebook" if self.format == INDICES else "raw",
            "preprocessing": preprocessing.to_json(),
            "preprocessing_id": preprocessing.digest,
            "dtype": dtype,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class Entry:
    """One image to be encoded, and the words that belong to it."""

    ref: SampleRef
    caption: Caption = ""


@dataclass(frozen=True)
class Part:
    """What becomes one shard of a cache.

    Attributes:
        number: in the order of the cache.
        stem: of its name and of its keys.
        entries: its images.
        common: digest of all that the samples of the cache have in common.
    """

    number: int
    stem: str
    entries: tuple[Entry, ...]
    common: str = field(repr=False)

    @property
    def name(self) -> str:
        """File name of the shard."""
        sha = hashlib.sha256(self.common.encode())
        for entry in self.entries:
            ref = entry.ref
            row = [ref.key, ref.sha256, ref.label, entry.caption]
            sha.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return f"shard-{self.stem}-{sha.hexdigest()[:12]}.tar"

    def with_captions(self, captions: Mapping[Path, dict[str, Caption]]) -> "Part":
        """Return the part with the captions of its source shard, which `captions` has by shard."""
        entries = tuple(Entry(entry.ref, caption_of(entry.ref, captions[entry.ref.shard])) for entry in self.entries)
        return Part(self.number, self.stem, entries, self.common)


def images_per_shard(latent_bytes: int, n_crops: int) -> int:
    """Return how many images make a shard; `latent_bytes` of one sample in float16, with mirror and deviation."""
    return max(1, min(_MOST_IMAGES, _SHARD_BYTES // latent_bytes) // n_crops)


def plan_parts(refs: Sequence[SampleRef], n_images: int, common: Mapping[str, Any]) -> list[Part]:
    """Cut every source shard into parts; captions are not known yet.

    Args:
        refs: all images, in the order of shards.
        n_images: of a part, at most.
        common: what all samples of the cache have in common.
    """
    digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()
    by_shard: dict[Path, list[SampleRef]] = {}
    for ref in refs:
        by_shard.setdefault(ref.shard, []).append(ref)
    parts: list[Part] = []
    for number, shard in enumerate(sorted(by_shard)):
        mine = by_shard[shard]
        for first in range(0, len(mine), n_images):
            entries = tuple(Entry(ref) for ref in mine[first : first + n_images])
            parts.append(Part(len(parts), f"{number:06d}-{first // n_images:03d}", entries, digest))
    return parts


def with_captions(parts: Sequence[Part]) -> list[Part]:
    """Return parts with their captions; each source shard is looked through once.

    Raises:
        UsageError: a shard cannot be read.
    """
    shards = sorted({entry.ref.shard for part in parts for entry in part.entries})
    captions = {shard: read_captions(shard) for shard in shards}
    return [part.with_captions(captions) for part in parts]
