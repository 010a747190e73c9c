"""The command `codec-eval`. Heavy imports happen inside the commands, so that `--help` is fast."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import codec
from codec import console
from codec.console import Exit, error, stderr
from codec.errors import UsageError
from eval.bench_cli import bench_command

if TYPE_CHECKING:
    from eval.features import SqueezeFeatures

app = console.application(
    "codec-eval",
    "Measure image codecs honestly: real file sizes, whole images, stated protocols. "
    "Exit codes: 0 all well; 1 some images failed (listed, the rest is measured); 2 usage; 3 model; 130 interrupted.",
)
app.command("bench")(bench_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `codec-eval` and return its exit code; argv None takes sys.argv[1:]."""
    return console.run(app, argv, "codec-eval")


@app.command(epilog="Example: codec-eval rd photos -m model --baselines jpeg,avif -q 10,50,90 -o results")
def rd(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders searched for images.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; older ones in it are overwritten.")],
    model: Annotated[
        list[Path] | None,
        typer.Option("-m", "--model", help="Model folder; may be repeated. Without it only baselines are measured."),
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="Classical codecs, of jpeg, webp, avif, jxl; '' for none.")
    ] = "jpeg,webp,avif,jxl",
    qualities: Annotated[
        str, typer.Option("-q", "--qualities", help="Qualities of the models, integers 0 (coarsest) to 100 (finest).")
    ] = "10,30,50,70,90",
    features: Annotated[
        Path | None,
        typer.Option(
            help="squeezenet1_0 weights for lpips-sqz10, a file or its folder. Without it $LATENT_CODEC_FEATURES and "
            "torch hub's cache are tried, else that metric is n/a.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure only the first N images; default all.", show_default=False)
    ] = None,
    picture_bpp: Annotated[
        float, typer.Option(min=0.01, max=24, help="Rate of the comparison picture, in bits per pixel.")
    ] = 0.3,
    device: Annotated[str, typer.Option(help="Torch device of the models and features: cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="What models compute in: auto (bfloat16 where the hardware does), bfloat16, float32.")
    ] = "auto",
    effort: Annotated[
        int | None, typer.Option(min=0, max=9, help="As of `codec encode`; default: its.", show_default=False)
    ] = None,
) -> int:
    """Rate-distortion of models and classical codecs: rd.json, one plot per metric, a picture at equal file size."""
    from codec import files
    from codec.coding import Settings
    from codec.images import EXTENSIONS
    from eval import baselines as classical

    files.check_writable(out)
    sources = files.find(images, EXTENSIONS)[:limit]
    chosen = classical.get([name.strip() for name in baselines.split(",") if name.strip()])
    model_qualities = _qualities(qualities)
    if not model and not chosen:
        raise UsageError("nothing to measure: give a model with -m or at least one of --baselines")
    distance = _features(features, device)
    how = Settings() if effort is None else Settings(effort=effort)
    models = [codec.Codec.load(folder, device=device, dtype=dtype, settings=how) for folder in model or []]

    from eval import pictures, plots
    from eval.rd import run_rd, write_json

    command = ["codec-eval", "rd", *map(str, images), *(f"-m={folder}" for folder in model or [])]
    command += [f"--baselines={baselines}", f"--qualities={qualities}", f"--picture-bpp={picture_bpp}"]
    command += [f"--features={features}"] * bool(features) + [f"--limit={limit}"] * bool(limit)
    command += [f"--device={device}", f"--dtype={dtype}", f"--effort={how.effort}", f"--out={out}"]
    name = ", ".join(dict.fromkeys(path.resolve().name for path in images)) if len(images) < 4 else "images"
    result = run_rd(sources, models, chosen, model_qualities, distance, shlex.join(command), name)
    write_json(result, out / "rd.json")
    picture = out / "comparison.png"
    picture.unlink(missing_ok=True)  # never that of an earlier run beside this one's numbers
    written = [out / "rd.json", *plots.plot(result, out)]
    failed = {failure["path"] for failure in result["failed"]}
    measured = [source for source in sources if str(source.path) not in failed]
    if measured:
        pictures.compare(measured, models, chosen, picture_bpp, picture)
        written.append(picture)
        _print_table(result)
    for path in written:
        typer.echo(path)
    for failure in result["failed"]:
        error(failure["reason"])
    if failed:
        error(f"{len(failed)} of {len(sources)} images failed and count for no codec")
    return Exit.SOME_FAILED if failed else Exit.OK


def _qualities(text: str) -> list[int]:
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 0 or values[-1] > 100:
        raise UsageError(f"--qualities: expected integers from 0 to 100 separated by commas, got {text!r}")
    return values


def _features(path: Path | None, device: str) -> "SqueezeFeatures | None":
    """Load lpips-sqz10. Missing weights are an error only if the user named a place for them."""
    from eval.features import FeaturesError, SqueezeFeatures, find_backbone

    try:
        file = find_backbone(SqueezeFeatures.name_of_backbone, path)
    except FeaturesError as exception:
        if path is not None:
            raise
        stderr.print(f"note: no lpips-sqz10: {exception}")
        return None
    try:
        return SqueezeFeatures(file).to(device)
    except (RuntimeError, AssertionError) as exception:  # what torch raises for devices that it does not have
        raise UsageError(f"device {device}: {exception}") from exception


def _print_table(result: dict[str, Any]) -> None:
    """Print the means of every codec and quality on stdout; a value that does not exist is n/a."""
    from eval.metrics import METRICS

    def text(value: float | None, digits: int) -> str:
        return "n/a" if value is None else f"{value:.{digits}f}"

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # rich would squeeze it into 80 columns
    table = Table(title=f"{escape(result['dataset']['name'])}: means of {result['dataset']['n_images']} images")
    table.add_column("codec")
    for heading in ("quality", "bpp", *(metric.label for metric in METRICS)):
        table.add_column(heading, justify="right")
    for entry in result["codecs"]:
        for point in entry["points"]:
            values = [text(point[metric.key], metric.digits) for metric in METRICS]
            table.add_row(escape(entry["label"]), str(point["quality"]), text(point["bpp"], 3), *values)
        if entry["ceiling"]:
            values = [text(entry["ceiling"][metric.key], metric.digits) for metric in METRICS]
            table.add_row(escape(entry["label"]), "none", "n/a", *values)
        table.add_section()
    console.print(table)
