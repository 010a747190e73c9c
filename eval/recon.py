"""Reconstruction runs: every image through every autoencoder under one protocol, one JSON.

    images -> Protocol.prepare -> autoencoder -> 8 bits -> metrics -> rows -> means, intervals -> recon.json
    the same path first with a PNG round trip in the autoencoder's place: it must measure as perfect

Entry: `run_recon`. The result is the same on any number of ranks.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from codec.files import Source
from codec.index_maps import IndexMap
from codec.launch import Launch
from eval import bootstrap, control, distribution
from eval.autoencoder import PADDING, PngRoundTrip, Reconstruction, posterior_text
from eval.distribution import DistributionMetrics
from eval.feature_networks import FeatureNetwork
from eval.measure import Measured, over_images
from eval.metrics import Metrics
from eval.protocol import Protocol as ImageProtocol
from eval.protocol import digest
from eval.results import finite, header

Row = dict[str, Any]

CONTROL_IMAGES = 8  # enough to show a broken path
SELF_DISTANCES = ("rfid", "kid", "patch_fid", "patch_kid")
"""Metrics of two sets of images that are 0 for equal ones, whatever their number."""
_MEANS = "mean over images of per-image values; an image where a metric is undefined or infinite is left out of it"
_PSNR = "std: of the per-image values, over n; of_mean_mse: of the MSE over all pixels of all images"
_CODEBOOK = "usage: share of the K vectors chosen at least once in the set; perplexity: exp of the choice's entropy"


class Reconstructor(Protocol):
    """What is used of `eval.autoencoder.Autoencoder` for each image."""

    @property
    def name(self) -> str: ...
    @property
    def maps(self) -> tuple[IndexMap, ...]: ...
    def __call__(self, key: str, x: np.ndarray) -> Reconstruction: ...


class Model(Reconstructor, Protocol):
    """What is used of `eval.autoencoder.Autoencoder`."""

    def description(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Recon:
    """What is measured, and how.

    Attributes:
        protocol: how the images are prepared.
        metrics: of each pair of images.
        network: on whose features the metrics of sets of images are computed; None = no such metrics.
        posterior: what the models were loaded with.
        seed: of the posterior's noise.
    """

    protocol: ImageProtocol
    metrics: Metrics
    network: FeatureNetwork | None = None
    posterior: str = "mode"
    seed: int = 0

    def document(self) -> dict[str, Any]:
        """Return all that decides the numbers, see `eval.protocol.Protocol.document`."""
        settings = {**self.metrics.settings(), **(distribution.settings(self.network) if self.network else {})}
        further = {"posterior": posterior_text(self.posterior, self.seed), "padding": PADDING, "means": _MEANS}
        return self.protocol.document("recon", settings, **further, psnr=_PSNR, codebook=_CODEBOOK)


@dataclass
class _Tally:
    """What is summed up of one model over the images.

    Attributes:
        distribution: metrics of the whole set; None = none.
        counts: for each index map (K,) int64, how often each codebook vector was chosen; empty without a codebook.
    """

    distribution: DistributionMetrics | None
    counts: list[np.ndarray]

    def add(self, key: str, x: np.ndarray, found: Reconstruction) -> None:
        if self.distribution is not None:
            self.distribution.update(key, x, found.x_hat)
        for counts, grid in zip(self.counts, found.indices, strict=True):
            counts += np.bincount(grid.ravel(), minlength=len(counts))

    def gather(self, launch: Launch) -> None:
        """Make it that of all ranks together, on every rank."""
        if self.distribution is not None:
            self.distribution.merge(launch.gather(self.distribution.state()))
        if self.counts:
            self.counts = [np.sum(every, axis=0) for every in zip(*launch.gather(self.counts), strict=True)]


def run_recon(
    sources: Sequence[Source],
    models: Sequence[Model],
    how: Recon,
    launch: Launch | None = None,
    command: str = "",
    dataset: str = "images",
) -> dict[str, Any]:
    """Measure what autoencoders make of images.

    An image that cannot be read, reconstructed or measured for one model counts for none: it is listed in "failed".

    Args:
        sources: the images, from `codec.files.find`, the same on every rank.
        models: loaded for `how`.
        how: what is measured.
        launch: this process among its like; None = alone.
        command: the command line, for the record.
        dataset: a name for titles.

    Returns:
        The content of recon.json, the same on every rank; a value that does not exist (or an infinite PSNR) is None.
        Without one measured image "control" is None, and "models" is empty.

    Raises:
        UsageError: a named set is there only in part; or the identity control measured less than perfect.
        ModelError: from a model.
    """
    launch = launch or Launch()
    how.protocol.check_count(len(sources))
    checked = run_control(sources, how, launch)
    tallies, measured = _measure(sources, models, how, launch, "reconstruct")
    document = how.document()
    by_image = list(zip(measured.names, measured.values, strict=True))
    entries = [
        _entry(model, [{"image": name, **values[index]} for name, values in by_image], tally)
        for index, (model, tally) in enumerate(zip(models, tallies, strict=True))
        if by_image
    ]
    result: dict[str, Any] = finite(
        {
            **header("recon", command),
            "protocol": document,
            "protocol_hash": digest(document),
            "dataset": measured.dataset(dataset),
            "weights": how.metrics.weights(),
            "feature_network": how.network.about() if how.network else None,
            "absent": how.metrics.absent,
            "intervals": bootstrap.SETTINGS,
            "control": checked,
            "models": entries,
            "failed": measured.failed,
        }
    )
    return result


def run_control(sources: Sequence[Source], how: Recon, launch: Launch) -> dict[str, Any] | None:
    """Measure a PNG round trip on the first images that can be read, in place of an autoencoder.

    Returns:
        What was measured, for the record; None if no image can be read.

    Raises:
        UsageError: it does not come out as perfect, so nothing that is measured here could be trusted.
    """
    anyhow = replace(how, protocol=replace(how.protocol, n_images=0))  # a part of a named set serves here
    for start in range(0, len(sources), CONTROL_IMAGES):
        chosen = sources[start : start + CONTROL_IMAGES]
        (tally,), measured = _measure(chosen, [PngRoundTrip()], anyhow, launch, "identity control")
        if measured.names:
            break
    else:
        return None
    rows = [values[0] for values in measured.values]
    values = {key: [row[key] for row in rows] for key in how.metrics.settings()}
    values |= {key: [value] for key, value in _of_set(tally).items() if key in SELF_DISTANCES}
    return control.check(values)


def _measure(
    sources: Sequence[Source], models: Sequence[Reconstructor], how: Recon, launch: Launch, title: str
) -> tuple[list[_Tally], Measured[list[Row]]]:
    """Return a tally of all ranks' images for each model, and the rows: for each image one per model."""
    tallies = [
        _Tally(
            DistributionMetrics(how.network) if how.network else None,
            [np.zeros(each.codebook_size, np.int64) for each in model.maps],
        )
        for model in models
    ]

    def work(name: str, x: np.ndarray) -> list[Row]:
        found = [model(name, x) for model in models]
        rows = [_row(x, one.x_hat, how.metrics) for one in found]
        for tally, one in zip(tallies, found, strict=True):  # last: an image counts for all models or for none
            tally.add(name, x, one)
        return rows

    measured = over_images(sources, how.protocol, work, launch, title)
    for tally in tallies:
        tally.gather(launch)
    return tallies, measured


