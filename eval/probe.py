"""A linear probe: which class does an image look like, told from features of a frozen network.

    features (n, D), labels -> standardised -> multinomial logistic regression, classes weighted alike -> class

Entry: `fit`. Everything is computed in float64 and from fixed starts: the same features give the same probe.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the squared weights; the one that does best on a fifth of the photographs is taken."""
BLURS = (0.0, 1 / 128, 1 / 64, 1 / 32)
"""Deviations of the blurs that a photograph is learned with, in parts of its side; every second one is mirrored."""
_ITERATIONS = 150
_MEASURED = 0.2  # of the photographs, to choose the penalty


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A trained probe.

    Attributes:
        mean: (D,) of the training features.
        scale: (D,) what a feature is multiplied by.
        weights: (D + 1, C), the last row is added.
        penalty: that was chosen.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    penalty: float

    def shares(self, features: np.ndarray) -> np.ndarray:
        """Return the probability of each class, (n, C), of features (n, D)."""
        return _softmax(_with_one((features - self.mean) * self.scale) @ self.weights)


def versions(pixels: np.ndarray) -> list[np.ndarray]:
    """Return what a photograph, (S, S, 3) uint8, is learned as: sharp and blurred, see BLURS.

    A decoder's images are softer than photographs; a probe that knows sharp ones alone would judge the sharpness.
    """
    found = []
    for number, blur in enumerate(BLURS):
        image = Image.fromarray(pixels)
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur * min(pixels.shape[:2])))
        blurred = np.asarray(image)
        found.append(np.ascontiguousarray(blurred[:, ::-1]) if number % 2 else blurred)
    return found


def fit(features: np.ndarray, labels: np.ndarray, names: Sequence[str], n_classes: int) -> Probe:
    """Train a probe.

    Args:
        features: (n, D) float64.
        labels: (n,) int64, each class at least once.
        names: of the photograph of each row; its versions stay together when the penalty is chosen.
        n_classes: C.
    """
    mean, deviation = features.mean(0), features.std(0)
    scale = np.where(deviation > 1e-8, 1 / np.maximum(deviation, 1e-8), 0.0)
    x = _with_one((features - mean) * scale)
    order = sorted(set(names), key=lambda name: hashlib.sha256(b"probe" + name.encode()).digest())
    apart = set(order[: round(_MEASURED * len(order))])
    measured = np.array([name in apart for name in names])
    kept = ~measured
    penalty = PENALTIES[len(PENALTIES) // 2]
    if set(labels[kept]) == set(labels[measured]) == set(range(n_classes)):  # else too few to choose by
        found = {}
        for candidate in PENALTIES:
            weights = _fitted(x[kept], labels[kept], n_classes, candidate)
            right = (x[measured] @ weights).argmax(1) == labels[measured]
            found[candidate] = np.mean([right[labels[measured] == c].mean() for c in range(n_classes)])
        penalty = max(found, key=lambda candidate: (found[candidate], candidate))
    return Probe(mean=mean, scale=scale, weights=_fitted(x, labels, n_classes, penalty), penalty=penalty)


def _fitted(x: np.ndarray, labels: np.ndarray, n_classes: int, penalty: float) -> np.ndarray:
    """Minimise the cross-entropy, mean over classes of the mean over their rows, + penalty / 2 sum of squares."""
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    counts = np.bincount(labels, minlength=n_classes)
    weight = 1 / (n_classes * counts[labels])  # (n,), sums to 1
    target = np.eye(n_classes)[labels]
    free = np.ones((x.shape[1], 1))
    free[-1] = 0  # what is added is not held back

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(x.shape[1], n_classes)
        shares = _softmax(x @ w)
        loss = -(weight * np.log(np.maximum((shares * target).sum(1), 1e-300))).sum()
        gradient = x.T @ ((shares - target) * weight[:, None]) + penalty * free * w
        return float(loss + penalty / 2 * (free * w**2).sum()), gradient.ravel()

    start = np.zeros(x.shape[1] * n_classes)
    found: np.ndarray = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}).x
    return found.reshape(x.shape[1], n_classes)


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    normalised: np.ndarray = shares / shares.sum(1, keepdims=True)
    return normalised
