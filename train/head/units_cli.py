"""`codec-train head anomaly` and `features`: what units and likelihoods say of images. Imports torch when it works."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec import options
from codec.console import note
from codec.errors import UsageError
from codec.files import check_writable, write_atomic
from train.head import tools
from train.sample_folder import ANY

if TYPE_CHECKING:
    import numpy as np
    import torch

    from eval.class_folders import Photo
    from eval.feature_networks import FeatureNetwork

NETWORK = "squeezenet1_0"
_SHOWN = 8  # images in a row of the picture
_SUFFIXES = (".npz", ".safetensors")


def anomaly_command(
    head: tools.HeadPath,
    images: tools.Sources,
    model: tools.Model,
    out: tools.Out,
    outlier: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Name of folders whose images are outliers; may be repeated."),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Folders are classes: outliers are those that the head does not know.")
    ] = False,
    asked: tools.As = ANY,
    draws: Annotated[
        int, typer.Option(min=1, help="Of each posterior, for the ELBO; of a flow-matching decoder's noise.")
    ] = 16,
    backbones: Annotated[
        Path | None,
        typer.Option(
            "--features",
            help="Weights of the feature network, a file or their folder; else $LATENT_CODEC_FEATURES and torch hub's "
            "cache are tried, and without them there is no distance of features.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str, typer.Option(help="Whose features: a classifier of torchvision, inception, or a transformers folder.")
    ] = NETWORK,
    seed: tools.Seed = 0,
    flow_steps: tools.FlowSteps = None,
    device: options.Device = "auto",
) -> int:
    """Score how unusual images are to a head, in three ways: anomaly.json, anomaly.csv, extremes.png.

    latent_error: of the decoder's mean, in latents; elbo_bits: a bound of -log2 p(z|c) per number of a latent;
    feature_distance: between an image through the codec and its reconstruction. With labels the AUROC of each score.

    Example: codec-train head anomaly runs/head photos -m runs/first/model -o unusual --outlier shoe
    """
    check_writable(out)

    from eval.results import write_json
    from eval.sheet import sheet
    from train.head.anomaly import SCORES, elbo_bits, expected, feature_distances, latent_errors

    both = tools.open_both(head, model, device, flow_steps)
    condition = both.condition(asked, "--as")
    looked = _network(network, backbones, both)
    failed: list[str] = []
    photos = tools.read_images(images, both.head.size, failed)
    kinds = _kinds(photos, outlier or [], labels, both.head.classes)
    n = len(photos)
    c, z = [condition] * n, both.latents(photos)
    z_hat = both.head.reconstruct(z, c, seed=seed, numbers=[0] * n)
    remade = both.images(z_hat)
    found: dict[str, Any] = dict.fromkeys(SCORES)
    found["latent_error"] = latent_errors(both.head, z, expected(both.head, z, c, draws, seed))
    found["elbo_bits"] = elbo_bits(both.head, z, c, draws, seed)
    if looked is not None:
        found["feature_distance"] = feature_distances(looked, both.images(z), remade)
    given = {"out": out, "outlier": outlier, "labels": labels, "as": asked, "draws": draws, "features": backbones}
    given |= {"network": network, "seed": seed, "flow-steps": flow_steps}
    about = both.about("anomaly", [head, *images, "-m", model], given)
    about["features"] = None if looked is None else looked.about()
    about["auroc"] = _areas(found, kinds)
    columns = {name: [None] * n if values is None else values.tolist() for name, values in found.items()}
    rows: list[dict[str, Any]] = [{"image": photo.key, "folder": photo.label} for photo in photos]
    for number, row in enumerate(rows):
        row |= {} if kinds is None else {"outlier": kinds[number]}
        row |= {name: values[number] for name, values in columns.items()}
    write_json({**about, "images": rows, "failed": failed}, out / "anomaly.json")
    write_atomic(out / "anomaly.csv", _table(rows))
    write_atomic(out / "extremes.png", sheet(_extremes(found, photos, remade), "image and reconstruction", together=2))
    for name in SCORES:
        print(_told(name, found[name], about["auroc"]))
    print(out / "anomaly.csv")
    return tools.exit_of(failed, n)


def features_command(
    head: tools.HeadPath,
    images: tools.Sources,
    model: tools.Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help=f"With suffix {' or '.join(_SUFFIXES)}.")],
    asked: tools.As = ANY,
    device: options.Device = "auto",
) -> int:
    """Write the units of images, the posteriors' means, with the images' names; beside the file a JSON.

    units: (N, U); units_2: (N, U2, h2, w2) of a second level. An .npz file has `names` and `folders` as arrays, a
    .safetensors file as JSON lists in its metadata.

    Example: codec-train head features runs/head photos -m runs/first/model -o units.npz
    """
    if out.suffix not in _SUFFIXES:
        raise UsageError(f"{out}: expected a name with suffix {' or '.join(_SUFFIXES)}")
    check_writable(out.parent)

    from eval.results import write_json

    both = tools.open_both(head, model, device)
    condition = both.condition(asked, "--as")
    failed: list[str] = []
    photos = tools.read_images(images, both.head.size, failed)
    units = both.head.encode(both.latents(photos), [condition] * len(photos))
    tensors = {f"units_{level + 1}" if level else "units": part.cpu() for level, part in enumerate(units)}
    text = {"names": [photo.key for photo in photos], "folders": [photo.label for photo in photos]}
    about = both.about("features", [head, *images, "-m", model], {"out": out, "as": asked})
    write_atomic(out, _npz(tensors, text) if out.suffix == ".npz" else _safetensors(tensors, text, about))
    shapes = {name: list(part.shape) for name, part in tensors.items()}
    write_json({**about, "shapes": shapes, **text, "failed": failed}, out.with_suffix(".json"))
    print(f"{out}: {shapes}")
    return tools.exit_of(failed, len(photos))


def _npz(tensors: "Mapping[str, torch.Tensor]", text: Mapping[str, Sequence[str]]) -> bytes:
    import numpy as np

    file = io.BytesIO()
    arrays: dict[str, Any] = {name: part.numpy() for name, part in tensors.items()}
    arrays |= {name: np.array(words) for name, words in text.items()}
    np.savez(file, **arrays)
    return file.getvalue()


def _safetensors(
    tensors: "Mapping[str, torch.Tensor]", text: Mapping[str, Sequence[str]], about: Mapping[str, Any]
) -> bytes:
    from safetensors.torch import save

    metadata = {name: json.dumps(list(words)) for name, words in text.items()}
    metadata |= {"head_id": about["head"]["head_id"], "encoder_id": about["model"]["encoder_id"]}
    found: bytes = save({name: part.contiguous() for name, part in tensors.items()}, metadata)
    return found


def _network(name: str, place: Path | None, both: tools.Opened) -> "FeatureNetwork | None":
    """Return the feature network; None, with a note, where none was asked for and none can be used."""
    from eval.feature_networks import load_network
    from eval.features import FeaturesError

    side = min(both.head.size)
    try:
        found = load_network(name, place, str(both.head.device))
        if side < found.least_side:
            raise FeaturesError(f"{side} pixels: {found.name} takes images from {found.least_side} pixels on")
        return found
    except FeaturesError as exception:
        if place is not None:
            raise
        note(f"note: feature_distance: n/a: {exception}")
        return None


def _kinds(
    photos: "Sequence[Photo]", outlier: Sequence[str], labels: bool, classes: Sequence[str]
) -> list[bool] | None:
    """Return which images are outliers; None where nobody says so."""
    if not outlier and not labels:
        return None
    folders = {photo.label for photo in photos}
    if missing := sorted(set(outlier) - folders):
        raise UsageError(
            f"--outlier {missing[0]}: no image in a folder of that name, only in {', '.join(sorted(folders))}"
        )
    kinds = [photo.label in outlier if outlier else photo.label not in classes for photo in photos]
    if len(set(kinds)) < 2:
        what = "all images are outliers" if kinds[0] else "no image is an outlier"
        raise UsageError(f"labels: {what}: folders {', '.join(sorted(folders))}, expected some of both kinds")
    return kinds


def _areas(found: Mapping[str, Any], kinds: list[bool] | None) -> dict[str, float | None] | None:
    from train.head.anomaly import auroc

    if kinds is None:
        return None
    return {name: None if values is None else auroc(values, kinds) for name, values in found.items()}


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as CSV; what there is not stays empty."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", errors="surrogateescape")


def _extremes(
    found: Mapping[str, Any], photos: "Sequence[Photo]", remade: "Sequence[np.ndarray]"
) -> "list[tuple[str, list[np.ndarray]]]":
    rows = []
    for name, values in found.items():
        if values is None:
            continue
        order = values.argsort(kind="stable")
        short = name.partition("_")[0]
        for what, some in (("high", order[::-1]), ("low", order)):
            rows.append((f"{short} {what}", [each for n in some[:_SHOWN] for each in (photos[n].pixels, remade[n])]))
    return rows


def _told(name: str, values: Any, areas: Mapping[str, float | None] | None) -> str:
    """Return a line about a score, for the user."""
    if values is None:
        return f"{name}: n/a"
    area = "" if areas is None else f", AUROC {areas[name]:.3f}"
    return f"{name}: {values.min():.4g} to {values.max():.4g}{area}"
