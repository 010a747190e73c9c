"""A prior fitted to a head's units after training: what p(u|c) of the training misses of the units that occur.

    training latents -> q(u|z, c), drawn -> mixture or flow -> gain of held-out units -> `codec.head.folder.add_fitted`

Entry: `fit_prior`. Imports torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codec.head.network import ConditionalHead
from codec.head.second_stage import FittedPrior
from train.denoiser_feed import LatentSet
from train.head.fitting import FlowFitConfig, MixtureConfig, fit_flow, fit_mixture
from train.head.latents import HeadData

_BATCH = 64


@dataclass(frozen=True)
class PriorFit:
    """A fitted prior, and what it is worth.

    Attributes:
        prior: of the first level's units.
        own_nats: -log p(u|c) of the head's own prior, mean over units drawn of the held-out latents' posteriors.
        fitted_nats: the same of the fitted one. The less, the smaller the KL that samples do not know of.
    """

    prior: FittedPrior
    own_nats: float
    fitted_nats: float


def fit_prior(network: ConditionalHead, data: HeadData, config: MixtureConfig | FlowFitConfig) -> PriorFit:
    """Fit a prior to the units of the training's latents, by class where there are classes.

    Args:
        network: a trained head, wherever it lies.
        data: what it was trained on; `train.head.latents.load_data` reads it.
        config: what kind of prior, and how it is fitted; its seed draws the units too.

    Raises:
        ValueError: too few latents, see `train.head.fitting`.
    """
    x, held_out = (_units(network, data, latents, config.seed) for latents in (data.training, data.held_out))
    y, of_held_out = (each.labels.repeat_interleave(each.mean.shape[1]) for each in (data.training, data.held_out))
    n_classes = len(data.classes)
    prior: FittedPrior
    if isinstance(config, MixtureConfig):
        prior = fit_mixture(x, config, y if n_classes else None, n_classes).prior
    else:
        labels = (y.to(x.device), of_held_out.to(x.device)) if n_classes else None
        prior = fit_flow(x, held_out, config, labels, n_classes).prior
    with torch.inference_mode():
        e = network.condition(data.conditions(of_held_out.to(x.device)), _hidden(data, len(held_out), x.device))
        own = -network.prior.log_prob(held_out, e).double().mean()
        fitted = -prior.log_prob(held_out, of_held_out.to(x.device) if n_classes else None).double().mean()
    return PriorFit(prior, float(own), float(fitted))


def _hidden(data: HeadData, n: int, device: torch.device) -> Tensor:
    return torch.full((n,), not data.has_conditions, device=device)


@torch.inference_mode()
def _units(network: ConditionalHead, data: HeadData, latents: LatentSet, seed: int) -> Tensor:
    """Return units drawn from the posteriors of all latents and their mirrors, (N * M, U)."""
    device, rng = network.shift.device, torch.Generator().manual_seed(seed)
    n, mirrors = latents.mean.shape[:2]
    labels, found = latents.labels.repeat_interleave(mirrors), []
    mean = latents.mean.flatten(0, 1)
    std = None if latents.std is None else latents.std.flatten(0, 1)
    for start in range(0, n * mirrors, _BATCH):
        at = slice(start, start + _BATCH)
        z = mean[at] if std is None else mean[at] + std[at] * torch.randn(mean[at].shape, generator=rng)
        c, hidden = data.conditions(labels[at].to(device)), _hidden(data, len(z), device)
        noise = tuple(torch.randn(len(z), *shape, generator=rng).to(device) for shape in network.unit_shapes)
        found.append(network.encode(z.to(device), c, hidden, noise)[0][0])
    return torch.cat(found).clone()
