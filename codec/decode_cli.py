"""`codec decode`: compressed files to PNG.

read, check, entropy decode (workers) -> network -> PNG, write (threads)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from codec import batch, bitstream, console, matching, model_folder, options, pictures
from codec.batch import Done, Existing, Item, Report
from codec.bitstream import Chunk, Header
from codec.coding import Coder
from codec.errors import FormatError, ModelError
from codec.launch import Launch
from codec.model_folder import ModelFolder
from codec.pipeline import pipelined
from codec.regions import Region

if TYPE_CHECKING:
    from codec.runtime import Codec

EPILOG = "Example: codec decode coded -o decoded"


@dataclass(frozen=True)
class _Read:
    """A file that was read: raw latents, and what the picture needs besides.

    Attributes:
        folder: of the model that is to decode it.
        header: what the file says.
        z: what the network decodes: (D, h, w) float32 raw latents, or (1, h, w) int32 indices of a VQ model.
        chunks: alpha, profile, metadata.
        size_bytes: of the file.
        damage: what is wrong and lost, in words; None for a whole file.
    """

    folder: Path
    header: Header
    z: np.ndarray
    chunks: Sequence[Chunk]
    size_bytes: int
    damage: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Reader:
    """Reads files down to their raw latents, in whatever process; the models' tables are read there.

    Attributes:
        folders: of the models that may decode.
        strict: only the decoder that belongs to a file may.
        region: what is wanted of the image; None = all.
        salvage: read what is whole of damaged files.
    """

    folders: tuple[Path, ...]
    strict: bool
    region: Region | None
    salvage: bool

    def __call__(self, item: Item) -> _Read:
        data = item.read()
        try:
            return self._whole(data)
        except FormatError as exception:
            if not self.salvage:
                raise
            return self._rescued(data, str(exception))

    def _whole(self, data: bytes) -> _Read:
        contents = bitstream.unpack(data)
        header, coder = contents.header, self._coder(contents.header)
        pictures.check_chunks(contents.chunks, header)
        wanted = None
        if self.region is not None:
            self.region.check(header.width, header.height)
            wanted = self.region.latents(header, coder.folder.info.get("receptive_field"))
        z = coder.dequantise(header, coder.read(contents, wanted))
        return _Read(coder.folder.path, header, z, contents.chunks, len(data))

    def _rescued(self, data: bytes, reason: str) -> _Read:
        header = bitstream.read_header(data)
        coder = self._coder(header)
        rescued = coder.rescue(data)
        if self.region is not None:
            self.region.check(header.width, header.height)
        n_tiles = header.n_tiles
        lines = [f"rescued, {n_tiles - len(rescued.lost)} of {n_tiles} tiles ({reason})"]
        lines += [*rescued.damage[1:], *rescued.losses]
        if rescued.lost and coder.folder.info.get("receptive_field") is None:
            lines.append("other pixels may have shifted: the decoder is normalised over the whole image")
        return _Read(coder.folder.path, header, rescued.z, rescued.chunks, len(data), tuple(lines))

    def _coder(self, header: Header) -> Coder:
        return _coders(self.folders)[matching.match(header, _folders(self.folders), self.strict).path]


@lru_cache(maxsize=2)
def _folders(paths: tuple[Path, ...]) -> tuple[ModelFolder, ...]:
    return tuple(model_folder.read(path) for path in paths)


@lru_cache(maxsize=2)
def _coders(paths: tuple[Path, ...]) -> dict[Path, Coder]:
    return {folder.path: Coder(folder, folder.decoder_id) for folder in _folders(paths)}


class _Decoders:
    """The networks of a run: each is loaded when the first file needs it."""

    def __init__(self, folders: Sequence[ModelFolder], load: dict[str, Any]) -> None:
        self._folders = {folder.path: folder for folder in folders}
        self._load = load
        self._loaded: dict[Path, Codec] = {}
        self._told: set[tuple[str, str]] = set()

    def get(self, path: Path) -> "Codec":
        """Return the model of a folder."""
        from codec.runtime import Codec  # torch takes seconds to import

        if path not in self._loaded:
            self._loaded[path] = codec = Codec.load(self._folders[path], **self._load)
            console.note(f"model {codec.name} {codec.engine.describe()}")
        return self._loaded[path]

    @property
    def names(self) -> str:
        """Short names of the models that were used."""
        return ", ".join(codec.name for codec in self._loaded.values())

    def accept(self, source: Path, header: Header, codec: "Codec", strict: bool) -> None:
        """Say once that files of one decoder are decoded with another of the same latents; if strict, refuse.

        By the weights themselves: what codec.json says of them goes stale when somebody changes them.
        """
        ids = (header.decoder_id, codec.decoder_id)
        if ids[0] == ids[1]:
            return
        text = f"made with decoder {ids[0]}, {{}} {ids[1]} ({codec.name}) of the same latents"
        if strict:
            raise ModelError(text.format("refused with"))
        if ids not in self._told:
            self._told.add(ids)
            console.note(f"note: {source}: {text.format('decoded with')}")


def decode(
    sources: options.Sources,
    out: options.Out,
    model: options.DecodeModel = None,
    region: Annotated[
        str | None, typer.Option(metavar="LEFT,TOP,WIDTH,HEIGHT", help="Decode this rectangle of the image, in pixels.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse files that were made with another decoder of the same latents.")
    ] = False,
    salvage: Annotated[
        bool,
        typer.Option("--salvage", help="Decode what is whole of damaged files; the losses are named, exit 1."),
    ] = False,
    skip_existing: options.SkipExisting = False,
    overwrite: options.Overwrite = False,
    jobs: options.Jobs = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    compiled: options.Compile = False,
    memory_gb: options.Memory = 0.0,
    as_json: options.Json = False,
) -> int:
    """Decompress to PNG: photo.jpg.lcx becomes photo.jpg.png. An existing output is left untouched and is a failure."""
    rectangle = None if region is None else Region.parse(region)
    box = None if rectangle is None else rectangle.box
    launch = Launch.from_environment()
    found = batch.find(sources, frozenset({bitstream.SUFFIX}), "compressed files")
    items = batch.plan(found, out, ".png", strip=bitstream.SUFFIX)
    folders = matching.candidates(model)
    report, todo = Report.start(launch, items, Existing.of(skip_existing, overwrite))
    first = matching.first_match((item.source.path for item in todo if not item.is_stdin), folders, strict, launch)
    decoders = _Decoders(
        folders,
        {
            "device": device,
            "dtype": dtype,
            "compile": compiled,
            "memory_bytes": round(memory_gb * 1e9),
            "local_rank": launch.local,
            "notes": console.note,
        },
    )
    if first is not None:  # here, so that a model that cannot be loaded is exit 3, not a failure of each file
        decoders.get(first.path)

    def network(item: Item, read: _Read) -> tuple[_Read, np.ndarray]:
        codec = decoders.get(read.folder)
        decoders.accept(item.source.path, read.header, codec, strict)
        return read, codec.engine.decode(read.z, read.header.height, read.header.width, box)

    def finish(item: Item, made: tuple[_Read, np.ndarray]) -> Done:
        read, pixels = made
        damage = None if read.damage is None else list(read.damage)
        picture = pictures.from_chunks(pixels, read.chunks, read.header, box, damage)
        data = pictures.to_png(picture)
        item.write(data)
        n_pixels = pixels.shape[0] * pixels.shape[1]
        return Done(
            read.size_bytes, len(data), n_pixels, read.size_bytes, tuple(damage or ()), flawed=damage is not None
        )

    n_jobs = batch.n_jobs(jobs, todo)
    reader = _Reader(tuple(folder.path for folder in folders), strict, rectangle, salvage)
    with batch.workers(n_jobs) as (threads, coders), report.progress("decoding"):
        for outcome in pipelined(todo, reader, network, finish, readers=coders, writers=threads, ahead=n_jobs):
            report.add(outcome)
    return report.finish("files", {"model": decoders.names}, as_json, out == batch.STREAM)
