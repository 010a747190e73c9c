"""`codec-eval generated`: a judge of samples. Imports torch only when it measures."""

import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from codec.console import Exit, error, note, progress
from eval import options

if TYPE_CHECKING:
    import numpy as np

    from eval.class_folders import Photo
    from eval.generated import Codec
    from eval.protocol import Protocol

GENERATED_JSON, NEAREST_PNG = "generated.json", "nearest.png"
NETWORK = "squeezenet1_0"
_PAIRS = 10  # in a line of the picture
_MOST = 20  # samples of a class in it
_SUSPICIOUS = 0.05  # of the samples, nearer to a training image than any held-out photograph is
_CHANCE = (
    4.0  # times what is expected of that share where samples are like held-out photographs: 1 / (their number + 1)
)


def generated_command(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="Folder of class folders of generated images, of any generator.")
    ],
    training: Annotated[
        Path, typer.Option("--train", metavar="DIR", help="Class folders of what the generator learned from.")
    ],
    held_out: Annotated[
        Path, typer.Option("--held-out", metavar="DIR", help="Class folders of photographs it has not seen.")
    ],
    out: options.Out,
    model: Annotated[
        Path | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="The autoencoder that decoded the samples: photographs go through it before they are compared.",
            show_default=False,
        ),
    ] = None,
    unconditional: Annotated[
        bool,
        typer.Option(
            "--unconditional",
            help="Samples have no classes: all images below the folders count alike, and nothing is said of classes.",
        ),
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Side in pixels that all images are prepared to.", show_default="the samples'"),
    ] = None,
    backbones: Annotated[
        Path | None,
        typer.Option(
            "--features",
            help="Weights of the feature network, a file or their folder; else $LATENT_CODEC_FEATURES and torch hub's "
            "cache are tried.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str,
        typer.Option(
            "--fid-network", help="Whose features: a classifier of torchvision, inception, or a transformers folder."
        ),
    ] = NETWORK,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda:1 ...")] = "auto",
) -> int:
    """Judge samples: do they show the class, are they like photographs, diverse, copies? generated.json.

    A linear probe on a frozen network's features, trained on the training photographs, is the judge; what it makes of
    held-out photographs through the same codec is what can be expected of samples. Writes nearest.png: each sample
    beside the training image nearest to it. With --unconditional there is no probe; Frechet distance and the other
    numbers of sets, diversity and nearest images are there.

    Examples: codec-eval generated samples --train clothing/train --held-out clothing/test -m runs/vq/model -o judged
    codec-eval generated drawn --unconditional --train clothing/train --held-out clothing/test -m runs/kl/model -o out
    """
    from codec import files
    from codec.engine import pick_device
    from eval.class_folders import side_of
    from eval.protocol import digest, folder_of
    from eval.results import header, write_json

    files.check_writable(out)
    given = {"model": model, "size": size, "features": backbones}
    command = ["codec-eval", "generated", str(samples), f"--train={training}", f"--held-out={held_out}"]
    command += [f"--{name}={value}" for name, value in given.items() if value is not None]
    command += ["--unconditional"] if unconditional else []
    command += [f"--fid-network={network}", f"--device={device}", f"--out={out}"]
    protocol = folder_of(size or side_of(samples, not unconditional))

    from eval.feature_networks import load_network
    from eval.generated import SETTINGS, UNCONDITIONAL, Images, judge

    where = str(pick_device(device))
    judged = load_network(network, backbones, where)
    codec, description = _codec(model, device)
    failed: list[str] = []
    read = _read(protocol, failed, not unconditional, samples, training, held_out)
    images = Images.unconditional(*read) if unconditional else Images.of(*read)
    found, nearest = judge(images, judged, codec, note)
    settings = {**SETTINGS, "network": judged.settings} | ({"unconditional": UNCONDITIONAL} if unconditional else {})
    document = protocol.document("generated", settings, model=description)
    names = {"samples": samples, "training": training, "held_out": held_out}
    result = {
        **header("generated", shlex.join(command)),
        "protocol": document,
        "protocol_hash": digest(document),
        "dataset": {key: {"folder": str(path), "n_images": len(getattr(images, key))} for key, path in names.items()},
        "classes": None if unconditional else list(images.classes),
        "feature_network": judged.about(),
        "model": description,
        **found,
        "failed": failed,
    }
    write_json(result, out / GENERATED_JSON)
    files.write_atomic(out / NEAREST_PNG, _picture(images.samples, nearest, images.classes))
    _print(result)
    for path in (out / GENERATED_JSON, out / NEAREST_PNG):
        typer.echo(path)
    for line in failed:
        error(line)
    return Exit.SOME_FAILED if failed else Exit.OK


def _codec(model: Path | None, device: str) -> "tuple[Codec | None, dict[str, Any] | None]":
    """Return what photographs go through, and what the result says of it."""
    if model is None:
        return None, None
    from codec.engine import EngineConfig
    from eval.autoencoder import load_all

    (loaded,) = load_all([model], EngineConfig(device=device, dtype="float32"))
    return (lambda key, pixels: loaded(key, pixels).x_hat), loaded.description()


