"""Rate-distortion runs: every image through every codec at every quality, real files, one JSON.

    images -> Protocol.prepare -> encode (whole file) -> decode -> metrics -> rows -> means at each quality -> rd.json
    the same path first with PNG in a codec's place: it must measure as perfect

Entry: `run_rd`. Models are anything with the interface of `codec.Codec`. The result is the same on any number of ranks,
times excepted.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from codec import images
from codec.errors import ModelError
from codec.files import Source
from codec.launch import Launch
from eval import bootstrap, control, curves
from eval.baselines import Baseline
from eval.measure import over_images
from eval.metrics import Metrics
from eval.protocol import Protocol as ImageProtocol
from eval.protocol import digest
from eval.results import finite, header

Row = dict[str, Any]

CONTROL_IMAGES = 2
_TIMES = ("encode_s", "decode_s")
_KL = ("kl_nats", "kl_bpp")
_SETTINGS = {
    "bpp": "8 * bytes of the whole file / (H * W of the prepared image)",
    "points": "mean over images of per-image values at constant quality; an image where a metric is undefined or "
    "infinite is left out of its mean",
    "times": "median over images of one call in memory, network and coder together, reading and writing of files not "
    "included; nothing else of the process runs meanwhile; models on all of torch's threads, classical codecs on one, "
    "or as many as their flags say",
    "kl": "KL(q(z|x) || N(0, I)) of the posterior, sum over all latents: nats per image, and bits per pixel",
}


class Model(Protocol):
    """What is used of `codec.Codec`."""

    @property
    def name(self) -> str: ...
    @property
    def has_quality(self) -> bool: ...

    def description(self) -> dict[str, Any]: ...
    def encode(self, image: np.ndarray, quality: int | None = 50) -> bytes: ...
    def encode_many(self, image: np.ndarray, qualities: Sequence[int | None]) -> list[bytes]: ...
    def decode(self, data: bytes) -> np.ndarray: ...
    def reconstruct(self, image: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class RateDistortion:
    """What is measured, and how.

    Attributes:
        protocol: how the images are prepared.
        metrics: of each pair of images.
        models: codecs, measured at `qualities` and without quantisation (their ceiling).
        qualities: of the models, 0 coarsest to 100 finest; a VQ model, whose quality is its own, is one point.
        baselines: each measured at its own qualities.
        stored: curves read from files, see `eval.stored_curves.read`; compared and drawn, not measured.
        anchor: the codec that others are compared with; None = see `eval.curves.pick_anchor`.
    """

    protocol: ImageProtocol
    metrics: Metrics
    models: Sequence[Model] = ()
    qualities: Sequence[int] = ()
    baselines: Sequence[Baseline] = ()
    stored: Sequence[Mapping[str, Any]] = ()
    anchor: str | None = None

    def document(self) -> dict[str, Any]:
        """Return all that decides the numbers, see `eval.protocol.Protocol.document`."""
        return self.protocol.document("rd", self.metrics.settings(), **_SETTINGS)


@dataclass
class _Entry:
    """One codec of a run, with what was measured of it."""

    name: str
    label: str
    kind: str  # "model" or "baseline"
    info: dict[str, Any]
    qualities: Sequence[int | None]
    encode: Callable[[np.ndarray, Any], bytes]
    decode: Callable[[bytes], np.ndarray]
    model: Model | None = None
    rows: list[Row] = field(default_factory=list)
    ceiling_rows: list[Row] = field(default_factory=list)

    def measure(self, name: str, image: np.ndarray, metrics: Metrics) -> tuple[list[Row], list[Row]]:
        """Return one row per quality, and the ceiling's row of a model (the autoencoder without quantisation).

        A VQ model, which nothing else quantises, has no ceiling beside its one point.
        """
        height, width = image.shape[:2]
        about = {"image": name, "height": height, "width": width}
        rows: list[Row] = []
        ceiling: list[Row] = []
        x_hats: list[np.ndarray] = []
        if self.model is not None and self.model.has_quality:
            ceiling.append(about | _kl(self.model, image))
            x_hats.append(self.model.reconstruct(image))
        for quality in self.qualities:
            start = time.perf_counter()
            data = self.encode(image, quality)
            encoded = time.perf_counter()
            decoded = self.decode(data)
            end = time.perf_counter()
            row = {**about, "quality": quality, "size_bytes": len(data), "bpp": 8 * len(data) / (height * width)}
            rows.append(row | {"encode_s": encoded - start, "decode_s": end - encoded})
            x_hats.append(decoded)
        # Only now, when no codec is timed any more.
        measured = metrics.many(image, x_hats)
        found = [row | values for row, values in zip([*ceiling, *rows], measured, strict=True)]
        return found[len(ceiling) :], found[: len(ceiling)]

    def result(self, keys: Sequence[str]) -> dict[str, Any]:
        points = []
        for quality in self.qualities:
            rows = [row for row in self.rows if row["quality"] == quality]
            if rows:
                times = {key: statistics.median(row[key] for row in rows) for key in _TIMES}
                points.append({"quality": quality, **_means(rows, ["bpp", *keys]), **times})
        return {
            "name": self.name,
            "label": self.label,
            "kind": self.kind,
            **self.info,
            "points": points,
            "ceiling": _means(self.ceiling_rows, [*keys, *_KL]) if self.ceiling_rows else None,
            "rows": self.rows,
            "ceiling_rows": self.ceiling_rows,
        }


def run_rd(
    sources: Sequence[Source],
    how: RateDistortion,
    launch: Launch | None = None,
    command: str = "",
    dataset: str = "images",
) -> dict[str, Any]:
    """Measure models and baselines on images.

    An image that cannot be read, coded or measured by one codec counts for none: it is listed in "failed".

    Args:
        sources: the images, from `codec.files.find`, the same on every rank.
        how: what is measured.
        launch: this process among its like; None = alone.
        command: the command line, for the record.
        dataset: a name for titles.

    Returns:
        The content of rd.json, the same on every rank; a value that does not exist (or an infinite PSNR) is None.

    Raises:
        UsageError: a named set is there only in part; no codec has the anchor's name; or the identity control measured
            less than perfect.
        ModelError: from a model; no other error of a single image is raised.
    """
    launch = launch or Launch()
    how.protocol.check_count(len(sources))
    entries = [_of_model(model, how.qualities) for model in how.models]
    entries += [_of_baseline(baseline) for baseline in how.baselines]
    stored = [dict(curve) for curve in how.stored]
    _name_apart(entries, stored)
    kinds = [(entry.name, entry.kind) for entry in entries] + [(curve["name"], "file") for curve in stored]
    anchor = curves.pick_anchor(kinds, how.anchor)
    checked = _control(sources, how, launch)

    def work(name: str, x: np.ndarray) -> list[tuple[list[Row], list[Row]]]:
        found = []
        for entry in entries:
            try:
                found.append(entry.measure(name, x, how.metrics))
            except ModelError:
                raise
            except (ValueError, OSError, RuntimeError, MemoryError) as exception:
                raise RuntimeError(f"{entry.name}: {str(exception) or type(exception).__name__}") from exception
        return found

    measured = over_images(sources, how.protocol, work, launch)
    for values in measured.values:
        for entry, (rows, ceiling) in zip(entries, values, strict=True):
            entry.rows += rows
            entry.ceiling_rows += ceiling
    keys = [metric.key for metric in how.metrics.list]
    for curve in stored:
        curve["points"] = [dict.fromkeys([*keys, *_TIMES]) | point for point in curve["points"]]
    codecs = [*(entry.result(keys) for entry in entries), *stored]
    document = how.document()
    result: dict[str, Any] = finite(
        {
            **header("rd", command),
            "n_ranks": launch.count,
            "protocol": document,
            "protocol_hash": digest(document),
            "dataset": measured.dataset(dataset),
            "weights": how.metrics.weights(),
            "absent": how.metrics.absent,
            "undefined": _undefined(entries, how.metrics),
            "intervals": bootstrap.SETTINGS,
            "control": checked,
            "codecs": codecs,
            "comparisons": curves.compare(finite(codecs), how.metrics.list, anchor),
            "failed": measured.failed,
        }
    )
    return result


def _of_model(model: Model, qualities: Sequence[int]) -> _Entry:
    info = {"description": model.description()}
    its_own: Sequence[int | None] = qualities if model.has_quality else [None]
    return _Entry(model.name, model.name, "model", info, its_own, model.encode, model.decode, model)


def _of_baseline(baseline: Baseline) -> _Entry:
    info, qualities = {"flags": baseline.flags}, baseline.qualities
    return _Entry(baseline.name, baseline.label, "baseline", info, qualities, baseline.encode, baseline.decode)


def _name_apart(entries: Sequence[_Entry], stored: Sequence[dict[str, Any]]) -> None:
    """Give later codecs of the same name a number: two folders, or a file of a baseline, may be called alike."""
    seen: list[str] = []
    for entry in entries:
        seen.append(entry.name)
        if seen.count(entry.name) > 1:
            entry.label = entry.name = f"{entry.name} ({seen.count(entry.name)})"
    for curve in stored:
        seen.append(curve["label"])
        number = f" ({count})" if (count := seen.count(curve["label"])) > 1 else ""
        curve["name"] = curve["label"] = curve["label"] + number


def _control(sources: Sequence[Source], how: RateDistortion, launch: Launch) -> dict[str, Any] | None:
    """Measure PNG as a codec on the first images that can be read; None if there is none. Raises UsageError."""

    def encode(image: np.ndarray, quality: int) -> bytes:
        return images.save_png(image, compress_level=1)

    png = _Entry("png", "PNG", "control", {}, [0], encode, lambda data: images.load(data, name="identity control"))
    protocol = replace(how.protocol, n_images=0)  # a part of a named set serves here
    for start in range(0, len(sources), CONTROL_IMAGES):

        def work(name: str, x: np.ndarray) -> Row:
            ((row,), _) = png.measure(name, x, how.metrics)
            return row

        chosen = sources[start : start + CONTROL_IMAGES]
        measured = over_images(chosen, protocol, work, launch, "identity control")
        if measured.values:
            return control.check({key: [row[key] for row in measured.values] for key in how.metrics.settings()})
    return None


def _kl(model: Model, image: np.ndarray) -> Row:
    """Return the information in the posterior of one image; None for both where there is no variance.

    Where the image would go through the network in tiles only, it is None too: the posterior is not looked at in tiles.
    """
    from codec.runtime import Codec
    from codec.statistics import LatentStatistics

    nothing = dict.fromkeys(_KL)
    if not isinstance(model, Codec) or model.model.family != "kl":
        return nothing
    height, width = image.shape[:2]
    if not model.engine.fits(height, width, "encode"):
        return nothing
    tally = LatentStatistics(model.model.channels)
    tally.update(model.engine.posterior(image))
    summary = tally.summary()
    nats = float(summary.kl_nats.sum()) * summary.n_positions
    return {"kl_nats": nats, "kl_bpp": nats / math.log(2) / (height * width)}


def _undefined(entries: Sequence[_Entry], metrics: Metrics) -> dict[str, Any]:
    """Return the metrics that some images are too small for: how many, and the least side in pixels."""
    rows = next((entry.rows or entry.ceiling_rows for entry in entries), [])
    sides = {row["image"]: min(row["height"], row["width"]) for row in rows}
    small = {metric: sum(side < metric.least_side for side in sides.values()) for metric in metrics.list}
    return {metric.key: {"n_images": n, "least_side": metric.least_side} for metric, n in small.items() if n}


def _means(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, Any]:
    means, about = bootstrap.means(rows, keys)
    return means | about
