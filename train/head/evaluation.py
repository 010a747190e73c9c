"""What a head is worth on a cache, beyond what each validation says: bounds, units, holes of priors, factors.

    held-out latents -> draws of q(u|z, c) -> ELBO and IWAE bits; KL of each unit, what is reconstructed
    draws of q(u|z, c) of held-out latents, of p(u|c), of a fitted prior -> which share of a prior lies in holes
    all latents, encoded alike -> units' means, factors -> MIG, DCI, SAP

Entries: `evaluate`, `scores_of_factors`. Imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.errors import UsageError
from codec.head import Head
from codec.head.config import NetworkConfig
from codec.head.fitted_folder import StoredPrior
from eval.bootstrap import interval
from eval.disentanglement import SETTINGS as FACTOR_SETTINGS
from eval.disentanglement import disentanglement
from eval.holes import hole_share
from train.head.config import HeadConfig, ObjectiveConfig
from train.head.latents import HeadData, read_arrays
from train.head.likelihood import predicted
from train.head.measure import Held, UnitTally, measure
from train.head.objectives import unit_report
from train.head.second_stage import image_of, mean_nats
from train.progress import means

FEWEST = 40
"""Held-out latents below which no holes are looked for."""
_DRAWS = 5  # of a prior, for each held-out latent

SETTINGS = {
    "bits": "upper bounds of -log2 p(z|c) per number of a normalized latent, mean over held-out ones; ELBO: mean over "
    "k draws of the posterior; IWAE: importance-weighted, k draws (Burda et al. 2016); interval: percentile bootstrap "
    "over latents; of a flow-matching decoder the ELBO is the bound of its diffusion, and there is no IWAE bound",
    "prior_nats": "mean of -log p(u|c) of first-level units drawn of the held-out latents' posteriors",
    "holes": "share of a prior's draws farther from the nearest draw of the held-out latents' posteriors (one half of "
    f"them) than 95 % of the other half; first level; {_DRAWS} draws of the prior for each held-out condition; "
    "0.05 = none",
    "factors": FACTOR_SETTINGS,
}


def evaluate(head: Head, data: HeadData, k: int, fitted: StoredPrior | None = None, seed: int = 0) -> dict[str, Any]:
    """Measure a head on held-out latents.

    Args:
        head: of these latents.
        data: with the head's conditions; `train.head.cached.data_of_head` reads it.
        k: draws of each posterior for the bounds.
        fitted: a prior of its units, to compare with its own.
        seed: of all that is drawn.

    Returns:
        Plain values: "n_held_out"; "bits": elbo, iwae and the Gaussians' of the channels, of each value and interval,
        and what the fitted prior gains; "measured": as in a validation; "units": of each level KL, variance and
        collapse; "prior_nats" and "holes", of the head's own prior and the fitted one, holes None of few latents.
    """
    about = head.stored.about
    config = HeadConfig(head=NetworkConfig(**about["network"]), objective=ObjectiveConfig(**about.get("objective", {})))
    held = Held.of(data, seed)
    rows, _ = measure(head.network, held, range(len(held.z)), config, head.device, None, draw=True)
    units = _units(rows, len(head.network.unit_shapes), config.objective.active_nats)
    measured = means(rows)
    c = _conditions(data, held.latents.labels)
    found = predicted(head, held.z, c, k, seed)
    bits = {
        "k": found.k,
        "elbo": _scored(found.elbo),
        "iwae": None if found.iwae is None else _scored(found.iwae),
        "effective_draws": None if found.effective is None else float(np.median(found.effective)),
        "channels": _scored(np.array([row["marginal_bits"] for row in rows])),
    }
    dropped = ("bits", "gain_bits", "marginal_bits")  # of few draws; the bounds above are of k
    priors = _priors(head, held, c, fitted, seed)
    result = {
        "n_held_out": len(held.z),
        "bits": bits,
        "measured": {name: value for name, value in measured.items() if name not in dropped},
        "units": units,
        **priors,
    }
    if fitted is not None:
        nats = priors["prior_nats"]
        bits["gain_of_fitted"] = (nats["own"] - nats["fitted"]) / (head.network.space.n * np.log(2))
    return result


def _conditions(data: HeadData, labels: torch.Tensor) -> list[Any]:
    """Return conditions of samples as `codec.head.Head` takes them."""
    if data.embeddings is not None:
        return list(data.embeddings[labels])
    return labels.tolist() if data.classes else [None] * len(labels)


def _scored(values: np.ndarray) -> dict[str, Any]:
    return {"value": float(values.mean()), "interval": interval(values.tolist())}


def _units(rows: Sequence[Mapping[str, Any]], n_levels: int, least_nats: float) -> list[dict[str, Any]]:
    """Return what each unit of each level does, of `measure`'s rows; KL None where a flow or mixture mixes them."""
    levels = []
    for level in range(n_levels):
        tallies: list[UnitTally] = [row[f"units_{level + 1}" if level else "units"] for row in rows]
        posterior, kl = (
            torch.from_numpy(np.concatenate([getattr(one, name) for one in tallies])) for name in ("means", "kl")
        )
        report = unit_report(posterior, kl.expand_as(posterior), least_nats)
        levels.append(
            {
                "kl_nats": report.kl.tolist() if kl.shape == posterior.shape else None,
                "variance": report.variance.tolist(),
                "collapsed": report.collapsed.tolist(),
                "n_active": int((~report.collapsed).sum()),
            }
        )
    return levels


