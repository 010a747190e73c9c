"""A shard of a latent cache on disk: a tar that webdataset reads, and an index for reading any sample by its offset.

    samples -> shard-STEM-DIGEST.tar: KEY.json, KEY.safetensors (or KEY.lcx, KEY.mirror.lcx; or KEY.npy) ...
            -> shard-STEM-DIGEST.index.json: per column, one value for each sample; sums for the statistics; bad images

The digest stands for all that the shard was made of, so a shard of that name is done, whoever made it. Must not import
torch.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.errors import FormatError, UsageError
from codec.files import write_atomic
from codec.shards import read_json
from train.cache.moments import AnySums

VERSION = 1
HEADER = "cache.json"
BAD_IMAGES = "bad_images.jsonl"
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Place:
    """Where one sample lies.

    Attributes:
        tar: the shard.
        offset: first byte of its first member's header.
        sizes: bytes of each member, the JSON first.
        crc32: over all members' bytes.
    """

    tar: Path
    offset: int
    sizes: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class Sample:
    """One sample to be written.

    Attributes:
        facts: its JSON; has `sha256`, `crop`, `class`, and `mse` where its format has an error.
        members: the bytes of the format's members.
        sums: its part of the statistics.
    """

    facts: Mapping[str, Any]
    members: tuple[bytes, ...]
    sums: AnySums


def index_path(tar: Path) -> Path:
    """Return where the index of a shard lies."""
    return tar.with_suffix(".index.json")


def write_shard(
    tar: Path, stem: str, samples: Sequence[Sample], bad: Sequence[tuple[str, str]], extensions: Sequence[str]
) -> dict[str, Any]:
    """Write a shard and then its index, each whole or not at all; return the index.

    Args:
        tar: where to.
        stem: what the keys begin with.
        samples: in their order.
        bad: (key, reason) of each image that could not be encoded.
        extensions: of the members beside the JSON.

    Raises:
        OSError: the system refuses.
    """
    names = ("sha256", "crop", "class", "mse")
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "offset", "sizes", "crc32")}
    sums: AnySums | None = None
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for number, sample in enumerate(samples):
            facts = json.dumps(sample.facts, ensure_ascii=False, separators=(",", ":")).encode()
            members = (facts, *sample.members)
            columns["offset"].append(buffer.tell())
            columns["sizes"].append([len(data) for data in members])
            columns["crc32"].append(_crc32(members))
            for name in names:
                columns[name].append(sample.facts.get(name))
            for extension, data in zip(("json", *extensions), members, strict=True):
                # No time and no owner: the bytes depend on the samples alone.
                member = tarfile.TarInfo(f"{key_of(stem, number)}.{extension}")
                member.size, member.mode = len(data), 0o444
                out.addfile(member, io.BytesIO(data))
            sums = sums or sample.sums.empty()
            sums.add(sample.sums)
    data = buffer.getvalue()
    write_atomic(tar, data)
    index = {
        "version": VERSION,
        "shard": tar.name,
        "stem": stem,
        "size_bytes": len(data),
        "n_samples": len(samples),
        "sums": None if sums is None else sums.to_json(),
        "samples": columns,
        "bad": [list(pair) for pair in bad],
    }
    write_atomic(index_path(tar), (json.dumps(index) + "\n").encode())
    return index


def key_of(stem: str, number: int) -> str:
    """Return the key of a sample in its shard."""
    return f"{stem}-{number:05d}"


def read_shard_index(tar: Path) -> dict[str, Any] | None:
    """Return the index of a finished shard; None where it is missing, or its tar is missing or has another size."""
    try:
        found = read_json(index_path(tar))
        sound = found.get("version") == VERSION and tar.stat().st_size == found.get("size_bytes")
    except (UsageError, OSError):
        return None
    return found if sound else None


def places(tar: Path, index: Mapping[str, Any]) -> list[Place]:
    """Return where each sample of a shard lies."""
    columns = index["samples"]
    rows = zip(columns["offset"], columns["sizes"], columns["crc32"], strict=True)
    return [Place(tar, offset, tuple(sizes), crc32) for offset, sizes, crc32 in rows]


def span(sizes: Sequence[int]) -> int:
    """Return the bytes from the start of a sample's first header to the end of its last member."""
    return sum(_BLOCK + _padded(size) for size in sizes[:-1]) + _BLOCK + sizes[-1]


def read_members(file: int, place: Place) -> list[bytes]:
    """Read the members of a sample, the JSON first, and check their sum.

    Args:
        file: descriptor of the open tar.
        place: of the sample.

    Raises:
        FormatError: the tar is truncated or damaged there.
        OSError: the system refuses.
    """
    data = os.pread(file, span(place.sizes), place.offset)
    members, at = [], _BLOCK
    for size in place.sizes:
        members.append(data[at : at + size])
        at += _padded(size) + _BLOCK
    if _crc32(members) != place.crc32:
        raise FormatError(f"{place.tar}: damaged at byte {place.offset}: the CRC-32 does not match")
    return members


def sort_classes(labels: Iterable[str]) -> list[str]:
    """Return class names in the order of their numbers: by value where all are whole numbers, else by name."""
    found = set(labels)
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _crc32(members: Sequence[bytes]) -> int:
    crc32 = 0
    for data in members:
        crc32 = zlib.crc32(data, crc32)
    return crc32
