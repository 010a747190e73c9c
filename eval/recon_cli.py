"""`codec-eval recon`: what autoencoders make of images. Imports torch only when it measures."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codec.console import Exit, error, note
from codec.errors import UsageError
from eval import options
from eval.protocol import PROTOCOLS, Protocol, folder_of, get

if TYPE_CHECKING:
    from codec.files import Source
    from codec.launch import Launch
    from eval.autoencoder import Autoencoder
    from eval.feature_networks import FeatureNetwork
    from eval.recon import Recon

DEFAULT_PROTOCOL = "folder-256"


def recon_command(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Folders of autoencoders (KL, Tiny, VQ) or of pipelines, or names."),
    ],
    data: Annotated[
        list[Path], typer.Option("--data", help="Images, or a folder searched for images; may be repeated.")
    ],
    out: options.Out,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=f"What is done to the images first, of {', '.join(PROTOCOLS)}; folder-N is there for every N.",
            show_default=DEFAULT_PROTOCOL,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Sides in pixels, like 256,512,1024: folder-N for each, recon-N.json each.", show_default=False
        ),
    ] = None,
    posterior: Annotated[
        str, typer.Option(help="Which latents are decoded: mode (the mean), or sample (KL models only).")
    ] = "mode",
    seed: Annotated[
        int, typer.Option(min=0, help="Of a sample's noise, which this and the image's name alone decide.")
    ] = 0,
    metrics: options.Metrics = None,
    backbones: options.Backbones = None,
    fid_network: Annotated[
        str | None,
        typer.Option(
            help="Features of FID and its like: inception, a classifier of torchvision, a file of weights, a folder of "
            "a transformers vision model, or none.",
            show_default="inception, where its weights are found and --metrics is not given",
        ),
    ] = None,
    limit: options.Limit = None,
    report_images: options.ReportImages = 12,
    device: Annotated[
        str, typer.Option(help="Of models and metrics: auto (a GPU if there is one), cpu, cuda:1 ...")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="What models compute in: float32, bfloat16, float16, auto (the fastest here).")
    ] = "float32",
) -> int:
    """Reconstruction quality of autoencoders, ours or anyone's: recon.json, a picture, a table.

    Reference and reconstruction go through the same crop, and are 8-bit images before anything is measured. A PNG round
    trip is measured first, and must come out as perfect. Runs on many ranks under accelerate launch or torchrun.

    Example: codec-eval recon runs/small/model stable-diffusion/vae --data photos --size 256,512 -o results
    """
    from codec import files
    from codec.engine import EngineConfig, pick_device
    from codec.images import EXTENSIONS
    from codec.launch import Launch

    chosen = _protocols(protocol, size)
    launch = Launch.from_environment()
    files.check_writable(out)
    sources = files.find(data, EXTENSIONS)[:limit]
    for one in chosen:
        one.check_count(len(sources))

    given = {"metrics": metrics, "backbones": backbones, "fid-network": fid_network, "limit": limit}
    command = ["codec-eval", "recon", *map(str, models), *(f"--data={path}" for path in data)]
    command += [f"--size={size}" if size else f"--protocol={protocol or DEFAULT_PROTOCOL}"]
    command += [f"--posterior={posterior}", f"--seed={seed}"]
    command += [f"--{option}={value}" for option, value in given.items() if value is not None]
    command += [f"--report-images={report_images}", f"--device={device}", f"--dtype={dtype}", f"--out={out}"]

    from eval import metrics as pairs
    from eval.autoencoder import load_all
    from eval.recon import Recon

    say = note if launch.index == 0 else options.say_nothing
    where = str(pick_device(device, launch.local))
    measures = pairs.chosen(metrics, backbones, where)
    network = _network(fid_network or ("none" if metrics else None), backbones, where)
    config = EngineConfig(device=device, dtype=dtype)
    loaded = load_all(models, config, launch.local, say, posterior=posterior, seed=seed)
    absent = [*measures.absent, *["FID and its like"] * (network is None and not fid_network and not metrics)]
    if absent:
        say(f"left out, their weights are not here (see codec-eval weights): {', '.join(absent)}")
    how = Recon(protocol=chosen[0], metrics=measures, network=network, posterior=posterior, seed=seed)
    run = _Run(
        sources=sources,
        models=loaded,
        launch=launch,
        command=shlex.join(command),
        dataset=options.name_of(data),
        n_shown=report_images,
        out=out,
    )
    several = len(chosen) > 1
    return max(run(replace(how, protocol=one), f"recon-{one.side}" if several else "recon") for one in chosen)


def _network(name: str | None, backbones: Path | None, device: str) -> "FeatureNetwork | None":
    """Load the feature network that was asked for; that of FID, where it is found, if none was."""
    from eval.feature_networks import load_network
    from eval.features import BACKBONES, INCEPTION, FeaturesError, belongs_to, find_among

    if name == "none":
        return None
    if name is None:
        try:
            find_among(INCEPTION, BACKBONES, backbones)
        except FeaturesError:
            return None
        name = INCEPTION
    file = Path(name)
    if file.is_file():
        named = [backbone for backbone in BACKBONES if belongs_to(file, backbone)]
        return load_network(named[0] if named else INCEPTION, file, device)
    return load_network(name, backbones, device)


def _protocols(name: str | None, sizes: str | None) -> list[Protocol]:
    if sizes is None:
        return [get(name or DEFAULT_PROTOCOL)]
    if name is not None:
        raise UsageError("--size is short for --protocol folder-N: give one of the two")
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 99999 for part in parts):
        raise UsageError(f"--size: expected sides in pixels separated by commas, like 256,512, got {sizes!r}")
    return [folder_of(int(part)) for part in dict.fromkeys(parts)]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the runs of all sizes share.

    Attributes:
        sources: the images.
        models: loaded.
        launch: this process among its like; the first one writes and prints.
        command: for the record.
        dataset: name of the images.
        n_shown: images in the report, at most.
        out: folder to write to.
    """

    sources: "Sequence[Source]"
    models: "Sequence[Autoencoder]"
    launch: "Launch"
    command: str
    dataset: str
    n_shown: int
    out: Path

    def __call__(self, how: "Recon", stem: str) -> int:
        """Measure under one protocol, write and print; return the exit code."""
        from eval.recon import run_recon
        from eval.recon_picture import write_picture
        from eval.report_runs import of_recon
        from eval.results import write_json

        result = run_recon(self.sources, self.models, how, self.launch, self.command, self.dataset)
        failed = result["failed"]
        if self.launch.index == 0:
            paths = [self.out / f"{stem}.json", self.out / f"{stem}.png"]
            paths.append(self.out / f"{stem.replace('recon', 'report')}.html")
            for path in paths:
                path.unlink(missing_ok=True)  # never that of an earlier run beside this one's
            if result["models"]:
                write_json(result, paths[0])
                missing = {failure["path"] for failure in failed}
                measured = [source for source in self.sources if str(source.path) not in missing]
                write_picture(measured, result["dataset"]["names"], self.models, how.protocol, paths[1])
                of_recon(result, measured, self.models, how.protocol, self.n_shown, paths[2])
                _print(result)
                for path in paths:
                    typer.echo(path)
            for failure in failed:
                error(failure["reason"])
            if failed:
                error(f"{len(failed)} of {len(self.sources)} images failed under {how.protocol.name}")
        # Only the first rank may fail: a launcher ends the others as soon as one does.
        return Exit.SOME_FAILED if failed and self.launch.index == 0 else Exit.OK