def _row(x: np.ndarray, x_hat: np.ndarray, metrics: Metrics) -> Row:
    height, width = x.shape[:2]
    mse = float(np.mean((x.astype(np.float64) - x_hat) ** 2))
    return {"height": height, "width": width, "mse": mse, **metrics(x, x_hat)}


def _entry(model: Model, rows: list[Row], tally: _Tally) -> dict[str, Any]:
    keys = [key for key in rows[0] if key not in ("image", "height", "width", "mse")]
    entry: dict[str, Any] = {"name": model.name, "description": model.description()}
    entry["means"], about_means = bootstrap.means(rows, keys)
    entry |= about_means
    entry["psnr"] = _psnr([row["psnr"] for row in rows if math.isfinite(row.get("psnr", math.inf))], rows)
    entry["distribution"] = _of_set(tally)
    about = tally.distribution.about() if tally.distribution else {"warnings": []}
    entry["distribution_counts"] = {key: value for key, value in about.items() if key.startswith("n_")}
    entry["distribution_warnings"] = about["warnings"]
    books = [codebook(counts) for counts in tally.counts]
    entry["codebook"] = books[0] if len(books) == 1 else None
    if len(books) > 1:
        entry["codebooks"] = books
    entry["rows"] = rows
    return entry


def _of_set(tally: _Tally) -> dict[str, float | None]:
    return {} if tally.distribution is None else tally.distribution.compute()


def _psnr(decibels: Sequence[float], rows: Sequence[Row]) -> dict[str, float | None]:
    n_pixels = [row["height"] * row["width"] for row in rows]
    mse = math.fsum(row["mse"] * n for row, n in zip(rows, n_pixels, strict=True)) / sum(n_pixels)
    return {
        "std": statistics.pstdev(decibels) if decibels else None,
        "of_mean_mse": 10 * math.log10(255**2 / mse) if mse else None,
    }


def codebook(counts: np.ndarray) -> dict[str, Any]:
    """Return how a codebook is used: (K,) counts -> K, used vectors, their share, and perplexity in [1, K]."""
    p = counts[counts > 0] / counts.sum()
    return {
        "size": len(counts),
        "n_used": len(p),
        "usage": len(p) / len(counts),
        "perplexity": float(np.exp(-(p * np.log(p)).sum())),
        "n_indices": int(counts.sum()),
    }
