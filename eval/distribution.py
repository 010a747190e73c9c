"""How far the set of reconstructions is from the set of images: FID, KID, precision, recall, density, coverage.

    x, x_hat -> FeatureNetwork -> moments (all images, float64) -> Frechet distance
                               -> a sample (smallest hashes of the keys) -> KID, precision, recall, density, coverage
    patches of 256 x 256 of both -> the same moments and sample -> patch-FID, patch-KID

Streaming: every rank updates its own `DistributionMetrics`, and the merged states give what one rank would have got.
Entry: `DistributionMetrics`. Imports torch.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.feature_networks import FeatureNetwork
from eval.metrics import Metric

PATCH = 256
N_SAMPLE = 5000  # images (and as many patches) whose features are kept
_BATCH = 32  # patches in a call of the network
_BUFFER = 64  # features that wait to be merged into the moments, which are D x D
NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}  # k of the papers
_SLACK = 1e-9  # relative, on radii: equal distances must not be told apart by rounding

SET_METRICS = (
    Metric("rfid", "rFID", "", False, 3, 1, "Frechet distance of Gaussians fitted to the features, float64, n - 1"),
    Metric(
        *("kid", "KID", "", False, 5, 1),
        f"unbiased MMD^2, kernel (x.y / D + 1)^3, of all kept images at once, none against its own reconstruction; the "
        f"{N_SAMPLE} of smallest key hash kept",
    ),
    Metric(
        *("patch_fid", "patch-FID", "", False, 3, PATCH),
        f"rFID of {PATCH} x {PATCH} patches: grid without overlap, and a grid shifted by {PATCH // 2} both ways where "
        f"both sides >= {PATCH * 3 // 2}",
    ),
    Metric(*("patch_kid", "patch-KID", "", False, 5, PATCH), "KID of the patches of patch-FID"),
    Metric(*("precision", "precision", "", True, 4, 1), "Kynkaanniemi et al. 2019, k = 3, kept images, d <= radius"),
    Metric(*("recall", "recall", "", True, 4, 1), "Kynkaanniemi et al. 2019, k = 3, kept images, d <= radius"),
    Metric(*("density", "density", "", True, 4, 1), "Naeem et al. 2020, k = 5, kept images, d < radius"),
    Metric(*("coverage", "coverage", "", True, 4, 1), "Naeem et al. 2020, k = 5, kept images, d < radius"),
)


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of outer products of the deviations of vectors, float64.

    Attributes:
        n: vectors so far.
        mean: (D,).
        scatter: (D, D).
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Return the moments of features (n, D), n >= 1."""
        mean = features.mean(0, dtype=np.float64)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together (Chan, Golub & LeVeque 1983, for covariances)."""
        n, step = self.n + other.n, other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, (D, D); of two vectors or more."""
        return self.scatter / (self.n - 1)


@dataclass
class _Pairs:
    """Features of images and their reconstructions: moments of all, and a sample that no order of arrival changes."""

    n_sample: int
    moments: tuple[Moments, Moments] | None = None
    kept: list[tuple[int, str, np.ndarray]] = field(default_factory=list)  # hash, key, (2, D) float32
    _waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, key: str, features: np.ndarray) -> None:
        """Take in the features (2, D) of an image and its reconstruction."""
        self._waiting.append(features)
        self.kept.append((_hash(key), key, features))
        if len(self._waiting) >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Merge what waits into the moments, and forget what is kept beyond the sample."""
        if self._waiting:
            features = np.stack(self._waiting)  # (n, 2, D)
            self._waiting = []
            self._merge((Moments.of(features[:, 0]), Moments.of(features[:, 1])))
        self.kept = sorted(self.kept, key=lambda entry: entry[:2])[: self.n_sample]

    def merge(self, other: "_Pairs") -> None:
        """Add the pairs of another rank."""
        self.flush()
        if other.moments is not None:
            self._merge(other.moments)
        self.kept += other.kept
        self.flush()

    def _merge(self, moments: tuple[Moments, Moments]) -> None:
        own = self.moments
        self.moments = moments if own is None else (own[0] + moments[0], own[1] + moments[1])

    @property
    def n(self) -> int:
        return self.moments[0].n if self.moments else 0

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the kept features of images and of reconstructions, (n, D) float64 each."""
        features = np.stack([entry[2] for entry in self.kept]).astype(np.float64)
        return features[:, 0], features[:, 1]


def settings(network: FeatureNetwork) -> dict[str, str]:
    """Return how each metric of SET_METRICS is computed, by key, with the network's hash: its part of a protocol."""
    of = f"; features: {network.settings}, sha256 {network.sha256}, D = {network.dimension}"
    return {metric.key: metric.settings + of for metric in SET_METRICS}


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big")


