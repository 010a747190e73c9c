"""`codec-eval rd`: rate-distortion of models and classical codecs. Imports torch only when it measures."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec.console import Exit, error, note
from codec.errors import UsageError
from eval import options
from eval.protocol import get

if TYPE_CHECKING:
    from codec.files import Source
    from eval.rd import RateDistortion

_FIT_IMAGES = 200


def rd_command(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders searched for images.", show_default=False)],
    out: options.Out,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "-m",
            "--model",
            help="Folder or name, ours or any diffusers autoencoder's (see --fit-images); may be repeated. Without it "
            "only classical codecs are measured.",
        ),
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="Classical codecs, of jpeg, webp, avif, jxl; '' for none.")
    ] = "jpeg,webp,avif,jxl",
    qualities: Annotated[
        str, typer.Option("-q", "--qualities", help="Qualities of the models, integers 0 (coarsest) to 100 (finest).")
    ] = "10,30,50,70,90",
    baseline_qualities: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=Q,Q",
            help="Qualities of one classical codec, like jpeg=5,10,20,30; may be repeated.",
            show_default="about 0.1 to 1 bpp",
        ),
    ] = None,
    protocol: options.Protocol = "folder",
    metrics: options.Metrics = None,
    backbones: options.Backbones = None,
    fit_images: Annotated[
        Path | None,
        typer.Option(
            help="Training images for models without codec.json: entropy tables are fitted to their latents, for this "
            "run alone. None of them may be among the images to measure.",
            show_default=False,
        ),
    ] = None,
    fit_limit: Annotated[
        int, typer.Option(min=1, help="Of the training images, use N, drawn at random.")
    ] = _FIT_IMAGES,
    curves: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.json",
            help="Curve in CompressAI's JSON, to stand beside these; read, not measured; may be repeated.",
        ),
    ] = None,
    anchor: Annotated[
        str | None, typer.Option(help="Codec that others are compared with.", show_default="jpeg, else the first")
    ] = None,
    limit: options.Limit = None,
    picture_bpp: Annotated[
        float, typer.Option(min=0.01, max=24, help="Rate of all pictures, in bits per pixel.")
    ] = 0.3,
    report_images: options.ReportImages = 12,
    device: Annotated[
        str, typer.Option(help="Torch device of the models and metrics: cpu, cuda, cuda:1, auto (a rank's own GPU) ...")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="What models compute in: auto (bfloat16 where the hardware does), bfloat16, float32.")
    ] = "auto",
    effort: Annotated[
        int | None, typer.Option(min=0, max=9, help="As of `codec encode`; default: its.", show_default=False)
    ] = None,
) -> int:
    """Rate-distortion of models and classical codecs: rd.json, plots, BD-rates, a picture at equal file size.

    A PNG round trip is measured first, and must come out as perfect. Curves go to OUT/compressai in CompressAI's JSON
    too. Runs on many ranks under accelerate launch or torchrun; codec times are then those of a busy machine.

    Example: codec-eval rd photos -m model --baselines jpeg,avif -q 10,50,90 -o results
    """
    from codec import files
    from codec.images import EXTENSIONS
    from codec.launch import Launch
    from eval import baselines as classical
    from eval import stored_curves

    launch = Launch.from_environment()
    files.check_writable(out)
    sources = files.find(images, EXTENSIONS)[:limit]
    named = get(protocol)
    named.check_count(len(sources))
    chosen = classical.get(_names(baselines), _by_name(baseline_qualities or []))
    model_qualities = _qualities("--qualities", qualities)
    stored = [stored_curves.read(path) for path in curves or []]
    if not model and not chosen:
        raise UsageError("nothing to measure: give a model with -m or at least one of --baselines")
    training = files.find([fit_images], EXTENSIONS, "training images") if fit_images else []

    from codec.coding import Settings
    from codec.engine import EngineConfig, pick_device
    from eval import metrics as pairs
    from eval.foreign import Fitting, load_models
    from eval.rd import RateDistortion, run_rd

    say = note if launch.index == 0 else options.say_nothing
    where = str(pick_device(device, launch.local))
    measures = pairs.chosen(metrics, backbones, where)
    if measures.absent:
        say(f"left out, their weights are not here (see codec-eval weights): {', '.join(measures.absent)}")
    settings = Settings() if effort is None else Settings(effort=effort)
    fitting = Fitting(sources=training, test=sources, n_images=fit_limit)
    models = load_models(model or [], EngineConfig(device=where, dtype=dtype), settings, fitting, launch, say)

    given = {"metrics": metrics, "backbones": backbones, "fit-images": fit_images, "anchor": anchor, "limit": limit}
    command = ["codec-eval", "rd", *map(str, images), *(f"-m={folder}" for folder in model or [])]
    command += [f"--baselines={baselines}", f"--qualities={qualities}", f"--protocol={protocol}"]
    command += [f"--baseline-qualities={text}" for text in baseline_qualities or []]
    command += [f"--curves={path}" for path in curves or []]
    command += [f"--{option}={value}" for option, value in given.items() if value is not None]
    command += [f"--fit-limit={fit_limit}"] * bool(fit_images) + [f"--picture-bpp={picture_bpp}"]
    command += [f"--report-images={report_images}"]
    command += [f"--device={device}", f"--dtype={dtype}", f"--effort={settings.effort}", f"--out={out}"]
    how = RateDistortion(
        protocol=named,
        metrics=measures,
        models=models,
        qualities=model_qualities,
        baselines=chosen,
        stored=stored,
        anchor=anchor,
    )
    name = options.name_of(images)
    result = run_rd(sources, how, launch, shlex.join(command), name)
    if launch.index == 0:
        _write(result, sources, how, (picture_bpp, report_images), out)
    # A launcher ends all processes when one fails: only the first, which is done last, may say that images failed.
    return Exit.SOME_FAILED if result["failed"] and launch.index == 0 else Exit.OK


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _qualities(option: str, text: str) -> list[int]:
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 0 or values[-1] > 100:
        raise UsageError(f"{option}: expected integers from 0 to 100 separated by commas, got {text!r}")
    return values


def _by_name(texts: Sequence[str]) -> dict[str, list[int]]:
    found = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals:
            raise UsageError(f"--baseline-qualities: expected a codec and its qualities, like jpeg=5,10, got {text!r}")
        found[name.strip()] = _qualities(f"--baseline-qualities {name.strip()}", values)
    return found


def _write(
    result: dict[str, Any], sources: "Sequence[Source]", how: "RateDistortion", shown: tuple[float, int], out: Path
) -> None:
    """Write all that a run gives, and print it.

    Args:
        result: of the run.
        sources: all images, failed ones too.
        how: what was measured.
        shown: of the pictures: their rate in bits per pixel, and how many images are in the report.
        out: folder.
    """
    from eval import pictures, plots, rd_print, report_runs, stored_curves
    from eval.results import write_json

    write_json(result, out / "rd.json")
    picture = out / "comparison.png"
    report = out / "report.html"
    for path in (picture, report):
        path.unlink(missing_ok=True)  # never that of an earlier run beside this one's numbers
    written = [out / "rd.json", *stored_curves.write(result, out / "compressai"), *plots.plot(result, out)]
    failed = {failure["path"] for failure in result["failed"]}
    measured = [source for source in sources if str(source.path) not in failed]
    if measured:
        pictures.compare(measured, how.models, how.baselines, shown[0], picture, protocol=how.protocol)
        report_runs.of_rd(result, measured, how, *shown, report)
        written += [picture, report]
        rd_print.show(result)
    for path in written:
        typer.echo(path)
    for failure in result["failed"]:
        error(failure["reason"])
    if failed:
        error(f"{len(failed)} of {len(sources)} images failed and count for no codec")