def _priors(head: Head, held: Held, c: Sequence[Any], fitted: StoredPrior | None, seed: int) -> dict[str, Any]:
    """Return nats and holes of p(u|c) and of a fitted prior, against units drawn of the held-out latents."""
    u = head.encode(held.z, c, seed=seed)[0]
    labels, hidden = head.conditions(c, len(u))
    with torch.inference_mode():
        own = head.network.prior.log_prob(u, head.network.condition(labels, hidden)).double()
    nats: dict[str, Any] = {"own": -float(own.mean())}
    many = [one for one in c for _ in range(_DRAWS)]
    drawn = {"own": _drawn(head, many, None, seed)}
    if fitted is not None:
        nats["fitted"] = mean_nats(fitted.prior, u, labels if fitted.classes else None)
        drawn["fitted"] = _drawn(head, many, fitted, seed)
    if len(u) < FEWEST:
        return {"prior_nats": nats, "holes": None}
    return {"prior_nats": nats, "holes": {name: vars(hole_share(each, u, seed=seed)) for name, each in drawn.items()}}


def _drawn(head: Head, c: Sequence[Any], fitted: StoredPrior | None, seed: int) -> torch.Tensor:
    """Return first-level units of p(u|c), or of a fitted prior in its place."""
    return replace(head, fitted=None if fitted is None else fitted.prior).draw_units(c, seed=seed)[0]


# --- factors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """What is known about images, see `read_factors`.

    Attributes:
        rows: name of an image -> its row of `values`.
        values: (N, F) integers.
        names: of the factors.
    """

    rows: Mapping[str, int]
    values: np.ndarray
    names: Sequence[str]


def read_factors(path: Path) -> Factors:
    """Read an .npz file with `keys`, (N,) names of images as a cache has them, `factors`, (N, F) integers, and `names`,
    (F,) of the factors; raises UsageError for anything else."""
    keys, values, names = read_arrays(path, "keys", "factors", "names")
    words = all(part.ndim == 1 and part.dtype.kind == "U" for part in (keys, names))
    if not words or values.ndim != 2 or values.dtype.kind not in "iu" or values.shape != (len(keys), len(names)):
        shapes = f"keys {keys.shape} {keys.dtype}, factors {values.shape} {values.dtype}, names {names.shape}"
        raise UsageError(f"{path}: {shapes}, expected (N,) strings, (N, F) integers and (F,) strings")
    return Factors({str(key): n for n, key in enumerate(keys)}, values.astype(np.int64), [str(name) for name in names])


def scores_of_factors(
    head: Head, data: HeadData, factors: Factors, c: str | None, where: str, seed: int = 0
) -> dict[str, Any]:
    """Return MIG, DCI and SAP of the means of first-level units, of all latents whose image has factors.

    Args:
        head: of these latents.
        data: training and held-out latents count alike: the head has seen neither's factors.
        factors: of their images.
        c: the class that all are encoded as, None = without a condition: else a label would be in the units.
        where: begins the message of an error.
        seed: see `eval.disentanglement.disentanglement`.

    Raises:
        UsageError: no image has factors, or the scores cannot be computed of those that have.
    """
    z, rows, n_all = [], [], 0
    for part in (data.training, data.held_out):
        for n, key in enumerate(part.keys):
            row = factors.rows.get(image_of(key))
            if row is not None:
                z.append(part.mean[n, 0])
                rows.append(row)
        n_all += len(part)
    if not rows:
        first = next(iter(factors.rows), "none")
        raise UsageError(
            f"{where}: none of {n_all} samples has a key in it; the cache's first: {image_of(data.training.keys[0])}, "
            f"the file's: {first}"
        )
    codes = head.encode(torch.stack(z), [c] * len(z))[0].double().cpu().numpy()
    try:
        found = disentanglement(codes, factors.values[rows], seed)
    except ValueError as exception:
        raise UsageError(f"{where}: {exception}") from exception
    return {"n": len(rows), "n_without": n_all - len(rows), "names": list(factors.names), **found}