class DistributionMetrics:
    """Metrics of a set of images and their reconstructions on one network's features.

    Args:
        network: from `feature_networks.load_network`.
        n_sample: images, and patches, whose features are kept for what needs them one by one.
    """

    def __init__(self, network: FeatureNetwork, n_sample: int = N_SAMPLE) -> None:
        self.network, self.n_sample = network, n_sample
        self.images, self.patches = _Pairs(n_sample), _Pairs(n_sample)
        self.n_too_small = 0

    def update(self, key: str, x: np.ndarray, x_hat: np.ndarray) -> None:
        """Take in one image and its reconstruction.

        Args:
            key: the image's name; decides by its hash whether the features are kept.
            x: (H, W, 3) uint8; of any size, images smaller than the network takes are counted and left out.
            x_hat: the same shape.

        Raises:
            ValueError: other shapes or dtypes.
        """
        if x.shape != x_hat.shape or x.ndim != 3 or x.shape[2] != 3 or {x.dtype, x_hat.dtype} != {np.dtype("uint8")}:
            raise ValueError(
                f"{key}: expected two (H, W, 3) uint8, got {x.shape} {x.dtype} and {x_hat.shape} {x_hat.dtype}"
            )
        if min(x.shape[:2]) < self.network.least_side:
            self.n_too_small += 1
            return
        # An image that is its own reconstruction runs once: rounding must not tell the two apart.
        images = [x] if np.array_equal(x, x_hat) else [x, x_hat]
        stack = torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))  # (1 or 2, 3, H, W)

        def both(batch: Tensor) -> np.ndarray:
            features = self.network(batch).numpy().reshape(-1, len(images), self.network.dimension)
            return features.repeat(2 // len(images), axis=1)  # (n, 2, D)

        whole = both(stack)[0]
        found: list[tuple[str, np.ndarray]] = []
        corners = list(patch_corners(*x.shape[:2]))
        for start in range(0, len(corners), _BATCH):
            batch = corners[start : start + _BATCH]
            patches = torch.cat([stack[:, :, top : top + PATCH, left : left + PATCH] for top, left in batch])
            for (top, left), features in zip(batch, both(patches), strict=True):
                found.append((f"{key}@{top},{left}", features))
        self.images.add(key, whole)  # all at once: an image on which the network fails leaves nothing behind
        for name, features in found:
            self.patches.add(name, features)

    def state(self) -> dict[str, Any]:
        """Return everything measured so far, which pickle takes, for `merge` on another rank."""
        self.images.flush()
        self.patches.flush()
        return {
            "network": self.network.about(),
            "images": self.images,
            "patches": self.patches,
            "n_too_small": self.n_too_small,
        }

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the states of all ranks, this one's among them, in place of what was measured so far.

        Raises:
            ValueError: they are of different networks.
        """
        self.images, self.patches, self.n_too_small = _Pairs(self.n_sample), _Pairs(self.n_sample), 0
        for state in states:
            if state["network"] != self.network.about():
                raise ValueError(f"features of different networks: {self.network.about()} and {state['network']}")
            self.images.merge(state["images"])
            self.patches.merge(state["patches"])
            self.n_too_small += state["n_too_small"]

    def compute(self) -> dict[str, float | None]:
        """Return the keys of SET_METRICS; None where there are too few images (2; 6 for the last four)."""
        images, patches = self.images, self.patches
        images.flush()
        patches.flush()
        found: dict[str, float | None] = {"rfid": _frechet(images), "kid": _kid(images)}
        found |= {"patch_fid": _frechet(patches), "patch_kid": _kid(patches)}
        enough = len(images.kept) > max(NEIGHBOURS.values())
        return found | (neighbourhoods(*images.sample()) if enough else dict.fromkeys(NEIGHBOURS))

    def about(self) -> dict[str, Any]:
        """Return what the numbers were made of.

        Returns:
            "network": name, sha256, dimension, settings; "n_images", "n_kept", "n_patches", "n_patches_kept",
            "n_too_small"; "warnings": sentences about numbers that are not what they seem.
        """
        self.images.flush()
        self.patches.flush()
        return {
            "network": self.network.about(),
            "n_images": self.images.n,
            "n_kept": len(self.images.kept),
            "n_patches": self.patches.n,
            "n_patches_kept": len(self.patches.kept),
            "n_too_small": self.n_too_small,
            "warnings": list(self._warnings()),
        }

    def _warnings(self) -> Iterator[str]:
        dimension = self.network.dimension
        for key, pairs, what in (("rfid", self.images, "images"), ("patch_fid", self.patches, "patches")):
            if 2 <= pairs.n <= dimension:
                yield (
                    f"{key}: {pairs.n} {what} cannot span {dimension} features: the covariance is singular and the "
                    f"distance biased; compare it only with that of as many {what}, or take KID, which has no bias"
                )
        if self.n_too_small:
            yield (
                f"{self.n_too_small} images have a side below {self.network.least_side} pixels and count for none of "
                "the metrics of sets"
            )


def patch_corners(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (top, left) of the patches of an image, as NeuralCompression's update_patch_fid cuts them.

    Mentzer et al. 2020, arXiv:2006.09965: a grid without overlap, then one shifted by half a patch both
    ways, if both sides hold a patch and a half. None in an image with a side below one patch.
    """
    for shift in (0, PATCH // 2):  # the second loop is empty where a side is too short
        for top in range(shift, height - PATCH + 1, PATCH):
            for left in range(shift, width - PATCH + 1, PATCH):
                yield top, left


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances. Heusel et al. 2017, eq. 6.

    tr (A B)^(1/2) is the nuclear norm of A^(1/2) B^(1/2). Eigenvalues of A B, as others take them, are good to the root
    of the rounding only where A is singular: with fewer images than features, a set would not be at 0 from itself.
    """
    roots = [_root(moments.covariance) for moments in (a, b)]
    overlap = float(np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum())
    distance = float(((a.mean - b.mean) ** 2).sum()) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(distance))


def frechet_of_sets(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Frechet distance of two sets of features, (n, D) and (m, D) float64.

    That of `frechet_distance`, in far less time for fewer images than features: with centred features X and Y,
    tr (A B)^(1/2) is the nuclear norm of X Y^T, over the root of (n - 1) (m - 1).
    """
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_distance(Moments.of(a), Moments.of(b))
    x, y = a - a.mean(0), b - b.mean(0)
    n, m = len(a) - 1, len(b) - 1
    overlap = float(np.linalg.svd(x @ y.T, compute_uv=False).sum()) / math.sqrt(n * m)
    spread = float(np.square(x).sum() / n + np.square(y).sum() / m)
    return float(max(0.0, float(np.square(a.mean(0) - b.mean(0)).sum()) + spread - 2 * overlap))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    values[values < values.max(initial=0) * len(values) * np.finfo(np.float64).eps] = 0  # rounding, not variance
    root: np.ndarray = (vectors * np.sqrt(values)) @ vectors.T
    return root


def _frechet(pairs: _Pairs) -> float | None:
    return frechet_distance(*pairs.moments) if pairs.moments and pairs.n >= 2 else None


def _kid(pairs: _Pairs) -> float | None:
    return kernel_distance(*pairs.sample()) if len(pairs.kept) >= 2 else None


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the unbiased MMD^2 of two sets (n, D), float64, under the kernel (x.y / D + 1)^3; may be negative.

    Binkowski et al. 2018, arXiv:1801.01401, over the whole sets; the common mean over random subsets has the
    same expectation and more variance. Row i of b was made from row i of a, so the two are not compared with each
    other (Gretton et al. 2012, JMLR 13, eq. 4): they are far more alike than independent draws, which at 24 images
    outweighs the distance itself. Others, torchmetrics among them, count these pairs.
    """

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        values = (x @ y.T / x.shape[1] + 1) ** 3
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def neighbourhoods(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Return precision, recall, density and coverage of `fake` against `real`, (n, D) each, n > 5.

    A point's ball reaches to its k-th nearest neighbour in its own set. Precision: the part of fake in some real ball;
    recall: of real in some fake ball (Kynkaanniemi et al. 2019, arXiv:1904.06991, k = 3, d <= radius). Density:
    real balls around a fake point, mean, / k; coverage: the part of real balls that hold a fake point (Naeem et al.
    2020, arXiv:2002.09797, k = 5, d < radius).
    """
    between = _distances(real, fake)  # (n real, n fake)
    near_real, near_fake = (_distances(points, points).numpy() for points in (real, fake))

    def radii(distances: np.ndarray, key: str) -> np.ndarray:
        k = NEIGHBOURS[key]  # the nearest, number 0, is the point itself
        found: np.ndarray = np.partition(distances, k, axis=1)[:, k]
        return found

    across = between.numpy()
    in_real = across <= radii(near_real, "precision")[:, None] * (1 + _SLACK)
    in_fake = across <= radii(near_fake, "recall")[None] * (1 + _SLACK)
    inside = across < radii(near_real, "density")[:, None] * (1 - _SLACK)
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float(in_fake.any(1).mean()),
        "density": float(inside.sum(0).mean() / NEIGHBOURS["density"]),
        "coverage": float(inside.any(1).mean()),
    }


def _distances(a: np.ndarray, b: np.ndarray) -> Tensor:
    """Return Euclidean distances (n, m) of float64 vectors."""
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b))
