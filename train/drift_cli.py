"""`codec-train drift`: whether one autoencoder can take another's place. Imports torch only when it measures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec import console
from codec.console import Exit
from codec.errors import ImageError, UsageError
from codec.files import check_writable

if TYPE_CHECKING:
    import numpy as np


def drift_command(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE", help="The model that others rely on: a diffusers folder, or a pipeline's; or a name."
        ),
    ],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The one that is to take its place.")],
    images: Annotated[
        Path,
        typer.Option("--images", metavar="SRC", help="Images that neither was trained on: a folder, or shards."),
    ],
    limit: Annotated[int, typer.Option(min=1, help="Images used at most, spread evenly; 1 or more.")] = 64,
    decoded: Annotated[
        int, typer.Option(min=1, help="Of these, how many both decoders decode from either's latents; 1 or more.")
    ] = 8,
    side: Annotated[
        int, typer.Option(min=8, help="Centre crop in pixels, a multiple of f or rounded down to one; 8 or more.")
    ] = 512,
    device: Annotated[str, typer.Option(help="Where both models run: auto (a GPU if there is one), cpu, cuda:1.")] = (
        "auto"
    ),
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Write all figures here, as JSON.")
    ] = None,
) -> int:
    """Compare the latents of two autoencoders: drop-in compatible, yes or no, with the limits and their reasons.

    Any two diffusers folders with latents of one shape; every export of a fine-tune makes the same report.

    Example: codec-train drift sd-vae runs/tuned/model --images photos
    """
    if out is not None:
        check_writable(out.parent)

    from codec.engine import pick_device
    from codec.latent_model import load_latent_model
    from codec.model_folder import resolve
    from eval.results import write_json
    from train.drift import check_comparable, drift_lines, measure_drift
    from train.inflate import image_channels_of
    from train.journal import environment
    from train.samples import find

    where = pick_device(device)
    models = [load_latent_model(resolve(folder), where, image_channels=None) for folder in (base, new)]
    check_comparable(models[0], models[1], str(base), str(new))
    f, channels = models[0].f, max(image_channels_of(model.network) for model in models)
    if side < f:
        raise UsageError(f"--side {side}: less than f = {f}")
    entries = find(images, channels)
    count = min(limit, len(entries))
    chosen = [entries[n * len(entries) // count] for n in range(count)]
    bad: list[str] = []
    pictures = _pictures(chosen, channels, side, f, bad)
    figures = {"base": str(base), "new": str(new), "images": f"images of {images.resolve().name}"}
    figures |= measure_drift(models[0], models[1], pictures, n_decoded=decoded)
    print("\n".join(drift_lines(figures)))
    for reason in bad:
        console.error(reason)
    if bad:
        console.error(f"{len(bad)} of {count} images failed; the others were measured")
    if out is not None:
        write_json({"kind": "drift", **environment(), **figures, "failed": bad}, out)
        print(out)
    return Exit.SOME_FAILED if bad else Exit.OK


def _pictures(entries: Sequence[Any], channels: int, side: int, f: int, bad: list[str]) -> Iterator["np.ndarray"]:
    """Yield the middles of images; `bad` takes a line for each that cannot be read."""
    from train.crops import centre_crop
    from train.samples import read

    with console.progress(disable=not console.stderr.is_terminal) as bar:
        for entry in bar.track(entries, description="drift"):
            try:
                yield centre_crop(read(entry, channels), side, f)
            except ImageError as exception:
                bad.append(str(exception))
