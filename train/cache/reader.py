"""Reading a latent cache by number, in any order, from any number of processes.

    cache.json, indices -> CacheReader.read(n, mirrored) -> Moments (raw), or Tokens, and the sample's JSON

Imports torch.
"""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from codec.errors import FormatError, UsageError
from codec.shards import read_json
from train.cache.codebook import VECTORS, Codebook
from train.cache.formats import make_format
from train.cache.index import HEADER, VERSION, Place, index_path, key_of, read_members, read_shard_index
from train.cache.model import CacheModel
from train.cache.moments import Moments
from train.cache.tokens import INDICES, Tokens

_MOST_OPEN = 64  # files; systems allow a process a few hundred


class CacheReader:
    """A finished cache. Copies in other processes, forked or spawned, open the shards anew.

    Attributes:
        folder: of the cache.
        header: cache.json.
        model: what it says about the model.
        codebook: of a cache of indices; None of one of latents.
        classes: class of each sample as the sources name it; None where they state none.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the header and all indices; samples are read later.

        Raises:
            UsageError: not a cache, an unfinished one, of another version, or a shard is missing or damaged.
        """
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.model = CacheModel.from_json(self.header["model"])
        self.codebook = _codebook(self.header, self.model)
        self.classes: list[str | None] = []
        self._format = make_format(self.header["settings"], self.folder)
        self._tars: list[Path] = []
        self._stems: list[str] = []
        columns: dict[str, list[np.ndarray]] = {"shard": [], "number": [], "offset": [], "sizes": [], "crc32": []}
        for shard in self.header["shards"]:
            tar = self.folder / shard["name"]
            index = read_shard_index(tar)
            if index is None or index["n_samples"] != shard["n_samples"]:
                raise UsageError(f"{tar}: missing or damaged ({index_path(tar).name} too?); make it again: {_COMMAND}")
            rows, n = index["samples"], index["n_samples"]
            columns["shard"].append(np.full(n, len(self._tars), np.int32))
            columns["number"].append(np.arange(n, dtype=np.int32))
            columns["offset"].append(np.array(rows["offset"], np.int64))
            columns["sizes"].append(np.array(rows["sizes"], np.int64))
            columns["crc32"].append(np.array(rows["crc32"], np.uint32))
            self.classes += rows["class"]
            self._tars.append(tar)
            self._stems.append(index["stem"])
        # Arrays, not objects: those would be copied into every forked worker as it looks at them.
        self._columns = {name: np.concatenate(parts) for name, parts in columns.items()}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._columns["offset"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind."""
        return self.__dict__ | {"_files": OrderedDict()}

    def place(self, number: int) -> Place:
        """Return where a sample lies."""
        of = {name: column[number] for name, column in self._columns.items()}
        return Place(self._tars[of["shard"]], int(of["offset"]), tuple(of["sizes"].tolist()), int(of["crc32"]))

    def key(self, number: int) -> str:
        """Return the key of a sample in the cache."""
        return key_of(self._stems[self._columns["shard"][number]], int(self._columns["number"][number]))

    def members(self, number: int) -> list[bytes]:
        """Return the bytes of a sample's members, the JSON first.

        Raises:
            FormatError: damaged, or gone because the cache was refreshed meanwhile.
        """
        place = self.place(number)
        try:
            return read_members(self._file(int(self._columns["shard"][number])), place)
        except OSError as exception:
            raise FormatError(
                f"{place.tar}: {exception.strerror or exception} (was the cache refreshed? then open it again)"
            ) from exception

    def read(self, number: int, mirrored: bool = False) -> tuple[Moments, dict[str, Any]]:
        """Return the raw moments of a sample, or of its mirror, and its JSON; of a cache of latents.

        Raises:
            FormatError: see `members`.
        """
        found: tuple[Moments, dict[str, Any]] = self.side(number, mirrored)
        return found

    def read_tokens(self, number: int, mirrored: bool = False) -> tuple[Tokens, dict[str, Any]]:
        """Return the indices of a sample, or of its mirror, and its JSON; of a cache of indices.

        Raises:
            FormatError: see `members`.
        """
        found: tuple[Tokens, dict[str, Any]] = self.side(number, mirrored)
        return found

    def side(self, number: int, mirrored: bool) -> tuple[Any, dict[str, Any]]:
        """Return what the cache holds of a sample, or of its mirror, and its JSON; see `read` and `read_tokens`."""
        facts, *members = self.members(number)
        return self._format.read(members, mirrored), json.loads(facts)

    def require_latents(self) -> None:
        """Raise UsageError for a cache of indices."""
        if self.codebook is not None:
            raise UsageError(f"{self.folder}: a cache of codebook indices; open it with train.token_dataset")

    def require_indices(self) -> Codebook:
        """Return whose indices these are; raise UsageError for a cache of latents."""
        if self.codebook is None:
            form = self.header["settings"]["format"]
            raise UsageError(f"{self.folder}: a cache of latents ({form}), expected one of --format {INDICES}")
        return self.codebook

    def vectors(self) -> np.ndarray:
        """Return the codebook's vectors, (K, d) float32, of a cache of indices.

        Raises:
            UsageError: the file is missing or damaged.
        """
        path, size = self.folder / VECTORS, self.require_indices().size
        try:
            found: np.ndarray = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as exception:
            raise UsageError(f"{path}: cannot be read: {exception}; make the cache again: {_COMMAND}") from exception
        if found.ndim != 2 or len(found) != size or found.dtype != np.float32:
            raise UsageError(f"{path}: {found.shape} {found.dtype}, expected ({size}, d) float32")
        return found

    def _file(self, shard: int) -> int:
        if self._process != os.getpid():  # forked: the parent's files are its own to close
            self._files, self._process = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _MOST_OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self._tars[shard], os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close the shards."""
        while self._files and self._process == os.getpid():
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        """Close the shards."""
        if hasattr(self, "_files"):
            self.close()


def _codebook(header: dict[str, Any], model: CacheModel) -> Codebook | None:
    found = header["settings"].get("codebook")
    if found is None:
        return None
    return Codebook(
        name=model.name,
        size=int(found["size"]),
        codebook_id=found["id"],
        encoder_id=model.encoder_id,
        decoder_id=model.decoder_id,
        f=model.f,
    )


_COMMAND = "codec-train cache SHARDS -m MODEL -o CACHE"


def read_header(folder: Path) -> dict[str, Any]:
    """Return cache.json of a finished cache.

    Raises:
        UsageError: not a cache, an unfinished one, or of another version; says what to run.
    """
    if not (folder / HEADER).is_file():
        what = f"no latent cache here (no {HEADER})" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder}: {what}; make one: {_COMMAND}")
    header = read_json(folder / HEADER)
    if header.get("version") != VERSION:
        raise UsageError(f"{folder}: a cache of version {header.get('version')}, expected {VERSION}; make it anew")
    if not header.get("complete"):
        raise UsageError(f"{folder}: the cache is incomplete; finish it with the command that began it: {_COMMAND}")
    return header
