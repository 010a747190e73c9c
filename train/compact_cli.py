"""`codec-train compact`: the small file that a run is continued from. Imports torch only when it works."""

from pathlib import Path
from typing import Annotated

import typer

from codec.console import Exit
from codec.errors import UsageError


def compact_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run folder (its newest sound checkpoint), or one checkpoint."),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The state to write, .safetensors; replaced if there.")
    ],
) -> int:
    """Make a checkpoint of an autoencoder's run a compact state of at most 64 MiB, without the optimizers.

    A run goes on from it with run.continue_from, or `codec-train go --state`: weights, averages, discriminator and
    position are kept, the optimizers begin anew. Where the checkpoint itself is there, run.resume is exact.

    Example: codec-train compact runs/first -o first.safetensors
    """
    from train import compact  # torch takes seconds to import
    from train.checkpoint import Checkpoints, load

    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: a state is a .safetensors file")
    found = (source, load(source)) if source.is_file() else Checkpoints(source / "checkpoints", 1).newest()
    if found is None:
        raise UsageError(f"{source}: no checkpoint here")
    path, state = found
    task = state["config"]["task"]
    if task != "autoencoder":
        raise UsageError(f"{path}: of a run with task {task}; only autoencoders are trained in goes")
    size = compact.write(out, state)
    progress = state["progress"]
    print(
        f"{out}: {size / 2**20:.1f} MiB, of {path.name}: {progress['images']} of {state['config']['run']['n_images']} "
        f"images seen, go {len(compact.goes_of(state))}"
    )
    return Exit.OK
