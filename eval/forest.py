"""Bagged decision trees: which class do a few numbers belong to, and which of the numbers tell. Must not import torch.

    x (N, U) -> bins (quantiles of the training) -> trees, each on a bootstrap sample -> classes; importances (U,)

Classes count alike, however many samples they have. All numbers are looked at in every split (Breiman 1996, Bagging
predictors): with random subsets, as forests have them, numbers that tell nothing would be given importance. The same
data and seed give the same trees.
"""

from dataclasses import dataclass

import numpy as np

_BINS = 256  # of each number: with few, the bins between two clusters hold samples of both
_LEAST_GAIN = 1e-9


@dataclass(frozen=True, kw_only=True)
class ForestConfig:
    """How trees are grown."""

    trees: int = 10
    """How many; each learns from a bootstrap sample, a single one from all samples as they are."""
    depth: int = 8
    """Splits one after the other, at most."""
    leaf: int = 5
    """Samples that a leaf has at least, each multiplied by its weight, whose mean is 1."""
    seed: int = 0
    """Of the bootstrap samples."""


@dataclass(frozen=True)
class _Samples:
    """What a node learns from: binned (n, U), labels (n,), weights (n,)."""

    binned: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def of(self, rows: np.ndarray) -> "_Samples":
        """Return some of them."""
        return _Samples(self.binned[rows], self.labels[rows], self.weights[rows])


@dataclass(frozen=True)
class _Tree:
    """Nodes in order of their making; the children of node i are left[i] and left[i] + 1, 0 = it is a leaf."""

    unit: np.ndarray  # (n_nodes,) int64, what is split by
    last_bin: np.ndarray  # (n_nodes,) int64, up to it goes left
    left: np.ndarray  # (n_nodes,) int64
    label: np.ndarray  # (n_nodes,) int64, the class of most weight


@dataclass(frozen=True)
class Forest:
    """Grown trees.

    Attributes:
        importances: (U,) decrease of the Gini impurity by each number, mean over trees, >= 0, sum 1; all 0 where no
            split was found (Breiman et al. 1984, section 5.3).
    """

    importances: np.ndarray
    _edges: np.ndarray  # (U, _BINS - 1)
    _trees: list[_Tree]
    _n_classes: int

    @classmethod
    def grow(cls, x: np.ndarray, labels: np.ndarray, config: ForestConfig) -> "Forest":
        """Learn.

        Args:
            x: (N, U).
            labels: (N,) int64, 0 .. n - 1.
            config: see there.
        """
        edges = np.quantile(x, np.arange(1, _BINS) / _BINS, axis=0).T
        binned, n_classes, rng = _binned(x, edges), int(labels.max()) + 1, np.random.default_rng(config.seed)
        weights = (len(labels) / n_classes / np.bincount(labels).clip(1))[labels]
        trees, gains = [], np.zeros(x.shape[1])
        for _ in range(config.trees):
            rows = rng.integers(len(x), size=len(x)) if config.trees > 1 else np.arange(len(x))
            tree, gain = _grow(_Samples(binned[rows], labels[rows], weights[rows]), n_classes, config)
            trees.append(tree)
            gains += gain
        return cls(gains / gains.sum() if gains.sum() > 0 else gains, edges, trees, n_classes)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the class that most trees vote for, (N,) int64, of (N, U); of equal votes the lowest."""
        binned, rows = _binned(x, self._edges), np.arange(len(x))
        votes = np.zeros((len(x), self._n_classes), np.int64)
        for tree in self._trees:
            at = np.zeros(len(x), np.int64)
            while (inner := tree.left[at] > 0).any():
                right = binned[rows, tree.unit[at]] > tree.last_bin[at]
                at = np.where(inner, tree.left[at] + right, at)
            np.add.at(votes, (rows, tree.label[at]), 1)
        found: np.ndarray = votes.argmax(1)
        return found


def _binned(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bin of each number, (N, U) int64; bin b ends with edge b."""
    return np.stack([np.searchsorted(each, column) for each, column in zip(edges, x.T, strict=True)], axis=1)


def _grow(samples: _Samples, n_classes: int, config: ForestConfig) -> tuple[_Tree, np.ndarray]:
    """Return one tree, and the decrease of impurity by each number, (U,)."""
    gains, everything = np.zeros(samples.binned.shape[1]), samples.weights.sum()
    unit, last_bin, left, label = [0], [0], [0], [0]
    waiting = [(0, samples, 0)]  # node, its samples, its depth
    while waiting:
        node, here, depth = waiting.pop()
        label[node] = int(np.bincount(here.labels, here.weights, n_classes).argmax())
        split = _best_split(here, n_classes, config.leaf) if depth < config.depth else None
        if split is None:
            continue
        gain, unit[node], last_bin[node] = split
        gains[unit[node]] += gain * here.weights.sum() / everything
        left[node] = len(unit)
        goes_right = here.binned[:, unit[node]] > last_bin[node]
        for part in (here.of(~goes_right), here.of(goes_right)):
            waiting.append((len(unit), part, depth + 1))
            for values in (unit, last_bin, left, label):
                values.append(0)
    return _Tree(*(np.array(values) for values in (unit, last_bin, left, label))), gains


def _best_split(samples: _Samples, n_classes: int, leaf: int) -> tuple[float, int, int] | None:
    """Return the split of most gain: the decrease of Gini impurity, which number, last bin to the left."""
    n_units, n = samples.binned.shape[1], samples.weights.sum()
    if n < 2 * leaf or (samples.labels == samples.labels[0]).all():
        return None
    cells = (np.arange(n_units) * _BINS + samples.binned) * n_classes + samples.labels[:, None]
    counts = np.bincount(cells.ravel(), samples.weights.repeat(n_units), n_units * _BINS * n_classes)
    counts = counts.reshape(n_units, _BINS, n_classes)
    below = counts.cumsum(1)[:, :-1]  # (U, bins - 1, classes) weight to the left of each split
    above = counts.sum(1, keepdims=True) - below
    n_below, n_above = below.sum(2), above.sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        pure = ((below**2).sum(2) / n_below + (above**2).sum(2) / n_above) / n
    pure[(n_below < leaf) | (n_above < leaf)] = -np.inf
    best = int(pure.argmax())
    gain = float(pure.flat[best] - ((counts[0].sum(0) / n) ** 2).sum())
    return (gain, best // (_BINS - 1), best % (_BINS - 1)) if gain > _LEAST_GAIN else None
