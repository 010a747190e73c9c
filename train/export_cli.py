"""`codec-train export`: a run, or a model that is there already, in the formats of other programs.

Imports torch only when it works.
"""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from codec import model_folder, options
from codec.console import Exit, error, note
from codec.errors import ModelError, UsageError


def export_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A run folder (its newest checkpoint), or one checkpoint; or a model: a diffusers folder or a name.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR",
            help="The model folder to write; empty, or not there.",
            show_default="RUN/model; of a model, into its own folder",
        ),
    ] = None,
    single_file: Annotated[
        bool | None,
        typer.Option(
            "--single-file/--no-single-file",
            help="NAME_ldm.safetensors in the original (LDM) layout, as ComfyUI and A1111 read it.",
            show_default="where the architecture permits",
        ),
    ] = None,
    fp16: Annotated[
        bool,
        typer.Option(
            "--fp16", help='Also in float16: diffusers\' variant="fp16", and of the single file. 2 bytes each.'
        ),
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Encoder and decoder as ONNX, any size, checked by onnxruntime.")
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Images or shards that a linear preview of the latents is fitted to (a run fits its own), and that "
            "float16 is tried on; 200 are used.",
            show_default=False,
        ),
    ] = None,
    licence: Annotated[
        str,
        typer.Option(
            "--licence", help="Licence of the weights, for the model card.", show_default="what the card says already"
        ),
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Write float16 files even where float16 overflows: they give black images.")
    ] = False,
    device: options.Device = "auto",
) -> int:
    """Export a run, or write further formats of a model: single file, float16, ONNX, preview.

    Each file is loaded again, by the program it is for, and has to give the same; else it is not kept. The card says
    where the model will load and where not.

    Example: codec-train export runs/first -o first-vae --fp16 --onnx
    """
    source = _named(source, out)
    kind = _kind_of_run(source)
    if kind in ("prior", "head"):
        if single_file or fp16 or onnx or preview or licence or force:
            raise UsageError(f"{source}: a run of a {kind}, which has one format; only -o applies")
        from train.export_folder import check_empty
        from train.head.run import export as export_head
        from train.prior.run import export as export_prior

        if out is not None:
            check_empty(out)
        print(json.dumps((export_prior if kind == "prior" else export_head)(source, out), indent=2))
        return Exit.OK

    from codec.engine import pick_device  # torch takes seconds to import
    from train.export_folder import FolderExport, check_empty, export_folder
    from train.formats import Wanted
    from train.onnx_export import check_packages
    from train.run import export as export_run

    if onnx:
        check_packages()
    wanted = Wanted(single_file=single_file, fp16=fp16, onnx=onnx, force=force)
    figures = {}
    if not _is_model(source):
        if source.suffix in (".safetensors", ".ckpt", ".pth", ".bin"):
            raise UsageError(f"{source}: weights; make a model folder of them: codec-train import {source} -o DIR")
        if out is not None:
            check_empty(out)
        figures = export_run(source, out, licence, wanted)
        source, out = Path(figures["folder"]), None
    how = FolderExport(out=out, wanted=wanted, images=preview, licence=licence, device=pick_device(device))
    try:
        found, bad = export_folder(source, how)
    except (ModelError, UsageError):
        if figures:
            note(f"{source}: the model itself is written, without these formats")
        raise
    print(json.dumps({**figures, **found}, indent=2))
    for name, reason in bad:
        error(f"{name}: {reason} (left out of the preview)")
    return Exit.SOME_FAILED if bad else Exit.OK


def _named(source: Path, out: Path | None) -> Path:
    """Return the folder of a model that was named, which stays as it is; anything else as it was given."""
    if source.exists() or str(source) not in (known := model_folder.by_name()):
        return source
    if out is None:
        raise UsageError(f"{source}: a model that is installed stays as it is; name another folder with -o")
    return known[str(source)]


def _kind_of_run(source: Path) -> str:
    """Return the task of a run folder, or of a checkpoint in one; "" for anything else."""
    config = (source.parent.parent if source.is_file() else source) / "config.json"
    found = re.search(rb'"task": "(\w+)"', config.read_bytes()) if config.is_file() else None
    return "" if found is None else found[1].decode()


def _is_model(source: Path) -> bool:
    """Whether a path is a diffusers folder, or a pipeline's with one in it; a run has a config.json too, its own."""
    configs = (source / "config.json", source / "vae" / "config.json")
    return any(path.is_file() and b'"_class_name"' in path.read_bytes() for path in configs)
