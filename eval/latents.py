"""`codec-eval latents`: what a diffusion model would meet in an autoencoder's latent space, as one result.

    images, shared over ranks -> latent_measure -> gathered, in the images' order -> sections -> summary

Every number comes from per-image values that are put in order before they are added up, or from sums in float64: the
number of ranks does not matter. Entry: `run_latents`.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codec.console import progress, stderr
from codec.engine import Engine
from codec.errors import ModelError, UsageError
from codec.files import Source
from codec.latent_model import LatentModel
from codec.launch import Launch
from eval import latent_fp16, latent_grid, latent_posterior
from eval.latent_measure import Example, Job, LatentsConfig, Share, measure_share
from eval.latent_sections import sections
from eval.latent_words import summary_lines
from eval.results import finite, header

PROTOCOL = {
    "name": "latent-codec latents 1",
    "crop": "centre, size x size; smaller images are refused",
    "rounding": "8 bit RGB before every PSNR",
    "latents": "posterior mean, raw; normalized = (z - shift_factor) * scaling_factor of the model's config",
    "position": "one cell of the latent grid; every position of every image is one datum",
    "posterior": latent_posterior.RULE,
    "mutual_information": "lower: minibatch aggregate of sampled positions, at most ln M; upper: KL of the posteriors "
    "minus KL of the moment-matched Gaussian of the aggregate, both to N(0, I)",
    "spectrum": "Hann window, power averaged over rings; slope from k = 2 on, octaves weighted alike; high = from 0.25 "
    "cycles per sample on",
    "locality": "one cell changed by one normalized deviation per channel, signs at random; squared difference by "
    "Chebyshev distance from the cell's pixels",
    "fp16": latent_fp16.RULE,
}
_SMALLEST_GRID = 8


def check(model: LatentModel, folder: Path, size: int) -> None:
    """Check that a model's latents can be measured on crops of a size.

    Raises:
        ModelError: it has a codebook instead of a posterior, or no scaling_factor that latents could be normalized by.
        UsageError: the size does not suit the model.
    """
    if model.family == "vq":
        kind = type(model.network).__name__
        raise ModelError(f"{folder}: a {kind} has no posterior to measure; codec-eval recon reports its codebook")
    if not 0 < model.scaling_factor < math.inf:
        raise ModelError(f"{folder}: scaling_factor {model.scaling_factor}, expected a positive number")
    if size % model.f or size < _SMALLEST_GRID * model.f:
        least = _SMALLEST_GRID * model.f
        raise UsageError(f"--size {size}: expected a multiple of {model.f}, the model's f, of at least {least}")


def run_latents(
    engine: Engine,
    folder: Path,
    sources: Sequence[Source],
    config: LatentsConfig,
    launch: Launch,
    command: str = "",
) -> tuple[dict[str, Any], Example | None]:
    """Measure a model's latents on images. The engine's network is no longer accelerated afterwards.

    Args:
        engine: the model's.
        folder: it came from.
        sources: the images, all of them on every rank.
        config: what is measured.
        launch: this process among its like.
        command: the command line, for the record.

    Returns:
        The result, the same on every rank (without sections when no image could be measured), and the first image.

    Raises:
        ModelError, UsageError: see `check`.
    """
    check(engine.model, folder, config.size)
    start = time.perf_counter()
    names = [str(source.relative) for source in sources]
    if len(set(names)) < len(names):  # two folders may hold files of the same name
        names = [str(source.path) for source in sources]
    jobs = [Job(n, source.path, name) for n, (source, name) in enumerate(zip(sources, names, strict=True))]
    colours = list(enumerate(latent_grid.COLOURS))
    mine, my_colours = launch.share(jobs), launch.share(colours)
    weight = latent_fp16.largest_weight(engine.model.network)
    with progress(disable=not stderr.is_terminal) as bar:
        task = bar.add_task("latents", total=len(mine) + len(my_colours))
        share = measure_share(engine, mine, my_colours, len(jobs), config, lambda: bar.advance(task))
    whole = _merge(launch.gather(share))
    result = {
        **header("latents", command),
        "protocol": PROTOCOL,
        "settings": vars(config) | {"sigmas": list(config.sigmas)},
        "model": _model(engine, folder),
        "dataset": {
            "n_images": len(whole.records),
            "names": [record.row["image"] for record in whole.records],
            "sha256": hashlib.sha256("".join(record.sha256 for record in whole.records).encode()).hexdigest(),
            "sha256_of": "the SHA-256 of each crop's pixels, in hex, joined in this order",
        },
        "failed": [{key: failure[key] for key in ("image", "path", "reason")} for failure in whole.failed],
    }
    result["protocol_hash"] = _digest(PROTOCOL | result["settings"])
    if whole.records:
        result |= finite(sections(whole, engine.model, config))
        result["fp16"] = finite(latent_fp16.judge(whole.blocks, weight))
        result["summary"] = summary_lines(result)
        result["rows"] = [record.row for record in whole.records]
    result["time_s"] = time.perf_counter() - start
    return result, whole.example


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _merge(shares: Sequence[Share]) -> Share:
    """Join what all ranks measured, in the order of the images."""
    whole = shares[0]
    for share in shares[1:]:
        whole.tally.merge(share.tally)
        whole.records += share.records
        whole.failed += share.failed
        whole.colours += share.colours
        for block, value in share.blocks.items():
            whole.blocks[block] = max(whole.blocks.get(block, 0.0), value)
    whole.records.sort(key=lambda record: record.index)
    whole.failed.sort(key=lambda failure: failure["index"])
    whole.colours.sort(key=lambda numbered: numbered[0])
    examples = [share.example for share in shares if share.example is not None]
    whole.example = min(examples, key=lambda example: example.index) if examples else None
    return whole


def _model(engine: Engine, folder: Path) -> dict[str, Any]:
    model = engine.model
    return {
        "name": folder.resolve().name,
        "path": str(folder),
        "class": type(model.network).__name__,
        "family": model.family,
        "f": model.f,
        "channels": model.channels,
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        "decoder_id": engine.decoder_id,
        **engine.description(),
    }