def _read(protocol: "Protocol", failed: list[str], labelled: bool, *folders: Path) -> "Iterator[list[Photo]]":
    from eval.class_folders import listed, read_photos

    with progress() as bar:
        for folder in folders:
            task = bar.add_task(f"reading {folder.name}", total=len(listed(folder, labelled)))
            yield read_photos(folder, protocol, failed, partial(bar.advance, task, 1), labelled)


def _picture(samples: "list[Photo] | Any", nearest: "list[np.ndarray]", classes: Any) -> bytes:
    from eval.class_folders import by_class
    from eval.sheet import sheet

    rows = []
    for name, where in by_class(samples, classes).items():
        for start in range(0, min(len(where), _MOST), _PAIRS):
            some = where[start : min(start + _PAIRS, _MOST)]
            pairs = [pixels for n in some for pixels in (samples[n].pixels, nearest[n])]
            rows.append((name if start == 0 else "", pairs))
    return sheet(rows, "sample | nearest training image (through the codec, by features)", together=2)


def _print(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    table = Table(title=None)
    for name in ("", "samples", "to compare with"):
        table.add_column(name, justify="left" if not name else "right")
    for row in _lines(result):
        table.add_row(*row)
    console.print(table)
    for line in conclusions(result):
        print(line)


def _lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    through = "photographs, codec" if result["model"] else "photographs"
    if result["agreement"] is not None:
        yield "agreement with the class asked for", _told(result["agreement"]), f"A {_told(result['A'])}"
        yield "agreement / A", _told(result["agreement_of_A"]), f"chance / A {_share(result)}"
    if (passed := result["sets_through_codec"]) is not None:
        label = "Frechet distance to photographs, codec"
        yield label, _told(passed["samples"]["frechet"]), f"control {_told(passed['control']['frechet'])}"
    if result["sets"] is not None:
        for key, label in (("frechet", "Frechet distance to photographs"), *((key, key) for key in _NEIGHBOURS)):
            samples, control = (result["sets"][which][key] for which in ("samples", "control"))
            yield label, _told(samples), f"control {_told(control)}"
    diversity = result["diversity"]
    if diversity["ratio"] is not None:
        yield (
            f"diversity{'' if result['agreement'] is None else ' within a class'} ({through})",
            f"{diversity['samples']:.3f}",
            f"{diversity['photographs']:.3f}",
        )
    for key in ("features", "pixels"):
        nearest = result["nearest"][key]
        yield f"median nearest distance, {key} (held out)", _told(nearest["samples"]), _told(nearest["held_out"])


_NEIGHBOURS = ("precision", "recall", "density", "coverage")


def _share(result: Mapping[str, Any]) -> str:
    return f"{result['chance'] / result['A']['value']:.3f}" if result["A"]["value"] else "n/a"


def _told(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "n/a"
    low, high = score["interval"]
    return f"{score['value']:.3f} ({low:.3f} .. {high:.3f})"


def _copies(nearest: Mapping[str, Any], n_held_out: int) -> str:
    interval, share = nearest["ratio"]["interval"], nearest["share_nearer_than_any_held_out"]
    if share > max(_SUSPICIOUS, _CHANCE / (n_held_out + 1)):
        return (
            f"Copies are likely: {share:.0%} of the samples lie nearer to a training image than any held-out photo "
            "does: look at nearest.png."
        )
    if interval is not None and interval[1] < 1:
        by_class = nearest["ratio_by_class"]
        classes = "" if by_class is None else f", mean over classes {by_class:.2f}"
        return (
            f"Samples lie nearer to training images than held-out photographs do (ratio of medians "
            f"{nearest['ratio']['value']:.2f}{classes}): copies, or images that are more "
            f"ordinary than photographs, as guidance makes them; {share:.0%} lie nearer than any held-out photograph. "
            "Look at nearest.png."
        )
    return "Samples do not lie nearer to training images than held-out photographs do, beyond chance."


def conclusions(result: Mapping[str, Any]) -> list[str]:
    """Return plain sentences on what the numbers say and what they do not."""
    found = []
    by_class = result["agreement"] is not None
    ratio, a = (result[name]["value"] if by_class else None for name in ("agreement_of_A", "A"))
    if ratio is not None:
        found.append(
            f"The probe takes {result['agreement']['value']:.0%} of the samples for what was asked for, {ratio:.2f} of "
            f"what it reaches on held-out photographs ({a:.0%}; chance {result['chance']:.0%})."
        )
    found.append(_copies(result["nearest"]["features"], result["n_held_out"]))
    ratio = result["diversity"]["ratio"]
    if ratio is not None:
        where = "Within a class samples" if by_class else "Samples"
        found.append(f"{where} are {ratio:.2f} times as far apart as photographs.")
    if result["sets"] is None:
        found.append("Too few images to compare sets.")
    else:
        n = result["sets"]["n"]
        found.append(
            f"Sets: {n['samples']} samples, {n['control']} control images and {n['held_out']} photographs, "
            f"{n['features']} features. A Frechet distance is larger the fewer images it is of: compare it at equal "
            "numbers alone, and with the control."
        )
    says = "samples have a class's looks to a linear probe" if by_class else "samples as a set are like photographs"
    found.append(
        f"This says whether {says}, in these features. It does not say whether "
        "people find them good; a picture with the right texture may pass. Few samples and few photographs: mind the "
        "intervals."
    )
    return found
