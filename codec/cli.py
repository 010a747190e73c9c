"""The command `codec`: encode and decode folders of images, describe files, list models.

Torch and diffusers are imported only when a network is needed, so `--help`, `info` and `models` start fast.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from rich.progress import TextColumn

from codec import bitstream, console, images, model_folder
from codec.console import Exit
from codec.errors import FormatError, ModelError, UsageError
from codec.files import Source, check_writable, find, write_atomic

app = console.application(
    "codec",
    "Perceptual image codec for latent diffusion. "
    "Exit codes: 0 all well; 1 some files failed; 2 usage; 3 model missing or wrong; 130 interrupted.",
)

Sources = Annotated[
    list[str], typer.Argument(metavar="SRC...", help="Files and folders; folders are read recursively.")
]
OutDir = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write to; created if missing.")]
Device = Annotated[str, typer.Option(help="Where the network runs: cpu, cuda, cuda:1 ...")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `codec.console.run`."""
    return console.run(app, argv, "codec")


@app.command(epilog="Example: codec encode photos -o coded -m runs/small/model -q 60")
def encode(
    sources: Sources,
    out: OutDir,
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="Model folder, or a name `codec models` lists.")
    ] = None,
    quality: Annotated[
        int, typer.Option("-q", "--quality", min=0, max=100, help="0 smallest files .. 100 best images.")
    ] = bitstream.DEFAULT_QUALITY,
    device: Device = "cpu",
) -> int:
    """Compress images: photo.jpg becomes photo.jpg.lcx. An existing output is left untouched and is a failure."""
    if model is None:
        raise UsageError("which model? Give -m MODEL (a model folder); this version comes without trained weights")
    found = find(sources, images.EXTENSIONS)
    check_writable(out)

    from codec.runtime import Codec  # after the checks: torch takes seconds to import

    codec = Codec.load(model, device)
    n_pixels = 0

    def convert(source: Source) -> bytes:
        nonlocal n_pixels
        image = images.load(source.path)
        data = codec.encode(image, quality)
        n_pixels += image.shape[0] * image.shape[1]
        return data

    size_bytes, failed = _each(found, out, bitstream.SUFFIX, convert, "encoding")
    bpp = f", {8 * size_bytes / n_pixels:.4f} bpp" if n_pixels else ""
    print(f"{len(found) - failed} of {len(found)} images, {size_bytes} bytes{bpp}, model {codec.name}, q {quality}")
    return Exit.SOME_FAILED if failed else Exit.OK


@app.command(epilog="Example: codec decode coded -o decoded -m runs/small/model")
def decode(
    sources: Sources,
    out: OutDir,
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", metavar="MODEL", help="Model folder or name. Default: found by the ids in the files."
        ),
    ] = None,
    device: Device = "cpu",
) -> int:
    """Decompress to PNG: photo.jpg.lcx becomes photo.jpg.png. An existing output is left untouched and is a failure."""
    found = find(sources, frozenset({bitstream.SUFFIX}), "compressed files")
    check_writable(out)
    folders, first = _decoders(found, model)

    from codec.latent_model import load_latent_model
    from codec.runtime import Codec

    loaded: dict[Path, Codec] = {}

    def codec_of(folder: model_folder.ModelFolder) -> Codec:
        if folder.path not in loaded:
            loaded[folder.path] = Codec(folder, load_latent_model(folder.path, device))
        return loaded[folder.path]

    if first is not None:  # here, so that a model that cannot be loaded is exit 3, not a failure of each file
        codec_of(first)
    told: set[tuple[str, str]] = set()

    def convert(source: Source) -> bytes:
        data = source.path.read_bytes()
        header, _ = bitstream.unpack(data)
        codec = codec_of(_match(header, folders))
        if header.decoder_id != codec.decoder_id and (header.decoder_id, codec.decoder_id) not in told:
            told.add((header.decoder_id, codec.decoder_id))
            console.stderr.print(
                f"note: {source.path}: made with decoder {header.decoder_id}, decoded with {codec.decoder_id} "
                f"({codec.name}) of the same latents"
            )
        return images.save_png(codec.decode(data))

    _, failed = _each(found, out, ".png", convert, "decoding", strip=bitstream.SUFFIX)
    print(f"{len(found) - failed} of {len(found)} files decoded")
    return Exit.SOME_FAILED if failed else Exit.OK


