"""`codec-eval latents`: options, table and files. Imports torch only when it measures."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codec.console import Exit, error, note
from eval import options

if TYPE_CHECKING:
    from eval.latent_measure import Example


def latents_command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A diffusers AutoencoderKL or AutoencoderTiny folder, or a pipeline's; or a name."
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Image, or folder searched for images; may be repeated.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for latents.json and the plots; older ones go.")],
    size: Annotated[
        int, typer.Option(min=1, help="Side of the centre crop in pixels: a multiple of the model's f, at least 8 f.")
    ] = 256,
    limit: options.Limit = None,
    device: Annotated[str, typer.Option(help="Torch device: auto (a GPU if there is one), cpu, cuda:1 ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="What the network computes in: float32, bfloat16, float16 (GPU), auto.")
    ] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise and of the cells and positions that are drawn.")] = 0,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw PNG plots beside latents.json.")] = True,
) -> int:
    """What a diffusion model would meet in an autoencoder's latents: latents.json, plots, and a table with the reasons.

    Example: codec-eval latents model --data photos -o latents
    """
    from codec import files
    from codec.engine import Engine, EngineConfig
    from codec.images import EXTENSIONS
    from codec.launch import Launch
    from codec.model_folder import resolve
    from eval.latent_measure import LatentsConfig
    from eval.latents import check, run_latents

    launch = Launch.from_environment()
    files.check_writable(out)
    sources = files.find(data, EXTENSIONS)[:limit]
    folder = resolve(model)
    engine = Engine.load(folder, EngineConfig(device=device, dtype=dtype), launch.local, notes=note)
    check(engine.model, folder, size)
    stated: Any = engine.model.network.config
    if launch.index == 0 and not isinstance(engine.model.normalisation.scale, float):
        names = "latents_mean and latents_std" if stated.get("latents_mean") else "bn.running_mean and bn.running_var"
        note(f"note: {model}: {names} are not used: normalized is by one number for all channels")
    command = ["codec-eval", "latents", str(model), *(f"--data={path}" for path in data), f"--size={size}"]
    command += [f"--limit={limit}"] * bool(limit)
    command += [
        f"--device={device}",
        f"--dtype={dtype}",
        f"--seed={seed}",
        *["--no-plots"] * (not plots),
        f"--out={out}",
    ]
    config = LatentsConfig(size=size, seed=seed)
    result, example = run_latents(engine, folder, sources, config, launch, shlex.join(command))
    if launch.index == 0:
        _report(result, example, out, plots)
    # Only the first rank may fail: a launcher ends the others as soon as one does.
    return Exit.SOME_FAILED if result["failed"] and launch.index == 0 else Exit.OK


def _report(result: dict[str, Any], example: "Example | None", out: Path, plots: bool) -> None:
    """Write and print what was measured, and list the images that failed."""
    from eval.results import write_json

    failed, n_images = result["failed"], result["dataset"]["n_images"]
    for older in (out / "latents.json", *out.glob("latents_*.png")):  # never beside another run's numbers
        older.unlink(missing_ok=True)
    if n_images:
        written = [out / "latents.json"]
        write_json(result, written[0])
        print_tables(result)
        if plots:
            from eval import latent_plots

            written += latent_plots.plot(result, example, out)
        for path in written:
            typer.echo(path)
    for failure in failed:
        error(failure["reason"])
    if failed:
        what = "the others were measured" if n_images else "nothing was measured"
        error(f"{len(failed)} of {len(failed) + n_images} images failed; {what}")


def print_tables(result: Mapping[str, Any]) -> None:
    """Print the channels, and then every number with what it means, on stdout."""
    from eval.latent_words import CHANNEL_COLUMNS

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150  # rich would squeeze it into 80 columns
    model, data = result["model"], result["dataset"]
    title = f"{model['name']}: {model['class']}, f {model['f']}, {model['channels']} channels; "
    title += f"{data['n_images']} images, {result['settings']['size']} x {result['settings']['size']}"
    shown = [column for column in CHANNEL_COLUMNS if result["channels"][0].get(column[0]) is not None]
    table = Table(title=escape(title))
    table.add_column("channel", justify="right")
    for _, heading, _, _ in shown:
        table.add_column(heading, justify="right")
    for row in result["channels"]:
        table.add_row(str(row["channel"]), *(_cell(row[key], form) for key, _, form, _ in shown))
    console.print(table)
    for _, heading, _, meaning in shown:
        console.print(f"  {heading}: {meaning}", markup=False)
    console.print()
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it means for a diffusion model trained on it")
    section = None
    for line in result["summary"]:
        if line["section"] != section:
            section = line["section"]
            table.add_section()
            table.add_row(f"[bold]{escape(section)}", "", "")
        table.add_row("  " + escape(line["label"]), escape(line["text"]), escape(line["meaning"]))
    console.print(table)


def _cell(value: Any, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "n/a" if value is None else form.format(value)
