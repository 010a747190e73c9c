"""Does each unit stand for one factor, and each factor in one unit? MIG, DCI, SAP. Must not import torch.

    codes (N, U), factors (N, F) integers -> one number per score in 0..1, and one per factor

Factors are what is known about each image: its class, its style; unordered. Scores of a few hundred samples are noisy,
and the information that MIG compares is biased upwards there. Entry: `disentanglement`.
"""

from typing import Any

import numpy as np

from eval.forest import Forest, ForestConfig

BINS = 20
_TRAINED = 0.5  # of the samples: DCI and SAP learn from these, and are measured on the others

SETTINGS = {
    "mig": f"Chen et al. 2018, arXiv:1802.04942 eq. 6; codes in {BINS} bins of equal width, plug-in estimates",
    "dci": "Eastwood & Williams 2018; importances: Gini, of 10 bagged trees of depth 8 on all codes, classes weighted "
    "alike; informativeness: balanced accuracy on held-out samples",
    "sap": "Kumar et al. 2018, arXiv:1711.00848, section 3; balanced accuracy on held-out samples of thresholds on one "
    "code: a tree of depth 8; at most 1 - 1 / classes",
}


def disentanglement(codes: np.ndarray, factors: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return all scores; see `mig`, `dci` and `sap`.

    Args:
        codes: (N, U) units: means of posteriors.
        factors: (N, F) integers, each column with at least two values.
        seed: of the halves that DCI and SAP learn from and are measured on.

    Raises:
        ValueError: shapes or values that are none; a factor that is constant, or that one of the halves knows values of
            that the other does not.
    """
    return {"mig": mig(codes, factors), "dci": dci(codes, factors, seed), "sap": sap(codes, factors, seed)}


def mig(codes: np.ndarray, factors: np.ndarray) -> dict[str, Any]:
    """Return the mutual information gap.

    Of each factor, the information in the code that knows most of it, less that in the second, over its entropy.

    Returns:
        "score": mean over factors; "per_factor": (F,); "information": (F, U) nats.
    """
    codes, factors = _checked(codes, factors)
    low, high = codes.min(0), codes.max(0)
    scaled = (codes - low) / np.where(high > low, high - low, 1.0)
    binned = np.minimum((scaled * BINS).astype(np.int64), BINS - 1)
    information = np.array([[_information(code, factor) for code in binned.T] for factor in factors.T])
    gaps = _gaps(information) / np.array([_entropy(np.bincount(factor)) for factor in factors.T])
    return {"score": float(gaps.mean()), "per_factor": gaps.tolist(), "information": information.tolist()}


def dci(codes: np.ndarray, factors: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return disentanglement, completeness and informativeness.

    With P (U, F) the importances, of sum 1 for each factor: disentanglement of a code is 1 - the entropy of its row, to
    the base F, and the mean is weighted by the row's sum; completeness of a factor is 1 - the entropy of its column, to
    the base U. With one factor every code is disentangled, with one code every factor complete.

    Returns:
        "disentanglement", "completeness", "informativeness"; "chance": what informativeness is without codes;
        "per_code": (U,), "per_factor": dicts; "importances": (U, F).
    """
    codes, factors = _checked(codes, factors)
    train, test = _halves(factors, seed)
    importances, rows = np.zeros((codes.shape[1], factors.shape[1])), []
    for number, factor in enumerate(factors.T):
        forest = Forest.grow(codes[train], factor[train], ForestConfig(seed=seed))
        importances[:, number] = forest.importances
        accuracy = _balanced_accuracy(forest.predict(codes[test]), factor[test])
        chance = 1 / len(np.unique(factor))
        rows.append({"informativeness": accuracy, "chance": chance})
    per_code = 1 - _entropies(importances)
    for row, column in zip(rows, importances.T, strict=True):
        row["completeness"] = float(1 - _entropies(column[None])[0]) if column.sum() > 0 else 0.0
    weight = importances.sum(1)
    return {
        "disentanglement": float((per_code * weight).sum() / weight.sum()) if weight.sum() > 0 else 0.0,
        **{key: float(np.mean([row[key] for row in rows])) for key in ("completeness", "informativeness", "chance")},
        "per_code": per_code.tolist(),
        "per_factor": rows,
        "importances": importances.tolist(),
    }


def sap(codes: np.ndarray, factors: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return the separated attribute predictability: how much better the best code tells a factor than the second.

    Returns:
        "score": mean over factors; "per_factor": (F,); "limit": the score of perfect codes, mean of 1 - 1 / classes;
        "accuracy": (F, U).
    """
    codes, factors = _checked(codes, factors)
    train, test = _halves(factors, seed)
    accuracy = np.zeros((factors.shape[1], codes.shape[1]))
    for u, code in enumerate(codes.T):
        for f, factor in enumerate(factors.T):
            thresholds = Forest.grow(code[train, None], factor[train], ForestConfig(trees=1))
            accuracy[f, u] = _balanced_accuracy(thresholds.predict(code[test, None]), factor[test])
    gaps = _gaps(accuracy, floor=np.array([1 / len(np.unique(factor)) for factor in factors.T]))
    limit = np.mean([1 - 1 / len(np.unique(factor)) for factor in factors.T])
    return {
        "score": float(gaps.mean()),
        "per_factor": gaps.tolist(),
        "limit": float(limit),
        "accuracy": accuracy.tolist(),
    }


def _checked(codes: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes as float64, and factors as int64 whose values are 0 .. n - 1; raises ValueError."""
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or 0 in (*codes.shape, *factors.shape):
        raise ValueError(f"disentanglement: expected (N, U) and (N, F), got {codes.shape} and {factors.shape}")
    if not np.isfinite(codes).all() or not np.issubdtype(factors.dtype, np.integer):
        raise ValueError(f"disentanglement: expected finite codes and integer factors, got factors {factors.dtype}")
    for number, factor in enumerate(factors.T):
        if (factor == factor[0]).all():
            raise ValueError(f"disentanglement: factor {number} is constant, nothing can tell it")
    numbered = [np.unique(factor, return_inverse=True)[1].reshape(-1) for factor in factors.T]
    return codes.astype(np.float64), np.stack(numbered, axis=1).astype(np.int64)


def _halves(factors: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the samples to learn from, and of those to measure; raises ValueError."""
    order = np.random.default_rng(seed).permutation(len(factors))
    train, test = np.split(order, [round(_TRAINED * len(order))])
    for number, factor in enumerate(factors.T):
        known = [len(np.unique(factor[part])) for part in (train, test)]
        if known != [factor.max() + 1] * 2:
            raise ValueError(
                f"disentanglement: factor {number} has values too rare to be in both halves of the samples"
            )
    return train, test


def _table(a: np.ndarray, b: np.ndarray, n_a: int) -> np.ndarray:
    """Return how often each pair of values occurs, (n_a, values of b)."""
    n_b = int(b.max()) + 1
    return np.bincount(a * n_b + b, minlength=n_a * n_b).reshape(n_a, n_b)


def _entropy(counts: np.ndarray) -> float:
    """Return the entropy of frequencies, nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _information(code: np.ndarray, factor: np.ndarray) -> float:
    """Return the mutual information of two columns of numbers 0, 1, ..., nats."""
    counts = _table(code, factor, BINS)
    return _entropy(counts.sum(1)) + _entropy(counts.sum(0)) - _entropy(counts.ravel())


def _entropies(rows: np.ndarray) -> np.ndarray:
    """Return the entropy of each row to the base of its length, 0..1; 1 of rows without anything, 0 of length 1."""
    if rows.shape[1] == 1:
        return np.zeros(len(rows))
    return np.array([_entropy(row) / np.log(len(row)) if row.sum() > 0 else 1.0 for row in rows])


def _gaps(values: np.ndarray, floor: np.ndarray | None = None) -> np.ndarray:
    """Return the largest less the second of each row; of rows of one value, less `floor` (0)."""
    ordered = np.sort(values, axis=1)[:, ::-1]
    second = ordered[:, 1] if values.shape[1] > 1 else (0.0 if floor is None else floor)
    gaps: np.ndarray = ordered[:, 0] - second
    return gaps


def _balanced_accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over classes of the share that is found."""
    return float(np.mean([(found[labels == label] == label).mean() for label in np.unique(labels)]))
