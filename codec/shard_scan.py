"""Finding the images in tar shards that others made, and keeping what was found in an index beside each tar.

    *.tar -> members -> images, known by their last extension -> offset, size, class, SHA-256 -> NAME.tar.index.json

The index is a cache: it is made anew when the tar's size or time changes, and when it cannot be written, the scan is
repeated by every reader. Rules for names, which `train.streaming` shares:

- Every plain file whose last extension is an image's (any case) is one sample: WebDataset would cut "photo.v1.2.JPG" at
  the first dot and take ".v1.2.jpg" for its kind. So "a.jpg" and "a.mask.png" are two images. Hidden files are not.
- A key is the tar's name and the member's path without that extension; a key met twice in a tar gets "#2" behind it.
- The class is the content of KEY.cls, or "class" in KEY.json, where KEY may also be cut at the first dot.
- Asked for arrays, the samples are members *.npy in place of images, see `codec.arrays`; their index is another file.

Must not import torch: the processes that read and decode images import this.
"""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from codec import arrays, images
from codec.console import error, progress, stderr
from codec.errors import ImageError, UsageError
from codec.files import write_atomic

Kind = Literal["image", "npy"]
"""What the samples of a shard are."""

VERSION = 1
_MAX_LABEL_BYTES = 2**20
_MIN_SHOWN = 4  # fewer shards than that are scanned without a progress bar


class StrictTarInfo(tarfile.TarInfo):
    """A member's header, for `tarfile.open(tarinfo=...)`: tarfile takes a damaged one for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "StrictTarInfo":
        """Read the next header; ReadError where it is damaged or where the tar ends without its end mark."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark; typeshed leaves these out
            raise
        except tarfile.EmptyHeaderError as exception:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the file ends without the end mark of a tar") from exception
        except tarfile.HeaderError as exception:
            raise tarfile.ReadError(f"damaged header: {exception}") from exception


def image_name(name: str, kind: Kind = "image") -> tuple[str, str] | None:
    """Return (path without its last extension, that extension in lower case without dot) of a member that is an image.

    None where the last extension is no image's (or not .npy), or the file is hidden (macOS puts a "._photo.jpg" beside
    each photo).
    """
    path = PurePosixPath(name)
    extensions = images.EXTENSIONS if kind == "image" else {arrays.EXTENSION}
    if path.name.startswith(".") or path.suffix.lower() not in extensions:
        return None
    return str(path.with_suffix("")), path.suffix[1:].lower()


