"""`codec-eval weights`: which backbones are on this machine, and how to get the others. Imports torch when it runs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from codec.console import Exit

# What trains on a backbone: options of a recipe.
LOSSES = {
    "squeezenet1_0": ["loss.perceptual = auto or sqz10"],
    "alexnet": ["loss.perceptual = lpips-alex"],
    "vgg16": ["loss.perceptual = lpips-vgg"],
    "transformers": ["latents.alignment"],
}


def weights_command(
    features: Annotated[
        Path | None,
        typer.Option(
            help="File or folder to look in, and only there; default $LATENT_CODEC_FEATURES, then torch hub's cache.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text; default off.")
    ] = False,
) -> int:
    """List the backbones of metrics and losses: found or not, where, their hash, who uses them, how to fetch them.

    Nothing is downloaded, here or anywhere: the commands shown are for you to run, once, where there is a network.

    Example: codec-eval weights --json
    """
    from eval.features import places_of_backbones

    rows = [*_classifiers(features), _transformers(features)]
    if as_json:
        places = [str(place) for place in places_of_backbones(features)]
        print(json.dumps({"kind": "weights", "looked_in": places, "backbones": rows}, indent=1))
    else:
        print("\n".join(line for row in rows for line in _lines(row)))
    return Exit.OK


def _classifiers(features: Path | None) -> Iterator[dict[str, Any]]:
    from eval.distribution import SET_METRICS
    from eval.features import BACKBONES, FeaturesError, find_among, places_of_backbones, sha256_of
    from eval.metrics import METRICS

    for name, backbone in BACKBONES.items():
        try:
            path = find_among(name, BACKBONES, features)
        except FeaturesError:
            path = None
        sha256 = sha256_of(path) if path else None
        yield {
            "name": name,
            "found": path is not None,
            "path": str(path) if path else None,
            "sha256": sha256,
            "intact": _intact(path, sha256) if path and sha256 and name == backbone.stem else None,
            "looked_in": [str(place) for place in places_of_backbones(features)],
            "looked_for": f"{backbone.stem}-*.pth or {name}.safetensors",
            "metrics": [metric.key for metric in METRICS if metric.backbone == name],
            "set_metrics": [metric.key for metric in SET_METRICS],
            "losses": LOSSES.get(name, []),
            "command": backbone.command,
        }


def _transformers(features: Path | None) -> dict[str, Any]:
    """Look for a vision model's folder: a place itself, or a folder in it."""
    from eval.distribution import SET_METRICS
    from eval.feature_networks import TRANSFORMERS_COMMAND
    from eval.features import places_of_backbones, sha256_of

    places = [place for place in places_of_backbones(features) if place.is_dir()]
    folders = [folder for place in places for folder in (place, *sorted(place.iterdir()))]
    needed = ("config.json", "preprocessor_config.json")
    path = next((folder for folder in folders if all((folder / name).is_file() for name in needed)), None)
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin")) if path else []
    return {
        "name": "transformers",
        "found": bool(files),
        "path": str(path) if files else None,
        "sha256": sha256_of(*files) if files else None,
        "intact": None,
        "looked_in": [str(place) for place in places_of_backbones(features)],
        "looked_for": f"a folder with {', '.join(needed)} and *.safetensors",
        "metrics": [],
        "set_metrics": [metric.key for metric in SET_METRICS],
        "losses": LOSSES["transformers"],
        "command": TRANSFORMERS_COMMAND,
    }


def _intact(path: Path, sha256: str) -> bool | None:
    """Whether a file has the hash that torch hub puts into names; None where the name has none."""
    named = re.fullmatch(r".*-([0-9a-f]{8})", path.stem)
    return sha256.startswith(named[1]) if named else None


def _lines(row: dict[str, Any]) -> Iterator[str]:
    if row["found"]:
        damaged = "  DAMAGED: not the hash that its name says" if row["intact"] is False else ""
        yield f"{row['name']:<14} found    {row['path']}{damaged}"
        yield f"               sha256   {row['sha256']}"
    else:
        yield f"{row['name']:<14} missing  {row['looked_for']}"
        yield f"               not in   {', '.join(row['looked_in'])}"
        yield f"               fetch    {row['command']}"
    yield f"               metrics  {', '.join(row['metrics'] + row['set_metrics'])}"
    if row["losses"]:
        yield f"               losses   {', '.join(row['losses'])}"
    yield ""
