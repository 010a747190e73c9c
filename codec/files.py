"""Finding source files and writing results safely. Imports the standard library only."""

import os
import platform
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from codec.errors import UsageError

_TEMPORARY = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A file to work on."""

    path: Path
    """Where it is."""
    relative: PurePosixPath
    """Its path below the source folder that was named; just its name where the file itself was named."""


def find(sources: Sequence[str | Path], extensions: frozenset[str], what: str = "images") -> list[Source]:
    """List the files that the named files and folders stand for.

    Files named directly are taken whatever their suffix. Folders are walked with what lies below, through symbolic
    links too, without hidden files and folders. A file reached twice is listed once; a link that leads nowhere is
    listed, so that reading it fails and it is counted.

    Args:
        sources: files and folders.
        extensions: suffixes in lower case with dot; compared without regard to case.
        what: what is looked for, for the error message.

    Returns:
        In the order of `sources`, each folder sorted by name. Two folders may give the same `relative`.

    Raises:
        UsageError: a source is missing, a folder cannot be read, or nothing was found.
    """
    found: dict[Path, Source] = {}  # by real path
    visited: set[Path] = set()
    for source in map(Path, sources):
        if source.is_dir():
            for path, real in _walk(source, visited):
                if path.suffix.lower() in extensions:
                    found.setdefault(real, Source(path, PurePosixPath(path.relative_to(source).as_posix())))
        elif source.exists():
            found.setdefault(source.resolve(), Source(source, PurePosixPath(source.name)))
        else:
            raise UsageError(f"{source}: no such file or folder")
    if not found:
        named = ", ".join(map(str, sources)) or "no source given"
        raise UsageError(f"{named}: no {what} found (looked for {' '.join(sorted(extensions))})")
    return list(found.values())


def _walk(folder: Path, visited: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield (path, real path) of the files below a folder, sorted; folders already visited are left out."""
    real = folder.resolve()
    if real in visited:
        return
    visited.add(real)
    try:
        with os.scandir(folder) as scan:
            entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as exception:
        raise UsageError(f"{folder}: cannot read this folder: {_reason(exception)}") from exception
    for entry in entries:
        path = folder / entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself: listed, so that reading it fails and it is counted
            yield path, real / entry.name
            continue
        if is_folder:
            yield from _walk(path, visited)
        elif is_file:  # not a pipe or a device: reading those may never end
            yield path, path.resolve()
        elif entry.is_symlink() and not path.exists():
            yield path, real / entry.name


def write_atomic(path: Path, data: bytes, *, exclusive: bool = False, sync: bool = False) -> None:
    """Write a whole file or nothing: to a hidden temporary name beside it, then renamed. Its folder is created.

    Args:
        path: the file.
        data: its content.
        exclusive: refuse to replace an existing file, even one that appears at the same moment.
        sync: force it to disk before it is renamed, so that a machine that fails does not leave an empty file either.

    Raises:
        FileExistsError: `exclusive` and the file exists.
        OSError: the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        if exclusive:
            _rename_exclusive(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove what `write_atomic` left half-written in these folders when its process was killed on this machine."""
    for folder in folders:
        try:
            names = [path.name for path in folder.iterdir()]
        except OSError:  # not there yet, or not to be listed: nothing that could be done
            continue
        for name in names:
            found = _TEMPORARY.fullmatch(name)
            if found and found["machine"] == _machine() and not _is_running(int(found["process"])):
                with suppress(OSError):
                    (folder / name).unlink()


@cache
def _machine() -> str:
    """Eight hex digits that tell this machine from others which write to the same folder."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _rename_exclusive(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # fails where the name exists, in one step
    except FileExistsError:
        raise
    except OSError:  # no hard links here (FAT, some network drives): the check leaves a small gap
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists") from None
        temporary.replace(path)


def check_writable(folder: Path) -> None:
    """Create a folder where it is missing and prove, by a temporary file, that it can be written.

    Raises:
        UsageError: it cannot.
    """
    probe = folder / f".probe.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError) as exception:
        raise UsageError(f"{folder}: cannot write here: a file is in the way") from exception
    except OSError as exception:
        raise UsageError(f"{folder}: cannot write here: {_reason(exception)}") from exception


def _reason(exception: OSError) -> str:
    return (exception.strerror or str(exception)).lower()