def _print(result: Mapping[str, Any]) -> None:
    """Print a table: a row for each measure, a column for each model; a value that does not exist is n/a."""
    control = ", ".join(
        f"{key} {value if isinstance(value, str) else format(value, '.4g')}"
        for key, value in result["control"]["measured"].items()
    )
    print(f"identity control, PNG round trip of {result['control']['n_images']} images: {control}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(120, 40 + 36 * len(result["models"]))  # rich would squeeze it into 80 columns
    dataset, protocol = result["dataset"], result["protocol"]
    print(
        f"{dataset['name']}: {dataset['n_images']} images, protocol {protocol['name']} {result['protocol_hash']}, "
        f"posterior {protocol['posterior']}"
    )
    table = Table()
    table.add_column("mean (95 % interval)")
    for model in result["models"]:
        table.add_column(escape(model["name"]), justify="right")
    network = result["feature_network"]["name"] if result["feature_network"] else None
    for label, cells in _lines(result["models"], network):
        table.add_row(label, *cells)
    console.print(table)
    for warning in result["models"][0]["distribution_warnings"]:  # of the number of images: the same for all models
        print(f"note: {warning}")
    for line in _partial_means(result):
        print(f"note: {line}")


def _partial_means(result: Mapping[str, Any]) -> Iterator[str]:
    from eval.metrics import KNOWN

    n_images = result["dataset"]["n_images"]
    for model in result["models"]:
        for key, n in model["n_values"].items():
            if n < n_images:
                yield (
                    f"{KNOWN[key].label} of {model['name']} is of {n} of {n_images} images: the others have a side "
                    f"below {KNOWN[key].least_side} pixels, or are infinite"
                )


def _lines(models: Sequence[Mapping[str, Any]], network: str | None) -> Iterator[tuple[str, list[str]]]:
    from eval.distribution import SET_METRICS
    from eval.metrics import KNOWN
    from eval.results import codebooks

    for key in models[0]["means"]:
        metric = KNOWN[key]
        label = f"{metric.label}{' ' * bool(metric.unit)}{metric.unit}"
        yield label, [_mean(model["means"][key], model["intervals"][key], metric.digits) for model in models]
        if key == "psnr":
            yield "  its std over images", [_value(model["psnr"]["std"], 2) for model in models]
            yield "  of the mean MSE", [_value(model["psnr"]["of_mean_mse"], 2) for model in models]
    for metric in SET_METRICS if network else ():
        yield (
            f"{metric.label} ({network})",
            [_value(model["distribution"][metric.key], metric.digits) for model in models],
        )
    for n, books in enumerate(zip_longest(*map(codebooks, models))):
        which = "codebook" if n == 0 else f"codebook {n + 1}"
        yield f"{which}: used of", [f"{book['n_used']} of {book['size']}" if book else "-" for book in books]
        yield f"{which}: perplexity", [_value(book["perplexity"], 1) if book else "-" for book in books]


def _value(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _mean(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if value is None or interval is None:
        return _value(value, digits)
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
