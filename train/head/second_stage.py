"""Priors fitted after training to what occurs: the units of a head, or the normalized latents of a codec, as vectors.

    training latents -> q(u|z, c), drawn; or latents, drawn and flattened -> Vectors: to fit, to stop by
    fit -> mixture, flow or N(0, I) -> -log p of held-out vectors, which chose nothing of it

Entry: `fit_prior`. Imports torch.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.head.network import ConditionalHead
from codec.head.second_stage import FittedPrior, Standard
from train.denoiser_feed import LatentSet
from train.head.fitting import FlowFitConfig, MixtureConfig, fit_flow, fit_mixture
from train.head.latents import HeadData
from train.set_feed import hold_out

_BATCH = 64
_STOP = 0.1  # share of the training's images by which a flow stops
_MOST_BYTES = 4 << 30  # of the covariances of a mixture, in float64

Vectors = tuple[Tensor, Tensor]
"""(N, d) float32 and their labels, (N,) int64."""


@dataclass(frozen=True, kw_only=True)
class PriorFit:
    """A fitted prior, and what it is worth. Nats: the mean of -log p of a vector drawn of a latent's posterior.

    Attributes:
        prior: of first-level units, or of flattened latents.
        held_out: drawn of the held-out latents, and their labels; they chose nothing of this prior.
        held_out_nats: of these.
        standard_nats: of the same under N(0, I).
        own_nats: of the same under the head's own p(u|c); None without a head. What `held_out_nats` is less than this
            is how much smaller the KL is that samples do not know of.
        stop_nats: of those that a flow stopped by, which flatter it; None where nothing stops.
        traces: the objective of each round of EM, or the mean log-density of what a flow stops by at every look.
        n_vectors: how many it was fitted to ("fit"), stopped by ("stop") and measured on ("held_out").
    """

    prior: FittedPrior
    held_out: Vectors
    held_out_nats: float
    standard_nats: float
    own_nats: float | None
    stop_nats: float | None
    traces: list[list[float]]
    n_vectors: dict[str, int]


def fit_prior(
    network: ConditionalHead | None,
    data: HeadData,
    config: MixtureConfig | FlowFitConfig | None,
    *,
    by_class: bool = True,
    seed: int = 0,
    device: torch.device | None = None,
) -> PriorFit:
    """Fit a prior to what the training's latents are, or to a head's units of them.

    Args:
        network: a trained head, wherever it lies; None = fit to the latents.
        data: training and held-out latents; `train.head.latents.load_data` reads them.
        config: what kind of prior, and how it is fitted; None = N(0, I), not fitted.
        by_class: let the prior know the classes of `data`, where there are some.
        seed: of what is drawn of posteriors.
        device: where a prior of latents is fitted, None = the CPU; one of units, where the head lies.

    Raises:
        ValueError: too few latents, or a mixture of too many numbers; see `train.head.fitting`.
    """
    where = (device or torch.device("cpu")) if network is None else network.shift.device
    stop_names = _stop_names(data.training) if isinstance(config, FlowFitConfig) else set()
    x, y = _vectors(network, data, data.training, seed, where)
    held_out, of_held_out = _vectors(network, data, data.held_out, seed, where)
    n_classes = len(data.classes) if by_class and config is not None else 0
    mirrors = data.training.mean.shape[1]
    stops = torch.tensor([image_of(key) in stop_names for key in data.training.keys]).repeat_interleave(mirrors)
    prior, traces = _fitted((x, y), stops.to(x.device), config, n_classes)
    counts = {"fit": int((~stops).sum()), "stop": int(stops.sum()), "held_out": len(held_out)}
    if config is None:
        counts["fit"] = 0
    own: float | None = None
    if network is not None:
        with torch.inference_mode():
            e = network.condition(*data.told(of_held_out))
            own = -float(network.prior.log_prob(held_out, e).double().mean())
    labels = of_held_out if n_classes else None
    return PriorFit(
        prior=prior,
        held_out=(held_out, of_held_out),
        held_out_nats=mean_nats(prior, held_out, labels),
        standard_nats=mean_nats(Standard(x.shape[1]), held_out, None),
        own_nats=own,
        stop_nats=-max(traces[0]) if isinstance(config, FlowFitConfig) else None,
        traces=traces,
        n_vectors=counts,
    )


@torch.inference_mode()
def mean_nats(prior: FittedPrior, vectors: Tensor, labels: Tensor | None) -> float:
    """Return the mean of -log p in nats of (N, d) vectors, of labels (N,), or of any class (None)."""
    return -float(prior.log_prob(vectors, labels).double().mean())


def _fitted(
    vectors: Vectors, stops: Tensor, config: MixtureConfig | FlowFitConfig | None, n_classes: int
) -> tuple[FittedPrior, list[list[float]]]:
    """Return a prior and its traces; `stops`, (N,) bool, says which vectors a flow stops by."""
    x, y = vectors
    if isinstance(config, MixtureConfig):
        size = 8 * config.components * (n_classes if config.per_class and n_classes else 1) * x.shape[1] ** 2
        if size > _MOST_BYTES:
            raise ValueError(
                f"full covariances of {x.shape[1]} numbers take {size / 2**30:.0f} GiB, allowed: "
                f"{_MOST_BYTES >> 30}; take fewer components, or a flow"
            )
        fit = fit_mixture(x, config, y if n_classes else None, n_classes)
        return fit.prior, fit.traces
    if config is None:
        return Standard(x.shape[1]), []
    labels = (y[~stops], y[stops]) if n_classes else None
    flow = fit_flow(x[~stops], x[stops], config, labels, n_classes)
    return flow.prior, [flow.trace]


def _stop_names(latents: LatentSet) -> set[str]:
    """Return the images of a training set that a flow stops by: all crops and mirrors of one are on one side."""
    names = {image_of(key) for key in latents.keys}
    return hold_out(names, max(1, round(_STOP * len(names))))


def image_of(key: str) -> str:
    """Return the name of the image whose crop has a key."""
    return re.sub(r"#\d+$", "", key)


@torch.no_grad()
def _vectors(
    network: ConditionalHead | None, data: HeadData, latents: LatentSet, seed: int, device: torch.device
) -> Vectors:
    """Return vectors drawn from the posteriors of all latents and their mirrors, (N * M, d), and their labels."""
    rng, found = torch.Generator().manual_seed(seed), []
    labels = latents.labels.repeat_interleave(latents.mean.shape[1]).to(device)
    mean = latents.mean.flatten(0, 1)
    std = None if latents.std is None else latents.std.flatten(0, 1)
    for start in range(0, len(mean), _BATCH):
        at = slice(start, start + _BATCH)
        z = mean[at] if std is None else mean[at] + std[at] * torch.randn(mean[at].shape, generator=rng)
        if network is None:
            found.append(z.flatten(1).to(device))
            continue
        c, hidden = data.told(labels[at])
        noise = tuple(torch.randn(len(z), *shape, generator=rng).to(device) for shape in network.unit_shapes)
        found.append(network.encode(z.to(device), c, hidden, noise)[0][0])
    return torch.cat(found), labels


def figures(fit: PriorFit) -> dict[str, Any]:
    """Return what a fit is worth as plain JSON values."""
    return {name: value for name, value in vars(fit).items() if name not in ("prior", "held_out")}
