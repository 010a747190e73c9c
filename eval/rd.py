"""Rate-distortion runs: every image through every codec at every quality, real files, one JSON.

    images -> encode (whole file) -> decode -> metrics -> rows -> means at constant quality -> rd.json, plots, picture

Entry: `run_rd`. Models are anything with the interface of `codec.Codec`.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from codec import images
from codec.console import progress, stderr
from codec.errors import ModelError
from codec.files import Source, write_atomic
from eval.baselines import Baseline
from eval.environment import commit, hardware, versions
from eval.metrics import METRICS, SETTINGS, Metrics

if TYPE_CHECKING:
    from eval.features import Distance

Row = dict[str, Any]

PROTOCOL = {
    "name": "latent-codec rd 1",
    "crop": "none",
    "rounding": "8 bit RGB",
    "bpp": "8 * bytes of the whole file / (H * W of the original image)",
    "points": "mean over images of per-image values at constant quality; an image where a metric is undefined or "
    "infinite is left out of its mean",
    "times": "median over images of one call in memory, reading and writing of files not included",
    "metrics": SETTINGS,
}
PROTOCOL_HASH = hashlib.sha256(json.dumps(PROTOCOL, sort_keys=True).encode()).hexdigest()[:16]


class Model(Protocol):
    """What is used of `codec.Codec`."""

    @property
    def name(self) -> str: ...

    def description(self) -> dict[str, Any]: ...
    def encode(self, image: np.ndarray, quality: int = 50) -> bytes: ...
    def encode_many(self, image: np.ndarray, qualities: Sequence[int]) -> list[bytes]: ...
    def decode(self, data: bytes) -> np.ndarray: ...
    def reconstruct(self, image: np.ndarray) -> np.ndarray: ...


@dataclass
class _Entry:
    """One codec of a run, with what was measured of it."""

    name: str
    label: str
    kind: str  # "model" or "baseline"
    info: dict[str, Any]
    qualities: Sequence[int]
    encode: Callable[[np.ndarray, int], bytes]
    decode: Callable[[bytes], np.ndarray]
    reconstruct: Callable[[np.ndarray], np.ndarray] | None
    rows: list[Row] = field(default_factory=list)
    ceiling_rows: list[Row] = field(default_factory=list)

    def measure(self, name: str, image: np.ndarray, metrics: Metrics) -> tuple[list[Row], list[Row]]:
        """Return one row per quality, and the ceiling's row of a model (the autoencoder without quantisation)."""
        height, width = image.shape[:2]
        rows: list[Row] = []
        ceiling: list[Row] = []
        if self.reconstruct:
            ceiling.append({"image": name} | metrics(image, self.reconstruct(image)))
        for quality in self.qualities:
            start = time.perf_counter()
            data = self.encode(image, quality)
            encoded = time.perf_counter()
            decoded = self.decode(data)
            end = time.perf_counter()
            row = {"image": name, "height": height, "width": width, "quality": quality, "size_bytes": len(data)}
            row |= {"bpp": 8 * len(data) / (height * width)} | metrics(image, decoded)
            rows.append(row | {"encode_s": encoded - start, "decode_s": end - encoded})
        return rows, ceiling

    def result(self) -> dict[str, Any]:
        points = []
        for quality in self.qualities:
            rows = [row for row in self.rows if row["quality"] == quality]
            if rows:
                times = {key: statistics.median(row[key] for row in rows) for key in ("encode_s", "decode_s")}
                points.append({"quality": quality, "bpp": _mean(rows, "bpp")} | _means(rows) | times)
        return {
            "name": self.name,
            "label": self.label,
            "kind": self.kind,
            **self.info,
            "points": points,
            "ceiling": _means(self.ceiling_rows) if self.ceiling_rows else None,
            "rows": self.rows,
            "ceiling_rows": self.ceiling_rows,
        }


def run_rd(
    sources: Sequence[Source],
    models: Sequence[Model],
    baselines: Sequence[Baseline],
    qualities: Sequence[int],
    features: "Distance | None" = None,
    command: str = "",
    dataset: str = "images",
) -> dict[str, Any]:
    """Measure models and baselines on images.

    An image that cannot be read, coded or measured by one codec counts for none: it is listed in "failed".

    Args:
        sources: the images, from `codec.files.find`.
        models: codecs, measured at `qualities` and without quantisation (their ceiling).
        baselines: each measured at its own qualities.
        qualities: of the models, 0 coarsest to 100 finest.
        features: the `lpips-sqz10` distance; None leaves that metric null.
        command: the command line, for the record.
        dataset: a name for titles.

    Returns:
        The content of rd.json; a value that does not exist (or an infinite PSNR) is None.

    Raises:
        ModelError: from a model; no other error of a single image is raised.
    """
    entries = [_of_model(model, qualities) for model in models] + [_of_baseline(baseline) for baseline in baselines]
    for index, entry in enumerate(entries):  # two folders may have the same name
        count = sum(other.name == entry.name for other in entries[:index])
        if count:
            entry.label = entry.name = f"{entry.name} ({count + 1})"
    metrics = Metrics(features)
    names = [str(source.relative) for source in sources]
    if len(set(names)) < len(names):  # two folders may hold files of the same name
        names = [str(source.path) for source in sources]
    done: list[str] = []
    failed: list[dict[str, str]] = []
    digest = hashlib.sha256()
    n_points = sum(len(entry.qualities) for entry in entries)
    with progress(disable=not stderr.is_terminal) as bar:
        task = bar.add_task("measure", total=len(sources) * n_points)
        for index, source in enumerate(sources):
            where = str(source.path)
            try:
                image = images.load(source.path)
                measured = []
                for entry in entries:
                    where = f"{source.path}: {entry.name}"
                    measured.append(entry.measure(names[index], image, metrics))
                    bar.advance(task, len(entry.qualities))
            except ModelError:
                raise
            except (ValueError, OSError, RuntimeError, MemoryError) as exception:
                reason = str(exception) or type(exception).__name__
                reason = reason if reason.startswith(str(source.path)) else f"{where}: {reason}"
                failed.append({"image": names[index], "path": str(source.path), "reason": reason})
            else:
                done.append(names[index])
                digest.update(f"{image.shape}".encode() + image.tobytes())
                for entry, (rows, ceiling) in zip(entries, measured, strict=True):
                    entry.rows += rows
                    entry.ceiling_rows += ceiling
            bar.update(task, completed=(index + 1) * n_points)
    result = {
        "protocol": PROTOCOL,
        "protocol_hash": PROTOCOL_HASH,
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "dataset": {
            "name": dataset,
            "n_images": len(done),
            "names": done,
            "sha256": digest.hexdigest(),
            "sha256_of": "shape and decoded pixels of the images in this order",
        },
        "features": {"name": features.name, "sha256": features.sha256} if features else None,
        "codecs": [entry.result() for entry in entries],
        "failed": failed,
    }
    finite: dict[str, Any] = _finite(result)
    return finite


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result atomically, as JSON without NaN or infinity."""
    write_atomic(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def _of_model(model: Model, qualities: Sequence[int]) -> _Entry:
    info = {"description": model.description()}
    return _Entry(model.name, model.name, "model", info, qualities, model.encode, model.decode, model.reconstruct)


def _of_baseline(baseline: Baseline) -> _Entry:
    info, qualities = {"flags": baseline.flags}, baseline.qualities
    return _Entry(baseline.name, baseline.label, "baseline", info, qualities, baseline.encode, baseline.decode, None)


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None and math.isfinite(row[key])]
    return statistics.fmean(values) if values else None


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    return {metric.key: _mean(rows, metric.key) for metric in METRICS}


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
