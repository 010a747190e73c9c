"""What several commands of `codec-eval` share: options with their help, a data set's name. Light to import."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from eval.protocol import PROTOCOLS

_KNOWN_PROTOCOLS = f"What is done to the images first, of {', '.join(PROTOCOLS)}; folder-N is there for every N."

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; older ones in it are overwritten.")]
Protocol = Annotated[str, typer.Option(help=_KNOWN_PROTOCOLS)]
Metrics = Annotated[
    str | None,
    typer.Option(help="Metrics, separated by commas.", show_default="all that the weights here allow"),
]
Backbones = Annotated[
    Path | None,
    typer.Option(
        "--backbones",
        "--features",
        help="Weights of perceptual metrics, a file or their folder. Without it $LATENT_CODEC_FEATURES and torch "
        "hub's cache are tried, and metrics whose weights are missing are left out.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Measure only the first N images; default all.", show_default=False)
]
ReportImages = Annotated[
    int, typer.Option(min=0, max=100, help="Images in the report, at most: the worst ten first; 0 for none.")
]


def name_of(data: Sequence[Path]) -> str:
    """Return what titles call a data set: the names of up to three sources, else "images"."""
    return ", ".join(dict.fromkeys(path.resolve().name for path in data)) if len(data) < 4 else "images"


def say_nothing(line: str) -> None:
    """Take a note on ranks that print nothing."""
