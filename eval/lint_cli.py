"""`codec-eval lint`: what is wrong with autoencoder folders, one line per finding. Imports torch only when it works."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec.console import Exit, error, note, progress, stderr
from codec.errors import ImageError, ModelError, UsageError
from eval.lint_findings import CODES, check_codes

if TYPE_CHECKING:
    import numpy as np

    from eval.lint import Report


def lint_command(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="Folders of autoencoders, or of pipelines with one in vae/; or names."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="IMAGES",
            help="Photographs to measure on, a file or a folder; may be given more than once.",
            show_default="built-in pictures, with loose tolerances",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Measure on the first N images of --data.")] = 8,
    side: Annotated[
        int, typer.Option(min=64, help="Pixels; of each image the middle, at most side x side, is measured.")
    ] = 512,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Leave out findings of a code; may be given more than once."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write findings and measurements to stdout as JSON, not as lines.")
    ] = False,
    codes: Annotated[bool, typer.Option("--codes", help="List what can be found, and exit.")] = False,
    device: Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1 ...")] = "cpu",
) -> int:
    """Check autoencoder folders (AutoencoderKL, AutoencoderTiny, VQModel): fields, weights, scaling, tiles, float16.

    One line per finding on stdout: level, code, field, what is wrong, how to mend it. Exit code 0 without findings; 1
    with any, errors or warnings (--ignore CODE for those that are meant), or where an image of --data cannot be read;
    3 where there is no model in any folder.

    Example: codec-eval lint my-vae --data photos
    """
    if codes:
        for code, (level, meaning) in CODES.items():
            print(f"{level:<8} {code:<18} {meaning}")
        return Exit.OK
    if not models:
        raise UsageError("no model given: codec-eval lint MODEL...")
    check_codes(ignore or ())
    pictures, n_failed = _pictures(data, limit, side)

    reports, refused = _lint(models, pictures, ignore or [], device)
    for reason in refused:
        error(reason)
    if as_json:
        print(json.dumps(_document(reports, refused, _command(models, data, limit, side, ignore, device)), indent=1))
    else:
        for report in reports:
            prefix = f"{report.folder}: " if len(models) > 1 else ""
            for finding in report.findings:
                print(prefix + finding.line())
    if not reports:
        return Exit.MODEL
    found = any(True for report in reports for _ in report.findings)
    return Exit.SOME_FAILED if found or refused or n_failed else Exit.OK


def _lint(
    models: list[Path], pictures: list["np.ndarray"], ignore: list[str], device: str
) -> tuple[list["Report"], list[str]]:
    """Return a report on each folder, and why others are no models."""
    from codec.engine import pick_device
    from codec.model_folder import resolve
    from eval.lint import lint
    from eval.lint_pictures import N_PICTURES

    where = pick_device(device)
    if not pictures:
        note("measured on built-in pictures, which is rough: give photographs with --data")
    reports, refused = [], []
    with progress(disable=not stderr.is_terminal) as bar:
        for folder in models:
            advance = partial(bar.advance, bar.add_task(folder.name, total=len(pictures) or N_PICTURES))
            try:
                reports.append(lint(resolve(folder), pictures, ignore=ignore, device=where, step=advance))
            except ModelError as exception:
                refused.append(str(exception))
    return reports, refused


def _pictures(data: list[Path] | None, limit: int, side: int) -> tuple[list["np.ndarray"], int]:
    """Return the middles of the images, (H, W, 3) uint8, and how many could not be read."""
    if not data:
        return [], 0
    from codec import files, images

    pictures, n_failed = [], 0
    for source in files.find(data, images.EXTENSIONS)[:limit]:
        try:
            image = images.load(source.path)
        except ImageError as exception:
            error(str(exception))
            n_failed += 1
            continue
        top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
        pictures.append(image[top : top + side, left : left + side])
    if not pictures:
        raise UsageError("--data: none of the images can be read")
    return pictures, n_failed


def _document(reports: list["Report"], refused: list[str], command: str) -> dict[str, Any]:
    from eval.results import finite, header

    document: dict[str, Any] = finite(
        {**header("lint", command), "models": [report.to_json() for report in reports], "refused": refused}
    )
    return document


def _command(
    models: list[Path], data: list[Path] | None, limit: int, side: int, ignore: list[str] | None, device: str
) -> str:
    words = ["codec-eval", "lint", *map(str, models), *(f"--data={path}" for path in data or [])]
    words += [
        f"--limit={limit}",
        f"--side={side}",
        *(f"--ignore={code}" for code in ignore or []),
        f"--device={device}",
    ]
    return shlex.join(words)
