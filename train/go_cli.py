"""`codec-train go`: training in goes, on machines that keep nothing between them. Imports torch only when it works."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from codec import console
from codec.console import Exit
from codec.errors import UsageError


def go_command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a recipe of the package.")
    ],
    photos: Annotated[Path, typer.Option("--photos", metavar="DIR", help="Photographs, or shards of them.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="DIR", help="Takes state.safetensors, go-NNN.json, log.jsonl and at the end model/."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. optim.lr=2e-4.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The state of the go before; may lie in DIR.", show_default="the first go"),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Minutes of the clock for all of it, 0 or more; 0 trains nothing.", min=0)
    ] = 10.0,
    reserve: Annotated[
        float,
        typer.Option(help="Minutes of these for the last validation, the state and the export, 0 or more.", min=0),
    ] = 1.0,
    export: Annotated[
        bool, typer.Option("--export", help="Write DIR/model though the run is not at its end (run.n_images).")
    ] = False,
) -> int:
    """Train an autoencoder for some minutes, from a state to the next one, in place of one long run.

    The schedule is that of run.n_images over all goes, whatever their minutes. Images are held in memory, on the GPU if
    there is one. The state is written every two minutes and at the end; SIGTERM saves too, and a kill leaves the last
    one whole. Optimizers begin anew in each go: where checkpoints can stay, `codec-train run` with run.resume is exact.

    Example: codec-train go f8c8.toml --photos photos --state out/state.safetensors --minutes 10 -o out
    """
    began_s = time.monotonic()
    if 0 < minutes <= reserve:
        raise UsageError(f"--minutes {minutes:g}: all of them are kept for the end (--reserve {reserve:g})")
    if state is not None and not state.is_file():
        raise UsageError(f"{state}: no such state; leave --state out in the first go")

    from train.go import Go, run_go  # torch takes seconds to import
    from train.trainer import TrainingError

    how = {"minutes": minutes, "reserve_min": reserve, "began_s": began_s}
    try:
        figures = run_go(
            Go(recipe=recipe, overrides=overrides or [], photos=photos, state=state, out=out, export=export, **how)
        )
    except TrainingError as exception:
        console.error(str(exception))
        return Exit.SOME_FAILED
    shown = ("go", "images_seen", "n_images", "finished", "minutes", "images_per_s", "validation", "state")
    print(json.dumps({name: figures[name] for name in shown}, indent=2))
    if figures["model"]:
        print(f"model: {out / 'model'}")
    if not figures["finished"]:
        print(f"go on with --state {out / 'state.safetensors'}")
    return Exit.OK
