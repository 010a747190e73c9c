"""`codec-train ship`: the folder of a model that is handed out with the package. Imports torch only when it works."""

import json
from pathlib import Path
from typing import Annotated

import typer

from codec.console import Exit


def ship_command(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="The model folder of a run; it is only read.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="DIR", help="The folder to write, named as the model shall be; not there."),
    ],
    licence: Annotated[
        str,
        typer.Option(
            "--licence", help="Licence of the weights, in a few words.", show_default="what the model states already"
        ),
    ] = "",
    licence_file: Annotated[
        Path | None,
        typer.Option("--licence-file", metavar="FILE", help="Its text.", show_default="LICENSE beside DIR"),
    ] = None,
) -> int:
    """Make a model folder small enough to come with the package: float16 weights alone, at most 16 MiB, card, licence.

    Everything that was compressed with MODEL decodes with it, and the other way round.

    Example: codec-train ship runs/first/model -o codec/models/kl-f8 --licence "research use only"
    """
    from train.ship import LICENCE_FILE, ship  # torch takes seconds to import

    found = ship(source, out, licence=licence, licence_file=licence_file or out.resolve().parent / LICENCE_FILE)
    print(json.dumps(found, indent=2))
    return Exit.OK
