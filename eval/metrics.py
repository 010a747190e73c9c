"""Full-reference metrics of one pair of 8-bit RGB images.

Every function takes the image x and the reconstruction x_hat, both (H, W, 3) uint8 sRGB, and returns a float, or None
where the metric is not defined for so small an image. ValueError if shapes differ or the dtype is not uint8.

Entry: `chosen`, which gives a `Metrics` of those asked for, or of all that this machine can compute.
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from codec.errors import UsageError
from codec.workers import Processes

if TYPE_CHECKING:
    from torch import Tensor

    from eval.features import Distance

_Scale = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """How a metric is named, computed and read."""

    key: str  # in the JSON
    label: str  # in tables and plots
    unit: str  # "" without one
    higher_is_better: bool
    digits: int  # after the decimal point, in tables
    least_side: int  # pixels; None for smaller images
    settings: str  # how it is computed; part of the protocol
    backbone: str | None = None  # the network whose weights it needs, a key of features.BACKBONES


_NETWORK = "pixels to [-1, 1], no resize, float32"

METRICS = (
    Metric(
        *("psnr", "PSNR", "dB", True, 2, 1),
        "10 log10(255^2 / MSE), MSE over all pixels and channels of 8-bit RGB; null if infinite",
    ),
    Metric(
        *("ssim", "SSIM", "", True, 4, 11),
        "pytorch-msssim ssim, RGB, data_range 255, window 11, sigma 1.5, float32; sides >= 11",
    ),
    Metric(
        *("ms_ssim", "MS-SSIM", "", True, 4, 161),
        "pytorch-msssim ms_ssim, RGB, data_range 255, 5 scales, window 11, sigma 1.5, float32; sides > 160",
    ),
    Metric(*("ssimulacra2", "SSIMULACRA2", "", True, 1, 8), "ssimulacra2 compute_ssimulacra2, sRGB; sides >= 8"),
    Metric(
        *("flip", "FLIP", "", False, 4, 1),
        "flip-evaluator, LDR, sRGB, 67.02 pixels per degree (0.7 m from 3840 pixels on 0.7 m), mean of the error map",
    ),
    Metric(
        *("lpips_sqz10", "lpips-sqz10", "", False, 3, 21),
        "uncalibrated LPIPS, 7 slices of torchvision squeezenet1_0.features, sum over slices; sides >= 21",
        "squeezenet1_0",
    ),
    Metric(
        *("lpips_alex", "LPIPS (alex)", "", False, 4, 31),
        f"lpips package, v0.1 heads, net alex, {_NETWORK}, mean over pixels, sum over 5 layers; sides >= 31",
        "alexnet",
    ),
    Metric(
        *("lpips_vgg", "LPIPS (vgg)", "", False, 4, 16),
        f"lpips package, v0.1 heads, net vgg, {_NETWORK}, mean over pixels, sum over 5 layers; sides >= 16",
        "vgg16",
    ),
    Metric(
        *("lpips_squeeze", "LPIPS (squeeze)", "", False, 4, 17),
        f"lpips package, v0.1 heads, net squeeze, {_NETWORK}, mean over pixels, sum over 7 layers; sides >= 17",
        "squeezenet1_1",
    ),
    Metric(
        *("dists", "DISTS", "", False, 4, 32),
        "DISTS-pytorch 0.1 with its weights, pixels to [0, 1], no resize, float32; sides >= 32",
        "vgg16",
    ),
)

KNOWN = {metric.key: metric for metric in METRICS}
SETTINGS = {metric.key: metric.settings for metric in METRICS}


def _check(x: np.ndarray, x_hat: np.ndarray) -> None:
    for image in (x, x_hat):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if x.shape != x_hat.shape:
        raise ValueError(f"image and reconstruction differ in shape: {x.shape} and {x_hat.shape}")


def _too_small(key: str, x: np.ndarray) -> bool:
    return bool(min(x.shape[:2]) < KNOWN[key].least_side)


def _tensor(image: np.ndarray) -> "Tensor":
    import torch

    return torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]  # (1, 3, H, W) in [0, 255]


def psnr(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Return the PSNR in dB over all pixels and channels; inf for identical images."""
    _check(x, x_hat)
    mse = float(np.mean((x.astype(np.float64) - x_hat) ** 2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def ssim(x: np.ndarray, x_hat: np.ndarray) -> float | None:
    """Return pytorch-msssim's SSIM (mean over RGB); None below 11 pixels a side, its window."""
    _check(x, x_hat)
    if _too_small("ssim", x):
        return None
    from pytorch_msssim import ssim as function

    return float(function(_tensor(x), _tensor(x_hat), data_range=255))


def ms_ssim(x: np.ndarray, x_hat: np.ndarray) -> float | None:
    """Return pytorch-msssim's MS-SSIM with 5 scales; None if a side is not above 160 pixels, which these need."""
    _check(x, x_hat)
    if _too_small("ms_ssim", x):
        return None
    from pytorch_msssim import ms_ssim as function

    return float(function(_tensor(x), _tensor(x_hat), data_range=255))


def ssimulacra2(x: np.ndarray, x_hat: np.ndarray, reference: Sequence[_Scale] | None = None) -> float | None:
    """Return SSIMULACRA2: 100 identical, 90 visually lossless, below 10 very poor; None below 8 pixels a side.

    The steps and their order are those of the package's `compute_ssimulacra2`, and so is the value; done one by one,
    the image's own part is computed once for all its reconstructions.

    Args:
        x: the image.
        x_hat: its reconstruction.
        reference: `list(ssimulacra2_scales(x))`; None computes it.
    """
    _check(x, x_hat)
    if _too_small("ssimulacra2", x):
        return None
    from ssimulacra2 import ssimulacra2 as package

    total = package.Msssim()
    pairs = zip(reference or ssimulacra2_scales(x), ssimulacra2_scales(x_hat), strict=True)
    for (a, mean_a, square_a), (b, mean_b, square_b) in pairs:
        scale = package.MsssimScale()
        scale.avg_ssim = package.ssim_map(mean_a, mean_b, square_a, square_b, package.blur_image(a * b))
        scale.avg_edgediff = package.edge_diff_map(a, mean_a, b, mean_b)
        total.scales.append(scale)
    return float(total.score())


def ssimulacra2_scales(image: np.ndarray) -> Iterator[_Scale]:
    """Yield the part of SSIMULACRA2 that is an image's own: XYB, its blur, and the blur of its square, per scale."""
    from ssimulacra2 import ssimulacra2 as package

    linear = package.srgb_to_linear(np.arange(256))[image]  # a table: the power function costs more than the rest
    for scale in range(package.kNumScales):
        if scale:
            linear = package.downsample(linear, 2, 2)
        xyb = package.make_positive_xyb(package.linear_rgb_to_xyb(linear))
        if min(xyb.shape[:2]) < 8:
            return
        yield xyb, package.blur_image(xyb), package.blur_image(xyb * xyb)


def flip(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Return NVIDIA's LDR-FLIP (Andersson et al. 2020, doi:10.1145/3406183), the mean over pixels; 0 best, 1 worst."""
    _check(x, x_hat)
    from flip_evaluator import evaluate  # type: ignore[import-untyped]

    pair = [image.astype(np.float32) / 255 for image in (x, x_hat)]
    conditions = {"vc": [0.7, 3840.0, 0.7]}  # distance in m, pixels and m of the display's width: the paper's
    return float(evaluate(*pair, "LDR", applyMagma=False, parameters=conditions)[1])


class _Reference:
    """What one image alone contributes to its metrics, computed when first asked for."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x.copy()  # the caller may reuse the array
        self._parts: dict[str, Any] = {}

    def part(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self._parts:
            self._parts[key] = compute()
        return self._parts[key]


class Metrics:
    """Metrics of pairs of images.

    What an image contributes alone is kept until another image comes: measure all reconstructions of an image in turn.

    Args:
        features: the `lpips-sqz10` distance, on any device, or None; a short form of `distances`.
        metrics: what to measure; None = all of METRICS.
        distances: the metrics that need a network, by key; one that is not there is None for every pair.
        absent: why metrics were left out, by key.
        n_processes: beside this one, for FLIP, which lets no other thread of its process work; 0 = none. Whoever asks
            for some needs a main module that can be imported again, as `multiprocessing` says.

    Attributes:
        list: what is measured, in the order of METRICS.
        absent: as given.
    """

    def __init__(
        self,
        features: "Distance | None" = None,
        *,
        metrics: Sequence[Metric] | None = None,
        distances: "Mapping[str, Distance] | None" = None,
        absent: Mapping[str, str] | None = None,
        n_processes: int = 0,
    ) -> None:
        keys = {metric.key for metric in (METRICS if metrics is None else metrics)}
        self.list = tuple(metric for metric in METRICS if metric.key in keys)
        self.absent = dict(absent or {})
        self._distances = dict(distances or {}) | ({"lpips_sqz10": features} if features is not None else {})
        self._reference: _Reference | None = None
        self._n_processes = n_processes

    def settings(self) -> dict[str, str]:
        """Return how each metric is computed, by key: the part of a protocol that is about metrics."""
        return {metric.key: metric.settings for metric in self.list}

    def weights(self) -> dict[str, dict[str, str]]:
        """Return the network and the SHA-256 of its file for each metric that has one, by key."""
        return {
            metric.key: {"name": distance.name_of_backbone, "sha256": distance.sha256}
            for metric in self.list
            if (distance := self._distances.get(metric.key)) is not None
        }

    def __call__(self, x: np.ndarray, x_hat: np.ndarray) -> dict[str, float | None]:
        """Return one value for each metric of `list`; None where a metric cannot be computed."""
        return self.many(x, [x_hat])[0]

    def many(self, x: np.ndarray, x_hats: Sequence[np.ndarray]) -> list[dict[str, float | None]]:
        """Return what a call returns for each reconstruction of one image; together they keep more cores busy."""
        for x_hat in x_hats:
            _check(x, x_hat)
        if self._reference is None or not np.array_equal(self._reference.x, x):
            self._reference = _Reference(x)
        reference = self._reference
        keys = [metric.key for metric in self.list]
        alone = [key for key in _WEIGHT_FREE if key in keys]
        pool = _pool(_n_threads())
        futures: dict[tuple[str, int], Future[Any]] = {}
        if pool is not None:  # networks have threads of their own
            jobs = [(key, n) for key in alone for n in range(len(x_hats))]
            if self._n_processes:
                flips = [n for key, n in jobs if key == "flip"]
                futures = {("flip", n): _processes(self._n_processes).submit(_flip_alone, x, x_hats[n]) for n in flips}
                jobs = [job for job in jobs if job not in futures]
            futures |= {(key, n): pool.submit(self._value, key, reference, x_hats[n]) for key, n in jobs}
        values = {at: future.result() for at, future in futures.items()}
        for n, x_hat in enumerate(x_hats):
            values |= {(key, n): self._value(key, reference, x_hat) for key in keys if (key, n) not in values}
        return [{key: values[key, n] for key in keys} for n in range(len(x_hats))]

    def _value(self, key: str, reference: _Reference, x_hat: np.ndarray) -> float | None:
        x = reference.x
        if _too_small(key, x):
            return None
        if key == "ssimulacra2":
            return ssimulacra2(x, x_hat, reference.part(key, lambda: list(ssimulacra2_scales(x))))
        if key in _WEIGHT_FREE:
            return _WEIGHT_FREE[key](x, x_hat)
        return _distance(self._distances[key], reference, x_hat) if key in self._distances else None


# The longest first, which fills the pool best.
_WEIGHT_FREE: dict[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "flip": flip,
    "ssimulacra2": ssimulacra2,
    "ms_ssim": ms_ssim,
    "ssim": ssim,
    "psnr": psnr,
}


def _distance(distance: "Distance", reference: _Reference, x_hat: np.ndarray) -> float:
    import torch

    from codec.pixels import to_float

    device = next(distance.parameters()).device
    with torch.inference_mode():
        part = reference.part(distance.name, lambda: distance.reference(to_float(reference.x)[None].to(device)))
        return float(distance.between(part, to_float(x_hat)[None].to(device)))


def _n_threads() -> int:
    import torch

    return torch.get_num_threads()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor | None:
    """Return a pool of at most 4 threads, in each of which torch has one; None where there is one core to use."""
    if n_threads == 1:
        return None

    def start() -> None:
        import torch

        # The SSIMs are many small steps: on a busy machine two threads wait for each other ten times as long as they
        # work. Torch's setting counts for a thread that asked for it once and for all new ones: another resets those.
        torch.get_num_threads()
        torch.set_num_threads(1)
        other = Thread(target=torch.set_num_threads, args=(n_threads,))
        other.start()
        other.join()

    return ThreadPoolExecutor(min(n_threads, 4), "metrics", start)


@cache
def _processes(n_processes: int) -> Processes:
    return Processes(n_processes)


def _flip_alone(x: np.ndarray, x_hat: np.ndarray) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the library loads; the processes themselves keep the cores busy
    return flip(x, x_hat)


def chosen(names: str | None = None, place: str | Path | None = None, device: str = "cpu") -> Metrics:
    """Return the metrics that were asked for, or all that can be had here.

    Args:
        names: keys of METRICS separated by commas; None = those without weights, and those whose backbone is found.
        place: file or folder of backbones, to the exclusion of other places; None = as in `features.find_backbone`.
        device: of the networks.

    Raises:
        UsageError: an unknown name (the message has the nearest) or device.
        FeaturesError: a backbone is missing that was asked for, no backbone is at `place`, or a file is damaged.
    """
    from eval.features import Distance, FeaturesError, find_among

    metrics = METRICS if names is None else _named(names)
    distances: dict[str, Distance] = {}
    absent: dict[str, str] = {}
    for metric in metrics:
        if metric.backbone is None:
            continue
        try:
            file = find_among(metric.backbone, {other.backbone for other in metrics} - {None}, place)
        except FeaturesError as exception:
            if names is not None:
                raise
            absent[metric.key] = str(exception)
            continue
        distances[metric.key] = _load(metric.key, file, device)
    if names is None and place is not None and not distances:
        raise FeaturesError(absent["lpips_sqz10"])
    found = [metric for metric in metrics if metric.backbone is None or metric.key in distances]
    n_processes = min(_n_threads(), 4) if _n_threads() > 1 else 0
    return Metrics(metrics=found, distances=distances, absent=absent, n_processes=n_processes)


def _named(names: str) -> list[Metric]:
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        key = name.lower().replace("-", "_")
        if key not in KNOWN:
            nearest = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0)[0]
            raise UsageError(f"unknown metric {name!r}: did you mean {nearest}? Known: {', '.join(KNOWN)}")
        found.append(KNOWN[key])
    if not found:
        raise UsageError(f"no metric in {names!r}: expected some of {', '.join(KNOWN)}, separated by commas")
    return found


def _load(key: str, file: Path, device: str) -> "Distance":
    from eval.features import Dists, SqueezeFeatures, load_lpips

    distance: Distance
    if key == "lpips_sqz10":
        distance = SqueezeFeatures(file)
    elif key == "dists":
        distance = Dists(file)
    else:
        distance = load_lpips(key.removeprefix("lpips_"), file)
    try:
        return distance.to(device)
    except (RuntimeError, AssertionError) as exception:  # what torch raises for devices that it does not have
        raise UsageError(f"device {device}: {exception}") from exception
