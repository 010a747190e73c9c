"""`codec-train race`: which autoencoder does a diffusion model learn best from? Imports torch only when it runs."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec import console, options
from codec.console import Exit, error, note
from codec.errors import ModelError, UsageError
from codec.files import check_writable

if TYPE_CHECKING:
    from accelerate import Accelerator

    from eval.autoencoder import Autoencoder
    from train.race.data import Pictures
    from train.race.entrant import RaceConfig
    from train.race.run import Race

N_IMAGES = 40_000
RACE_JSON, CURVES_PNG = "race.json", "curves.png"
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}  # of training, by what the autoencoders run in


def race_command(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="Folders of autoencoders or of pipelines, or names.")
    ],
    data: Annotated[
        Path,
        typer.Option("--data", help="Shards, or a folder of class folders of images.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="DIR", help="Folder of the results; new, or begun by the same command."),
    ],
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out", help="Shards or folder to measure on; default a part of --data.", show_default=False
        ),
    ] = None,
    n_held_out: Annotated[
        int, typer.Option(min=1, help="Images to measure on, at most; without --held-out at most a fifth of --data.")
    ] = 500,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Learn from N images only, chosen by hash; default all.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels, a multiple of each f.")] = 64,
    n_images: Annotated[
        int | None,
        typer.Option("--images", min=1, help="Images that each denoiser sees.", show_default=f"{N_IMAGES}"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="In place of --images: about as many as one sees in so many minutes here.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels along a token's side, a multiple of each f.", show_default="the largest f"),
    ] = None,
    width: Annotated[int, typer.Option(min=32, help="Channels of the denoiser, a multiple of 32.")] = 192,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the denoiser.")] = 6,
    batch_size: Annotated[int, typer.Option("--batch", min=1, help="Images in a step, over all ranks.")] = 32,
    lr: Annotated[float, typer.Option(min=1e-8, help="Peak learning rate of AdamW.")] = 1e-3,
    n_samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Images to draw from each denoiser.", show_default="as many as held out"),
    ] = None,
    n_steps: Annotated[int, typer.Option("--steps", min=1, help="Euler steps of a drawing.")] = 25,
    guidance: Annotated[
        float, typer.Option(min=0, help="Weight of classifier-free guidance; 1 = none, and half the time.")
    ] = 1.0,
    normalize: Annotated[
        str,
        typer.Option(
            help="channels: each channel of the latents to mean 0, deviation 1; model: by the model's own config."
        ),
    ] = "channels",
    features: Annotated[
        Path | None,
        typer.Option(
            help="Weights of the feature network, a file or their folder; else $LATENT_CODEC_FEATURES and torch hub's "
            "cache are tried.",
            show_default=False,
        ),
    ] = None,
    fid_network: Annotated[
        str | None,
        typer.Option(
            help="Features to compare: inception, a classifier of torchvision, or a folder of a transformers model.",
            show_default="inception or squeezenet1_0, whichever is found; none without",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order, noise and samples, the same for all.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one) or cpu.")] = "auto",
    dtype: options.Dtype = "auto",
) -> int:
    """Train the same small diffusion transformer on the latents of each autoencoder, and compare what they learn.

    Seed, data, order, noise, tokens and steps are the same for all. Prints a Markdown table; writes race.json,
    curves.png, and samples.png of each. The same command again goes on with what was interrupted. Runs on many ranks
    under accelerate launch.

    Example: codec-train race runs/a/model runs/b/model --data clothing/train --held-out clothing/test -o race
    """
    if n_images is not None and minutes is not None:
        raise UsageError("--minutes stands for a number of --images: give one of the two")
    check_writable(out)

    from train.race.entrant import RaceConfig
    from train.race.run import images_in, stored_settings, stride_of  # torch takes seconds to import

    accelerator = _accelerator(device)
    if batch_size % accelerator.num_processes:
        raise UsageError(f"--batch {batch_size}: expected a multiple of the {accelerator.num_processes} processes")
    loaded = _load(models, accelerator, dtype)
    stride = stride_of(loaded, size, stride)
    pictures = _pictures(accelerator, data, held_out, size=size, n_held_out=n_held_out, limit=limit)
    try:
        config = RaceConfig(
            size=size,
            stride=stride,
            n_images=n_images or N_IMAGES,
            minutes=minutes,
            batch_size=batch_size,
            lr=lr,
            width=width,
            depth=depth,
            n_samples=n_samples or len(pictures.held_out),
            n_steps=n_steps,
            guidance=guidance,
            normalization=normalize,
            precision=_PRECISIONS[str(loaded[0].engine.dtype).removeprefix("torch.")],
            seed=seed,
        )
    except ValueError as exception:
        raise UsageError(f"--{exception}") from exception
    if minutes is not None:
        before = stored_settings(out)  # a race that goes on has been timed
        known = before["n_images"] if before is not None and before.get("minutes") == minutes else None
        first = loaded[0].engine.model
        shape = (first.channels, size // first.f, size // first.f)
        count = known or images_in(minutes, config, shape, len(pictures.classes), accelerator)
        config = replace(config, n_images=count)
    return _run(loaded, pictures, config, out, accelerator, (fid_network, features))


def _accelerator(device: str) -> "Accelerator":
    """Join the processes of this run; precision and compilation are ours, whatever the launcher's config says."""
    from accelerate import Accelerator

    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: expected auto or cpu; choose a GPU with CUDA_VISIBLE_DEVICES")
    return Accelerator(mixed_precision="no", dynamo_backend="no", cpu=device == "cpu")


