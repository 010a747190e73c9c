"""`codec-train shards`: pack folders of images for training. Imports neither torch nor diffusers until it works."""

from pathlib import Path
from typing import Annotated

import typer

from codec.console import Exit, error
from train.shards import BAD_FILES, write_shards


def shards_command(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC...", help="Images and folders; folders are read recursively.")
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="DIR", help="Folder of the shards; empty, or begun by the same command."),
    ],
    shard_mb: Annotated[
        float, typer.Option(help="Largest size of a shard in MB (10^6 bytes), 0.1 or more.", min=0.1)
    ] = 64,
    jobs: Annotated[
        int | None, typer.Option(help="Worker processes, 1 or more.", min=1, show_default="one per core")
    ] = None,
) -> int:
    """Pack images into WebDataset tar shards, bytes unchanged, each proved readable; unreadable files are listed.

    The same command again resumes an interrupted run, and does nothing when all is done.

    Example: codec-train shards photos/ more_photos/ -o shards/ --shard-mb 64
    """
    report = write_shards(sources, out, shard_mb=shard_mb, jobs=jobs)
    for path, reason in report.bad:
        error(f"{path}: {reason}")
    action = "nothing to do, already complete" if report.reused_shards == report.n_shards else "done"
    print(
        f"{out}: {action}: {report.n_images} images in {report.n_shards} shards, {report.size_bytes / 1e6:.1f} MB"
        f" ({report.reused_shards} shards kept)"
        + (f", {report.n_bad} unreadable, see {BAD_FILES}" if report.bad else "")
    )
    return Exit.SOME_FAILED if report.bad else Exit.OK