@app.command(epilog="Example: codec info coded/photo.jpg.lcx")
def info(
    sources: Annotated[list[str], typer.Argument(metavar="FILE...", help="Compressed files, or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> int:
    """Say what a compressed file holds; needs no model."""
    failed = 0
    for source in find(sources, frozenset({bitstream.SUFFIX}), "compressed files"):
        try:
            data = source.path.read_bytes()
            header, payload = bitstream.unpack(data)
        except (FormatError, OSError) as exception:
            failed += 1
            console.error(_failure(source.path, exception))
            continue
        fields = {
            "path": str(source.path),
            "format_version": bitstream.VERSION,
            "width": header.width,
            "height": header.height,
            "quality": header.quality,
            "size_bytes": len(data),
            "payload_bytes": len(payload),
            "bpp": round(8 * len(data) / (header.width * header.height), 5),
            "stream_id": header.stream_id,
            "decoder_id": header.decoder_id,
        }
        if as_json:
            print(json.dumps(fields))
        else:
            print("\n".join(f"{name:15} {value}" for name, value in fields.items()))
    return Exit.SOME_FAILED if failed else Exit.OK


@app.command()
def models() -> int:
    """List the models that -m and decode find by name or id: those under $CODEC_MODELS, then the package's own."""
    folders = _readable_models()
    for folder in folders:
        ids = f"stream {','.join(folder.table_sets)}  decoder {folder.decoder_id}"
        print(f"{folder.name}  f{folder.f} c{folder.channels}  {ids}  {folder.path}")
    if not folders:
        places = ", ".join(str(place) for place in model_folder.search_path())
        print(f"no models in {places}; name a folder of models in ${model_folder.MODELS_VARIABLE}")
    return Exit.SOME_FAILED if len(folders) < len(model_folder.available()) else Exit.OK


def _readable_models() -> list[model_folder.ModelFolder]:
    """Read every model on the search path; a damaged one is an error on stderr and left out."""
    folders = []
    for path in model_folder.available():
        try:
            folders.append(model_folder.read(path))
        except ModelError as exception:
            console.error(str(exception))
    return folders


def _decoders(
    found: Sequence[Source], model: str | None
) -> tuple[list[model_folder.ModelFolder], model_folder.ModelFolder | None]:
    """Return the models that may decode, and the one of the first readable file (None when none is readable).

    Raises:
        UsageError: no model was named and none is available.
        ModelError: the named model is missing, or every readable file needs another model.
    """
    if model is not None:
        folders = [model_folder.read(model_folder.resolve(model))]
    else:
        folders = _readable_models()
        if not folders:
            raise UsageError(
                f"which model? Give -m MODEL, or name a folder of models in ${model_folder.MODELS_VARIABLE}"
            )
    mismatch: ModelError | None = None
    for source in found:
        try:
            return folders, _match(bitstream.unpack(source.path.read_bytes())[0], folders)
        except ModelError as exception:
            mismatch = mismatch or ModelError(f"{source.path}: {exception}")
        except (FormatError, OSError):
            continue  # reported with its name when its turn comes
    if mismatch is not None:
        raise mismatch
    return folders, None


def _match(header: bitstream.Header, folders: Sequence[model_folder.ModelFolder]) -> model_folder.ModelFolder:
    """Return the model of a file: the very decoder if it is there, else one of the same stream."""
    same_stream = [folder for folder in folders if header.stream_id in folder.table_sets]
    for folder in same_stream:
        if folder.decoder_id == header.decoder_id:
            return folder
    if same_stream:
        return same_stream[0]
    known = ", ".join(f"{folder.name} has {folder.stream_id}" for folder in folders)
    raise ModelError(f"made with another model: it needs stream {header.stream_id}, {known}")


def _each(
    found: Sequence[Source],
    out: Path,
    suffix: str,
    convert: Callable[[Source], bytes],
    verb: str,
    strip: str = "",
) -> tuple[int, int]:
    """Convert every file, one bad one not stopping the rest; return (bytes written, number that failed)."""
    size_bytes = 0
    failures: list[str] = []
    try:
        with console.progress(TextColumn("{task.fields[note]}")) as bar:
            task = bar.add_task(verb, total=len(found), note="")
            for source in found:
                target = out / _output_name(source.relative, suffix, strip)
                try:
                    if target.exists():
                        raise FileExistsError
                    data = convert(source)
                    write_atomic(target, data, exclusive=True)
                    size_bytes += len(data)
                except UsageError:
                    raise  # nothing that another file would change
                except FileExistsError:
                    failures.append(f"{source.path}: {target} exists already, left untouched")
                except (ValueError, OSError, RuntimeError, MemoryError) as exception:  # RuntimeError: torch, no memory
                    failures.append(_failure(source.path, exception))
                bar.update(task, advance=1, note=f"{size_bytes / 1e6:.2f} MB")
    finally:  # also when interrupted
        for failure in failures:
            console.error(failure)
    return size_bytes, len(failures)


def _output_name(relative: PurePosixPath, suffix: str, strip: str) -> PurePosixPath:
    name = relative.name
    if strip and name.lower().endswith(strip):
        name = name[: -len(strip)]
    return relative.with_name(name + suffix)


def _failure(path: Path, exception: Exception) -> str:
    """Say which file failed and why: the operating system's word for it, or the message."""
    if isinstance(exception, OSError) and exception.strerror:
        return f"{path}: {exception.strerror}"
    message = str(exception) or type(exception).__name__
    return message if message.startswith(f"{path}: ") else f"{path}: {message}"


if __name__ == "__main__":
    sys.exit(main())
