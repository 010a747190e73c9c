"""`codec info`, `codec verify`, `codec models`: what files and models say about themselves. No network runs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from codec import batch, bitstream, console, map_tables, matching, model_folder, options, pictures
from codec.bitstream import Contents
from codec.coding import Coder
from codec.console import Exit
from codec.errors import FormatError, ModelError
from codec.index_tables import IndexMode
from codec.limits import DEFAULT_MODEL
from codec.model_folder import ModelFolder
from codec.tables import Mode

INFO_EPILOG = "Example: codec info coded/photo.jpg.lcx"
VERIFY_EPILOG = "Example: codec verify coded"
MODELS_EPILOG = "Example: CODEC_MODELS=runs/first codec models"

Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Compressed files or folders of them; - is stdin.")]
Lines = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


def _read(sources: list[str], failures: list[str]) -> Iterator[tuple[Path, bytes, Contents]]:
    """Yield every whole file; the others are an error line each, and added to `failures`."""
    for source in batch.find(sources, frozenset({bitstream.SUFFIX}), "compressed files"):
        try:
            data = batch.Item(source, None).read()
            yield source.path, data, bitstream.unpack(data)
        except (FormatError, OSError) as exception:
            failures.append(batch.failure(source.path, exception))
            console.error(failures[-1])


def info(sources: Files, as_json: Lines = False) -> int:
    """Say what a compressed file holds; needs no model."""
    failures: list[str] = []
    for path, data, contents in _read(sources, failures):
        try:
            fields = {"path": str(path), **_describe(data, contents)}
        except FormatError as exception:  # within a tile
            failures.append(batch.failure(path, exception))
            console.error(failures[-1])
            continue
        if as_json:
            print(json.dumps(fields))
        else:
            print("\n".join(f"{name:20} {_words(value)}" for name, value in fields.items()))
    return Exit.SOME_FAILED if failures else Exit.OK


def _describe(data: bytes, contents: Contents) -> dict[str, Any]:
    """Return what `info` says of a file, but for its path; FormatError: a tile of index maps that does not fit."""
    header = contents.header
    modes = {tile.mode for tile in contents.tiles}
    is_vq = not modes & bitstream.LATENT_MODES
    maps = [list(map_tables.split(tile.payload)) for tile in contents.tiles if tile.mode == bitstream.MAPS]
    in_maps = {mode for tile in maps for mode, _ in tile}
    return {
        "format_version": bitstream.VERSION,
        "width": header.width,
        "height": header.height,
        "latents": "codebook indices" if is_vq else "integers",
        **({"index_maps": max(map(len, maps))} if maps else {}),
        "quality": None if is_vq else header.quality,
        "size_bytes": len(data),
        "bpp": round(8 * len(data) / (header.width * header.height), 5),
        "payload_bytes": sum(len(tile.payload) for tile in contents.tiles),
        "downsampling_factor": header.f,
        "tiles": header.n_tiles,
        "tile_side": header.tile,
        "modes": sorted(_mode_name(mode) for mode in (modes | in_maps) - {bitstream.MAPS}),
        **pictures.describe(contents.chunks),
        "stream_id": header.stream_id,
        "decoder_id": header.decoder_id,
    }


def _mode_name(mode: int) -> str:
    return (IndexMode(mode) if mode in bitstream.CODE_MODES else Mode(mode)).name.lower()


def _words(value: Any) -> str:
    if value is None:
        return "the model's own"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, list) else str(value)


def verify(sources: Files, model: options.DecodeModel = None, as_json: Lines = False) -> int:
    """Read files back to their integer latents and check every sum; no pixel is decoded, so it is fast."""
    folders = matching.candidates(model)
    failures: list[str] = []
    wrong_model = n_whole = 0
    for path, _, contents in _read(sources, failures):
        try:
            folder = matching.match(contents.header, folders)
            indices = Coder(folder, folder.decoder_id).read(contents)
            pictures.check_chunks(contents.chunks, contents.header)
        except (FormatError, ModelError) as exception:
            wrong_model += isinstance(exception, ModelError)
            failures.append(batch.failure(path, exception))
            console.error(failures[-1])
            continue
        n_whole += 1
        if as_json:
            print(json.dumps({"path": str(path), "latents": list(indices.shape), "model": folder.name}))
    if not as_json:
        print(f"{n_whole} of {n_whole + len(failures)} files are whole")
    if failures and wrong_model == len(failures) and not n_whole:
        return Exit.MODEL
    return Exit.SOME_FAILED if failures else Exit.OK


def models(as_json: Lines = False) -> int:
    """List the models that -m and decode find by name or id: those under $CODEC_MODELS, then the package's own.

    Name, f (downsampling factor), c (latent channels), k (codebook size), size on disk, licence of the weights, path.
    """
    known = model_folder.by_name()
    rows, n_found = [], 0
    for path in model_folder.available():
        n_found += 1
        try:
            folder = model_folder.read(path)
            model_folder.check_weights(path)
        except ModelError as exception:
            console.error(str(exception))
            continue
        rows.append(_about(folder, known))
    if as_json:
        print("".join(json.dumps(row) + "\n" for row in rows), end="")
    else:
        cells = [_cells(row) for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    if not n_found and not as_json:
        places = ", ".join(str(place) for place in model_folder.search_path())
        print(f"no models in {places}; name a folder of models in ${model_folder.MODELS_VARIABLE}")
    return Exit.SOME_FAILED if len(rows) < n_found else Exit.OK


def _about(folder: ModelFolder, known: Mapping[str, Path]) -> dict[str, Any]:
    """Return what `models` says of one; `known`: see `model_folder.by_name`."""
    return {
        "name": folder.name,
        "default": known.get(DEFAULT_MODEL) == folder.path,
        "hidden": known.get(folder.name) != folder.path,
        "f": folder.f,
        "latent_channels": folder.channels,
        "codebook_sizes": [each.codebook_size for each in folder.maps],
        "size_bytes": sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file()),
        "licence": folder.info.get("licence") or None,
        "stream_ids": list(folder.streams),
        "decoder_id": folder.decoder_id,
        "path": str(folder.path),
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a line of `models`."""
    k = f" k{'+'.join(map(str, row['codebook_sizes']))}" if row["codebook_sizes"] else ""
    mark = "default" * row["default"] or "another of this name goes first" * row["hidden"]
    return [
        row["name"],
        f"f{row['f']} c{row['latent_channels']}{k}",
        f"{row['size_bytes'] / 2**20:.1f} MiB",
        f"licence: {row['licence'] or 'not stated'}",
        row["path"] + f"  ({mark})" * bool(mark),
    ]