def list_shards(folder: Path) -> list[Path]:
    """Return the tar files of a folder, by name."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))


def scan_shards(tars: Sequence[Path], *, quiet: bool = False, kind: Kind = "image") -> list[dict[str, Any]]:
    """Return the index of each tar: the one beside it, or a new one, which is then written there.

    Any number of processes may do this at once; all find the same.

    Args:
        tars: the shards, all of one folder.
        quiet: print nothing; else what cannot be used, and that an index cannot be written, is said on stderr.
        kind: what the samples are.

    Returns:
        `version`, `shard` (file name), `size_bytes`, `mtime_ns`, `samples` (the fields of `codec.shards.SampleRef`
        without `shard`, with `class` for `label`), `bad` ([key, reason] of each image that cannot be used), and
        `truncated` (why the tar ends too early; "" where it does not).

    Raises:
        UsageError: a tar cannot be read or is damaged in its middle.
    """
    kept = {tar: _kept(tar, kind) for tar in tars}
    n_missing = sum(found is None for found in kept.values())
    unwritable = ""
    indices = []
    with progress(disable=quiet or n_missing < _MIN_SHOWN) as bar:
        task = bar.add_task("scan of shards", total=n_missing)
        for tar, found in kept.items():
            if found is None:
                found = _scan(tar, kind)
                bar.advance(task)
                try:
                    write_atomic(_index_path(tar, kind), (json.dumps(found, indent=1) + "\n").encode())
                except OSError as exception:
                    unwritable = f"{_index_path(tar, kind)}: {exception.strerror or exception}"
            indices.append(found)
    if not quiet:
        for tar, found in zip(tars, indices, strict=True):
            _say_what_is_lost(tar, found, kind)
        if unwritable:
            stderr.print(f"the index of the shards is kept in memory only; it cannot be written: {unwritable}")
    return indices


def _index_path(tar: Path, kind: Kind) -> Path:
    return tar.with_name(f"{tar.name}.{'' if kind == 'image' else f'{kind}-'}index.json")


def _kept(tar: Path, kind: Kind) -> dict[str, Any] | None:
    """The index beside a tar; None where there is none, or not one of this tar as it is now."""
    try:
        found = json.loads(_index_path(tar, kind).read_text("utf-8"))
        now = tar.stat()
    except (OSError, ValueError):
        return None
    expected = {"version": VERSION, "shard": tar.name, "size_bytes": now.st_size, "mtime_ns": now.st_mtime_ns}
    fields = {"samples", "bad", "truncated"}
    sound = isinstance(found, dict) and found.items() >= expected.items() and fields <= found.keys()
    return found if sound else None


def _say_what_is_lost(tar: Path, index: dict[str, Any], kind: Kind) -> None:
    n_samples = len(index["samples"])
    if index["truncated"]:
        error(f"{tar}: truncated: {index['truncated']}; the {n_samples} whole images before that are used")
    if bad := index["bad"]:
        share, first = f"{len(bad)} of {n_samples + len(bad)}", ": ".join(bad[0])
        error(f"{tar}: {share} images cannot be used, listed in {_index_path(tar, kind).name}; the first: {first}")


def _scan(path: Path, kind: Kind) -> dict[str, Any]:
    """Read a tar from end to end."""
    try:
        with path.open("rb") as file:
            before = path.stat()  # a tar that is still being written is then scanned again
            scan = _Scan(path.stem, kind)
            try:
                with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:
                    for member in tar:
                        scan.add(member, file)
                    _require_nothing_behind(file, tar.offset)
            except (tarfile.TarError, ValueError) as exception:
                if not scan.n_members or file.tell() < before.st_size:
                    raise UsageError(f"{path}: not an uncompressed tar, or damaged: {exception}") from exception
                scan.truncated = str(exception)
    except OSError as exception:
        raise UsageError(f"{path}: cannot be read: {exception.strerror or exception}") from exception
    for sample, key in zip(scan.samples, scan.member_keys, strict=True):
        sample["class"] = scan.labels.get(key, scan.labels.get(_webdataset_key(key)))
    return {
        "version": VERSION,
        "shard": path.name,
        "size_bytes": before.st_size,
        "mtime_ns": before.st_mtime_ns,
        "samples": scan.samples,
        "bad": scan.bad,
        "truncated": scan.truncated,
    }


class _Scan:
    """What has been found in one tar so far."""

    def __init__(self, stem: str, kind: Kind) -> None:
        self.samples: list[dict[str, Any]] = []
        self.member_keys: list[str] = []
        """Of each sample, without the tar's name."""
        self.bad: list[tuple[str, str]] = []
        self.labels: dict[str, str] = {}
        self.truncated = ""
        self.n_members = 0
        self._stem = stem
        self._kind = kind
        self._taken: set[str] = set()

    def add(self, member: tarfile.TarInfo, file: IO[bytes]) -> None:
        """Take in one member of the tar, whose bytes are in `file`."""
        self.n_members += 1
        named = image_name(member.name, self._kind)
        if named is None:
            self._add_label(member, file)
            return
        if member.isdir():
            return
        key = self._unique(f"{self._stem}/{named[0]}")
        if not member.isreg() or member.issparse():  # a link's bytes stand elsewhere, a sparse file's not in one piece
            self.bad.append((key, "not a plain file"))
            return
        file.seek(member.offset_data)
        data = file.read(member.size)
        if len(data) < member.size:
            self.bad.append((key, f"truncated: {len(data)} of {member.size} bytes"))
            return
        try:
            if self._kind == "image":
                width, height = images.size(data, name="image")
            else:
                height, width, _ = arrays.shape(data, name="image")
        except ImageError as exception:
            self.bad.append((key, str(exception).removeprefix("image: ")))
            return
        self.member_keys.append(named[0])
        self.samples.append(
            {
                "key": key,
                "ext": named[1],
                "width": width,
                "height": height,
                "class": None,
                "sha256": hashlib.sha256(data).hexdigest(),
                "offset": member.offset_data,
                "length": member.size,
            }
        )

    def _unique(self, key: str) -> str:
        n, unique = 1, key
        while unique in self._taken:
            n += 1
            unique = f"{key}#{n}"
        self._taken.add(unique)
        return unique

    def _add_label(self, member: tarfile.TarInfo, file: IO[bytes]) -> None:
        path = PurePosixPath(member.name)
        kind = path.suffix.lower()
        if kind not in (".cls", ".json") or not member.isreg() or member.size > _MAX_LABEL_BYTES:
            return
        file.seek(member.offset_data)
        data = file.read(member.size)
        try:
            label = data.decode().strip() if kind == ".cls" else json.loads(data)["class"]
        except (ValueError, KeyError, TypeError):  # labels are optional, and so are other people's habits
            return
        if isinstance(label, str | int) and label != "":
            self.labels[str(path.with_suffix(""))] = str(label)


def _webdataset_key(key: str) -> str:
    """The part of a path before the first dot of its name."""
    path = PurePosixPath(key)
    return str(path.with_name(path.name.split(".")[0]))


def _require_nothing_behind(file: IO[bytes], offset: int) -> None:
    """Raise ReadError where more than padding follows the end mark at `offset`: images there would never be seen."""
    file.seek(offset)
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            file.seek(offset)  # not at the end: damaged, not truncated
            raise tarfile.ReadError("data follows the end mark (several tars joined to one?)")
