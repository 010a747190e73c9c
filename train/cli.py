"""The command `codec-train`. Torch is imported only when a run starts."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from codec import console
from codec.console import Exit
from train.bench_cli import bench_command
from train.cache.cli import cache_bench_command, cache_command
from train.compact_cli import compact_command
from train.drift_cli import drift_command
from train.export_cli import export_command
from train.go_cli import go_command
from train.head.config import HeadConfig
from train.head.tools_cli import app as head_app
from train.importing.cli import import_command
from train.prior.config import PriorConfig
from train.prior.sample_cli import sample_command
from train.race.cli import race_command
from train.recipe import load_any, recipe_names
from train.shards_cli import shards_command
from train.ship_cli import ship_command

app = console.application(
    "codec-train",
    "Train autoencoders and export them as model folders. "
    "Exit codes: 0 all well; 1 some files failed, or training stopped; 2 usage; 130 interrupted.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `codec.console.run`."""
    return console.run(app, argv, "codec-train")


app.command("shards")(shards_command)
app.command("bench")(bench_command)
app.command("cache")(cache_command)
app.command("cache-bench")(cache_bench_command)
app.command("compact")(compact_command)
app.command("drift")(drift_command)
app.command("export")(export_command)
app.command("go")(go_command)
app.command("import")(import_command)
app.command("race")(race_command)
app.command("sample")(sample_command)
app.command("ship")(ship_command)
app.add_typer(head_app, name="head")


@app.command(epilog="Example: codec-train run small-f8c8 data.shards=shards run.out=runs/first run.time_limit_min=25")
def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a recipe of the package.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, e.g. optim.lr=2e-4.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config as JSON and stop.")] = False,
) -> int:
    """Train a model and export it to RUN/model. Keys and defaults: --dry-run with any recipe."""
    config = load_any(recipe, overrides or [])
    if dry_run:
        print(json.dumps(config.to_dict(), indent=2))
        return Exit.OK

    # After the config is known to be good: torch takes seconds to import.
    from train.head.run import run as run_head
    from train.prior.run import run as run_prior
    from train.run import run as run_autoencoder
    from train.trainer import Preempted, TrainingError

    try:
        if isinstance(config, PriorConfig):
            figures = run_prior(config)
        elif isinstance(config, HeadConfig):
            figures = run_head(config)
        else:
            figures = run_autoencoder(config)
    except TrainingError as exception:
        console.error(str(exception))
        return Exit.SOME_FAILED
    except Preempted:
        console.stderr.print(f"saved; go on with the same command and run.resume=auto ({config.run.out})")
        return Exit.OK
    if figures:
        print(f"model: {Path(config.run.out) / 'model'}")
        print(json.dumps(figures, indent=2))
    return Exit.OK


@app.command()
def recipes() -> int:
    """List the recipes of the package."""
    print("\n".join(recipe_names()))
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
