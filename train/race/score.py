"""How near a set of generated images comes to real ones, with intervals: Frechet distance, KID, precision, recall.

    pixels -> FeatureNetwork -> features (n, C) -> score(real, generated) -> value, interval, values without a group

Entry: `feature_network`, `features`, `score`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from codec.errors import UsageError
from eval.distribution import frechet_of_sets, kernel_distance, neighbourhoods
from eval.feature_networks import FeatureNetwork, load_network
from eval.features import INCEPTION, FeaturesError, find_among
from eval.jackknife import Score, jackknife
from train.race.data import Pictures

FEWEST = 12
"""Images on each side below which nothing is scored: neighbourhoods need six when a group is left out."""
FALLBACK = "squeezenet1_0"
_BATCH = 64


def feature_network(name: str | None, place: str | None, device: str) -> FeatureNetwork | None:
    """Load the network whose features are compared.

    Args:
        name: as `eval.feature_networks.load_network` takes it; None: FID's Inception, else SqueezeNet 1.0, whichever
            has its weights here.
        place: file or folder of weights; None: $LATENT_CODEC_FEATURES and torch hub's cache.
        device: where it runs.

    Returns:
        None where nothing was asked for and nothing is here.

    Raises:
        UsageError: what was asked for is not here.
    """
    if name is not None:
        return load_network(name, place, device)
    tried = (INCEPTION, FALLBACK)
    for candidate in tried:
        try:
            return load_network(candidate, find_among(candidate, tried, place), device)
        except FeaturesError as exception:
            missing = exception
    if place is not None:
        raise missing
    return None


def features(network: FeatureNetwork, pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Return the features of images, (n, C) float64, of as many (H, W, 3) uint8 of one size.

    Raises:
        UsageError: they are smaller than the network takes.
    """
    if pixels and min(pixels[0].shape[:2]) < network.least_side:
        least = f"{network.name} takes images from {network.least_side} pixels on"
        raise UsageError(f"--size {pixels[0].shape[0]}: {least}; take a larger size or another --fid-network")
    found = []
    for start in range(0, len(pixels), _BATCH):
        batch = np.stack(pixels[start : start + _BATCH]).transpose(0, 3, 1, 2)  # (B, 3, H, W)
        found.append(network(torch.from_numpy(np.ascontiguousarray(batch))).numpy())
    return np.concatenate(found).astype(np.float64)


def score(real: np.ndarray, generated: np.ndarray) -> dict[str, Score]:
    """Compare two sets of features, (n, C) and (m, C) float64.

    Returns:
        "fid" (biased for few images), "kid" (unbiased; of the first min(n, m) of each), "precision", "recall".
    """
    return jackknife(_all, (real, generated))


def _all(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    n = min(len(real), len(generated))
    near = neighbourhoods(real, generated)
    return {
        "fid": frechet_of_sets(real, generated),
        "kid": kernel_distance(real[:n], generated[:n]),
        "precision": near["precision"],
        "recall": near["recall"],
    }


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What samples are compared with.

    Attributes:
        network: whose features are compared; None = nothing is.
        real: features of the held-out pictures, (n, C).
        control: scores of as many training pictures as are drawn, of the same classes: of a perfect generator.
    """

    network: FeatureNetwork | None
    real: np.ndarray
    control: Mapping[str, Score] | None

    @classmethod
    def of(cls, network: FeatureNetwork | None, pictures: Pictures, n_samples: int) -> "Judge":
        """Prepare a judge; without a network, or of too few pictures, one that has nothing to say.

        Args:
            network: whose features are compared.
            pictures: of the race.
            n_samples: how many images each entrant draws; as many are scored in the control.

        Raises:
            UsageError: the pictures are smaller than the network takes.
        """
        if network is None or min(len(pictures.held_out), n_samples) < FEWEST:
            return cls(network=None, real=np.empty((0, 0)), control=None)
        real = features(network, [picture.pixels for picture in pictures.held_out])
        others = [pictures.training[n].pixels for n in pictures.control(n_samples)]
        return cls(network=network, real=real, control=score(real, features(network, others)))

    def scores(
        self, drawn: Sequence[np.ndarray], ceiling: Sequence[np.ndarray], own: Sequence[np.ndarray]
    ) -> dict[str, Any] | None:
        """Score one entrant.

        Args:
            drawn: its samples.
            ceiling: its reconstructions of the control pictures.
            own: its reconstructions of the held-out pictures.
        """
        if self.network is None:
            return None
        samples, others, held_out = (features(self.network, part) for part in (drawn, ceiling, own))
        return {
            "samples": score(self.real, samples),
            "ceiling": score(self.real, others),
            "own": score(held_out, samples),
        }
