"""Reading tar shards of images by their index. `train.shards` writes them and describes what they hold.

Must not import torch: the processes that read and decode images import this.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.errors import ImageError, UsageError

VERSION = 1
MANIFEST = "shards.json"


@dataclass(frozen=True)
class SampleRef:
    """Where one image lies."""

    shard: Path
    key: str
    ext: str
    """Lower case, without dot."""
    offset: int
    """First byte of the image in the tar."""
    length: int
    """Bytes of the image."""
    width: int
    """Pixels, after EXIF orientation."""
    height: int
    label: str | None
    """Name of the folder directly holding the image; None where it lay directly in the source folder."""
    sha256: str


def read_index(folder: Path) -> list[SampleRef]:
    """List all samples of a shard folder, in the order of shards and samples.

    Raises:
        UsageError: the folder is missing, holds no shards, is incomplete or damaged; says what to run.
    """
    command = f"codec-train shards SRC... -o {folder}"
    if not (folder / MANIFEST).is_file():
        what = "no shards here" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder}: {what} (no {MANIFEST}); make them: {command}")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise UsageError(f"{folder}: shards of version {manifest.get('version')}, expected {VERSION}; make them anew")
    if not manifest.get("complete"):
        raise UsageError(f"{folder}: the shards are incomplete; finish them: {command}")
    refs = []
    for index in range(manifest["n_shards"]):
        found = finished(folder, index)
        if found is None:
            raise UsageError(f"{folder / shard_name(index)}: missing or damaged; make it again: {command}")
        for sample in found["samples"]:
            label = sample["class"]
            fields = {name: value for name, value in sample.items() if name != "class"}
            refs.append(SampleRef(shard=folder / found["shard"], label=label, **fields))
    return refs


def read_sample(ref: SampleRef) -> bytes:
    """Return the original bytes of one image.

    Raises:
        ImageError: the shard is missing or shorter than its index says.
    """
    try:
        with ref.shard.open("rb") as file:
            file.seek(ref.offset)
            data = file.read(ref.length)
    except OSError as exception:
        raise ImageError(f"{ref.shard}/{ref.key}.{ref.ext}: {exception.strerror}") from exception
    if len(data) != ref.length:
        raise ImageError(f"{ref.shard}/{ref.key}.{ref.ext}: shard is truncated, {len(data)} of {ref.length} bytes")
    return data


def finished(out: Path, index: int) -> dict[str, Any] | None:
    """Return the index of a finished shard; None where the index or its tar is missing or they do not agree."""
    try:
        found = read_json(out / index_name(index))
        sound = found.get("version") == VERSION and (out / shard_name(index)).stat().st_size == found.get("size_bytes")
    except (UsageError, OSError):
        return None
    return found if sound else None


def shard_name(index: int) -> str:
    """File name of shard number `index`."""
    return f"shard-{index:06d}.tar"


def index_name(index: int) -> str:
    """File name of the index of shard number `index`."""
    return f"shard-{index:06d}.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UsageError where the file is missing or holds none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exception:
        raise UsageError(f"{path}: cannot be read: {exception}") from exception
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return value
