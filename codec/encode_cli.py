"""`codec encode`: images to compressed files.

read, decode, to sRGB (threads) -> network -> quantise, code, write (workers)
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from codec import batch, bitstream, console, images, model_folder, options, pictures
from codec.batch import Done, Existing, Item, Report
from codec.bitstream import Chunk
from codec.coding import DEFAULT_EFFORT, Coder, Settings
from codec.errors import FormatError, UsageError
from codec.launch import Launch
from codec.pipeline import pipelined

EPILOG = "Example: codec encode photos -o coded -q 60"


@dataclass(frozen=True)
class _Read:
    """An image that was read: what the network needs, and what only the file needs."""

    pixels: np.ndarray
    chunks: tuple[Chunk, ...]
    source_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Made:
    """An image that went through the network; travels to other processes without its pixels.

    Attributes:
        z: what the coder takes: raw latents (D, h, w) float32, or of a VQ model codebook indices (1, h, w) int32.
        width: pixels.
        height: pixels.
        chunks: what else belongs into the file.
        source_bytes: of the image file.
        notes: what the user should hear.
    """

    z: np.ndarray
    width: int
    height: int
    chunks: tuple[Chunk, ...]
    source_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Finish:
    """Codes and writes the latents of one image, in whatever process; the model's tables are read there.

    Attributes:
        folder: the model's.
        decoder_id: of its decoder.
        settings: how.
        target_bpp: highest rate of a file; None = any.
        target_bytes: largest size of a file; None = any.
    """

    folder: Path
    decoder_id: str
    settings: Settings
    target_bpp: float | None
    target_bytes: int | None

    def __call__(self, item: Item, made: _Made) -> Done:
        coder = _coder(self.folder, self.decoder_id)
        pixels, notes = made.width * made.height, made.notes
        limit = self.target_bytes if self.target_bpp is None else math.floor(self.target_bpp * pixels / 8)
        how = (made.z, made.width, made.height, self.settings)
        if limit is not None:
            coded = coder.code_within(*how, limit, made.chunks)
            if len(coded.data) > limit:
                notes += (f"{len(coded.data)} bytes at q 0, more than the {limit} that were asked for",)
        else:
            coded = coder.code(*how, made.chunks)
        item.write(coded.data)
        return Done(made.source_bytes, len(coded.data), pixels, len(coded.data), notes)


@lru_cache(maxsize=4)
def _coder(folder: Path, decoder_id: str) -> Coder:
    return Coder(model_folder.read(folder), decoder_id)


def encode(
    sources: options.Sources,
    out: options.Out,
    model: options.EncodeModel = None,
    quality: Annotated[
        int | None,
        typer.Option(
            "-q",
            "--quality",
            min=0,
            max=100,
            help=f"0 smallest files .. 100 best images; not for VQ models. Default: {bitstream.DEFAULT_QUALITY}.",
        ),
    ] = None,
    target_bpp: Annotated[
        float | None,
        typer.Option(min=0, help="Instead of -q: the best with at most this many bits per pixel, whole file."),
    ] = None,
    target_kb: Annotated[
        float | None,
        typer.Option(min=0, help="Instead of -q: the best with at most this many kB (1000 bytes) per file."),
    ] = None,
    effort: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=9,
            help=f"0 fastest .. 9 smallest files at the same quality; not for VQ models. Default: {DEFAULT_EFFORT}.",
        ),
    ] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave out EXIF, XMP and colour profile; colours become sRGB.")
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
    """Compress images: photo.jpg becomes photo.jpg.lcx. An existing output is left untouched and is a failure."""
    asked = [quality, target_bpp, target_kb]
    if sum(value is not None for value in asked) > 1:
        raise UsageError("-q, --target-bpp and --target-kb: one of them")
    if not all(value is None or math.isfinite(value) for value in asked):
        raise UsageError("--target-bpp or --target-kb: expected a number")
    launch = Launch.from_environment()
    found = batch.find(sources, images.EXTENSIONS, "images")
    items = batch.plan(found, out, bitstream.SUFFIX)
    folder = model_folder.read(model_folder.resolve(model))
    if folder.maps:
        given = {"-q": quality, "--target-bpp": target_bpp, "--target-kb": target_kb, "--effort": effort}
        _refuse_for_vq(folder.name, given)
    report, todo = Report.start(launch, items, Existing.of(skip_existing, overwrite), _is_whole)
    facts: dict[str, Any] = {"model": folder.name, "stream_id": folder.stream_id}
    if target_bpp is None and target_kb is None and not folder.maps:
        facts["quality"] = quality = bitstream.DEFAULT_QUALITY if quality is None else quality
    if todo:
        from codec.runtime import Codec  # after the checks: torch takes seconds to import

        codec = Codec.load(
            folder,
            device,
            dtype=dtype,
            compile=compiled,
            memory_bytes=round(memory_gb * 1e9),
            local_rank=launch.local,
            notes=console.note,
        )
        facts |= {"decoder_id": codec.decoder_id, **codec.engine.description()}
        if launch.index == 0:
            console.note(f"model {codec.name} {codec.engine.describe()}")
        finish = _Finish(
            folder.path,
            codec.decoder_id,
            Settings(quality=quality or 0, effort=DEFAULT_EFFORT if effort is None else effort),
            target_bpp,
            None if target_kb is None else round(target_kb * 1000),
        )

        def read(item: Item) -> _Read:
            data = item.read()
            picture = pictures.load(data, name=str(item.source.path), strip=strip)
            bitstream.check_size(picture.pixels.shape[1], picture.pixels.shape[0])
            return _Read(picture.pixels, tuple(pictures.to_chunks(picture)), len(data), tuple(picture.notes))

        def network(_: Item, got: _Read) -> _Made:
            height, width = got.pixels.shape[:2]
            return _Made(
                codec.engine.encode_for_coder(got.pixels), width, height, got.chunks, got.source_bytes, got.notes
            )

        n_jobs = batch.n_jobs(jobs, todo)
        with batch.workers(n_jobs) as (threads, coders), report.progress("encoding"):
            for outcome in pipelined(todo, read, network, finish, readers=threads, writers=coders, ahead=n_jobs):
                report.add(outcome)
    return report.finish("images", facts, as_json, out == batch.STREAM)


def _refuse_for_vq(name: str, given: dict[str, Any]) -> None:
    """Raise UsageError for the options that ask a VQ model for another quality or size than its own."""
    for option, value in given.items():
        if value is not None:
            what = "there is nothing to search for" if option == "--effort" else "its quality is its own"
            raise UsageError(f"{option}: {name} is a VQ model, {what}; leave it out, or take another model")


def _is_whole(path: Path) -> bool:
    """Whether an existing output is a whole compressed file, not one that was cut or damaged on its way."""
    try:
        bitstream.unpack(path.read_bytes())
    except (FormatError, OSError):
        return False
    return True
