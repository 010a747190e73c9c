"""Reading tar shards of images by their index: those of `train.shards`, which describes them, and other people's.

Must not import torch: the processes that read and decode images import this.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.errors import ImageError, UsageError
from codec.shard_scan import Kind, list_shards, scan_shards

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
    """Name of the folder directly holding the image; None where it lay directly in the source folder. In other
    people's shards: the class they state."""
    sha256: str

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"{self.shard}/{self.key}.{self.ext}"


def read_index(
    folder: Path, *, quiet: bool = False, max_bad_share: float = 1.0, kind: Kind = "image"
) -> list[SampleRef]:
    """List all samples of a shard folder, in the order of shards and samples.

    A folder of tar files without a manifest is scanned once, from end to end, see `codec.shard_scan`. Where several
    processes work together, let one go first: the others then find its index. (All at once does no harm.)

    Args:
        folder: holds the shards.
        quiet: print nothing; else images of a scanned folder that cannot be used are said on stderr.
        max_bad_share: of the images of a scanned folder, the largest share that may be unusable (ten always may).
        kind: "npy" lists arrays in place of images; only in tar files without a manifest.

    Raises:
        UsageError: the folder is missing, holds no shards, no image or too many bad ones, is incomplete or damaged;
            says what to run.
    """
    command = f"codec-train shards SRC... -o {folder}"
    if kind == "npy" and (folder / MANIFEST).is_file():
        raise UsageError(f"{folder}: shards of image files (it has {MANIFEST}); arrays are members *.npy of plain tars")
    if not (folder / MANIFEST).is_file():
        if tars := list_shards(folder):
            return _scanned(folder, tars, quiet, max_bad_share, kind)
        what = "no shards here" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder}: {what} (neither {MANIFEST} nor *.tar); make them: {command}")
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
        refs += _refs(folder, found)
    return refs


def _scanned(folder: Path, tars: Sequence[Path], quiet: bool, max_bad_share: float, kind: Kind) -> list[SampleRef]:
    scans = list(scan_shards(tars, quiet=quiet, kind=kind))
    refs = [ref for found in scans for ref in _refs(folder, found)]
    bad = [reason for found in scans for reason in found["bad"]]
    if len(bad) > max(10, max_bad_share * (len(refs) + len(bad))):
        key, reason = bad[0]
        raise UsageError(
            f"{folder}: {len(bad)} of {len(refs) + len(bad)} images cannot be used, more than a share of "
            f"{max_bad_share:g}; the first: {key}: {reason}"
        )
    if not refs:
        what = "image" if kind == "image" else "array (*.npy)"
        raise UsageError(f"{folder}: no readable {what} in any of the {len(tars)} tar files")
    return refs


def _refs(folder: Path, found: dict[str, Any]) -> list[SampleRef]:
    shard = folder / found["shard"]
    return [
        SampleRef(shard=shard, label=sample["class"], **{name: sample[name] for name in sample if name != "class"})
        for sample in found["samples"]
    ]


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
        raise ImageError(f"{ref.name}: {exception.strerror}") from exception
    if len(data) != ref.length:
        raise ImageError(f"{ref.name}: shard is truncated, {len(data)} of {ref.length} bytes")
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