def _load(models: Sequence[Path], accelerator: "Accelerator", dtype: str) -> list["Autoencoder"]:
    """Load the autoencoders, on each process."""
    from codec.engine import EngineConfig
    from eval.autoencoder import load_all
    from train.race.run import check_models

    config = EngineConfig(device=str(accelerator.device), dtype=dtype)
    loaded = load_all(models, config, notes=note)
    check_models(loaded)
    return loaded


def _pictures(
    accelerator: "Accelerator", data: Path, held_out: Path | None, *, size: int, n_held_out: int, limit: int | None
) -> "Pictures":
    """Read the images, on each process; the first one goes first, and indexes shards that have no index."""
    from train.race.data import load_pictures

    with accelerator.main_process_first():
        shown = accelerator.is_main_process and console.stderr.is_terminal
        with console.stderr.status("reading images") if shown else nullcontext():
            return load_pictures(data, held_out, size=size, n_held_out=n_held_out, limit=limit)


def _run(
    models: Sequence["Autoencoder"],
    pictures: "Pictures",
    config: "RaceConfig",
    out: Path,
    accelerator: "Accelerator",
    network: tuple[str | None, Path | None],
) -> int:
    """Race one autoencoder after the other; write what there is after each. Returns the exit code."""
    from train.race.run import Race
    from train.race.score import Judge, feature_network
    from train.trainer import Preempted, TrainingError

    name, place = network
    found = feature_network(name, None if place is None else str(place), str(accelerator.device))
    main = accelerator.is_main_process
    if found is None and main:
        note("no feature network here (see codec-eval weights): the losses are compared, the samples are not")
    race = Race(
        pictures, config, Judge.of(found, pictures, config.n_samples), out, accelerator, note if main else _nothing
    )
    failed, result = list(pictures.failed), None
    for model in models:
        try:
            race.run(model)
        except (ModelError, TrainingError) as exception:  # of this one: the others may do better
            failed.append(f"{model.name}: {exception}")
            continue
        except Preempted:
            note(f"saved; go on with the same command ({out})")
            return Exit.OK
        if main:  # after each: what an interrupt leaves is a whole result
            result = _write(race, [model.name for model in models], failed, out)
    if main:
        if result is not None:
            _print(result, out)
        for reason in failed:
            error(reason)
    # Only the first rank may fail: a launcher ends the others as soon as one does.
    return Exit.SOME_FAILED if failed and main else Exit.OK


def _nothing(line: str) -> None:
    """Take a note on processes that print nothing."""


def _write(race: "Race", names: Sequence[str], failed: Sequence[str], out: Path) -> dict[str, Any]:
    """Write race.json and curves.png of all that has finished; return the former."""
    from codec.files import write_atomic
    from eval import jackknife
    from eval.results import header, write_json
    from train.race import report
    from train.race.run import digest, results

    result = {
        **header("race", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "settings": race.settings,
        "settings_hash": digest(race.settings),
        "meanings": report.MEANINGS,
        "comparable": report.COMPARABLE,
        "intervals": jackknife.SETTINGS,
        "control": race.control,
        "entrants": results(out, race.settings, names),
        "failed": list(failed),
    }
    result["notes"] = report.notes(result)
    write_json(result, out / RACE_JSON)
    write_atomic(out / CURVES_PNG, report.curves(result))
    return result


def _print(result: dict[str, Any], out: Path) -> None:
    """Print the table, what must be known to read it, and the files."""
    from train.race.report import markdown
    from train.race.run import SAMPLES_PNG, folder_name

    print("\n".join([*markdown(result), ""]))
    for path in (out / RACE_JSON, out / CURVES_PNG):
        print(path)
    for entrant in result["entrants"]:
        print(out / folder_name(entrant["name"]) / SAMPLES_PNG)
