"""The task of a head: a CVAE learns normalized latents, given a condition.

    latents, condition -> hidden conditions, noise, times (seed, position) -> ConditionalHead -> error + weight * KL
    units of the posterior -> critic: drawn together, or put together at random?            (objective.kind factor)
                              critic: of which class?                                        (objective.independence)

Entry: `HeadTask`, for `train.trainer.Trainer`. The network knows nothing of images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codec.engine import Engine
from codec.errors import UsageError
from codec.head.gaussian import Gaussian
from codec.head.network import ConditionalHead, Noise, Outputs
from codec.rectified_flow import training_times
from train import draws
from train.adversary import frozen
from train.head.card import write_folder
from train.head.config import HeadConfig
from train.head.latents import HeadData
from train.head.measure import Held, measure, sentences
from train.head.objectives import (
    ConditionCritic,
    TotalCorrelationCritic,
    class_surprise,
    critic_loss,
    decompose,
    label_entropy,
    permute_dims,
    total_correlation,
    weighted_kl,
)
from train.schedules import kl_factor, parse_moment
from train.task import Step, Terms, Values

TIME, NOISE, LABEL, UNITS, PERMUTE = 20, 21, 22, 26, 28  # streams of `train.draws`; UNITS + 1 of the second level


@dataclass(frozen=True)
class Carried:
    """What a critic looks at.

    Attributes:
        units: (B, U) of the first level, without a gradient.
        label: (B,) int64.
        told: (B,) bool: the network knew the condition.
    """

    units: torch.Tensor
    label: torch.Tensor
    told: torch.Tensor


class HeadTask:
    """Trains a head; see `train.task.Task`.

    Batches are {"latents": (B, D, h, w) normalized, "label": (B,) int64, "key", "bad"}, as `LatentFeed` gives them.
    """

    def __init__(self, config: HeadConfig, data: HeadData, engine: Engine | None = None) -> None:
        """Build the network.

        Args:
            config: the recipe.
            data: what is learned from, and what is held out.
            engine: the autoencoder, for validation in pixels; None = without.
        """
        self._config, self._data, self._engine = config, data, engine
        if config.objective.kind == "tcvae" and len(data.training) < config.optim.batch_size:
            n, size = len(data.training), config.optim.batch_size
            raise UsageError(f"{config.data.cache}: {n} samples to learn from, batches of {size} need as many")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            network = ConditionalHead(config.head, data.space)
            self.critic = self._build_critic()
        network.standardise(data.training.moments(), _seen_embeddings(data), _examples(data, config.head.components))
        self.module: nn.Module = network
        self._label_entropy = label_entropy(data.training.labels) if config.objective.independence else 0.0
        self._held = Held.of(data, config.run.seed)

    def _build_critic(self) -> nn.Module | None:
        objective, units = self._config.objective, self._config.head.units
        if objective.kind == "factor":
            return TotalCorrelationCritic(units, objective.critic_width)
        if objective.independence:
            return ConditionCritic(units, len(self._data.classes), objective.critic_width)
        return None

    def to(self, device: torch.device) -> None:
        """See `train.task.Task.to`."""

    def compile(self) -> None:
        """See `train.task.Task.compile`."""
        self.module.compile()

    def describe(self) -> dict[str, str]:
        """See `train.task.Task.describe`."""
        head, data, objective = self._config.head, self._data, self._config.objective
        n_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        channels, height, width = data.training.shape
        units = f"{head.units} units" + (f" and {head.spatial_units} channels below" if head.levels == 2 else "")
        condition = f"{len(data.classes)} classes"
        if data.embeddings is not None:
            condition = f"embeddings of {data.embeddings.shape[1]} numbers"
        out = {
            "network": f"CVAE, {head.decoder} decoder, width {head.width}, depth {head.depth}, {units} (posterior "
            f"{head.posterior}, prior {head.prior}), latents {channels} x {height} x {width}, "
            f"{n_parameters / 1e6:.2f} M parameters, {condition if data.has_conditions else 'no condition'}",
            "loss": self._describe_loss(),
            "held out": f"{len(data.held_out)} samples"
            + (f"; {data.n_dropped} training samples left out, whose images are among them" if data.n_dropped else ""),
        }
        if self.critic is not None:
            n_critic = sum(parameter.numel() for parameter in self.critic.parameters())
            what = "total correlation" if objective.kind == "factor" else "units' class"
            out["critic"] = f"{n_critic / 1e6:.2f} M parameters, of the {what}, lr {objective.critic_lr:g}"
        return out

    def _describe_loss(self) -> str:
        head, objective = self._config.head, self._config.objective
        error = "-log p(z|u, c)" if head.decoder == "gaussian" else "squared error of the velocity, t logit-normal"
        parts = {
            "beta": "KL",
            "tcvae": f"(MI + {objective.total_correlation:g} TC + dimension-wise KL)",
            "factor": "KL",
        }
        text = f"{error} + {objective.beta:g} {parts[objective.kind]} (nats, mean over B, D, h, w)"
        if objective.kind == "factor":
            text += f" + {objective.beta * objective.total_correlation:g} TC by a critic"
        text += f", weight {objective.schedule}"
        if objective.independence:
            text += f" + {objective.beta * objective.independence:g} nats that units say of the class, by a critic"
        return text + (f", {objective.free_bits:g} nats free for each unit" if objective.free_bits else "")

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """See `train.task.Task.parameter_groups`; weight decay is for matrices and kernels alone."""
        parameters = list(self.module.parameters())
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim == 1]
        return [{"params": matrices, "peak_lr": lr}, {"params": others, "peak_lr": lr, "weight_decay": 0.0}]

    # --- a step -------------------------------------------------------------------------------------------------

    def generator_step(self, module: nn.Module, batch: Mapping[str, Any], step: Step) -> Terms:
        """See `train.task.Task.generator_step`."""
        z, at = batch["latents"], step.positions
        hidden = draws.uniform(step.seed, LABEL, at, ()) < self._config.objective.condition_dropout
        if not self._data.has_conditions:
            hidden = torch.ones_like(hidden)
        c = self._data.conditions(batch["label"])
        with step.autocast():
            out: Outputs = module(z, c, hidden.to(z.device), self._noise(z, step))
        error = out.error.float().mean()
        weight = self._weight(step)
        kl, values = self._kl(out, step)
        carry = Carried(units=out.units[0].detach(), told=~hidden.to(z.device), label=batch["label"].to(z.device))
        if self._config.objective.independence:
            said = self._said_of_the_class(out.units[0], carry, step)
            kl, values = kl + self._config.objective.independence * said, values | {"class_nats": said.detach()}
        loss = error + weight * kl / self._data.space.n
        nats = torch.stack([each.detach().flatten(1).sum(1).mean() for each in out.kl])
        values |= {
            "loss": loss.detach(),
            "error": error.detach(),
            "kl": nats.sum(),
            "kl_weight": loss.new_tensor(weight),
        }
        if len(nats) == 2:
            values |= {"kl_1": nats[0], "kl_2": nats[1]}
        return Terms(loss, values, carry=carry)

    def _noise(self, z: torch.Tensor, step: Step) -> Noise:
        network, at = _network(self.module), step.positions
        units = tuple(
            draws.normal(step.seed, UNITS + level, at, shape).to(z.device)
            for level, shape in enumerate(network.unit_shapes)
        )
        if self._config.head.decoder == "gaussian":
            return Noise(units=units)
        time = training_times(draws.normal(step.seed, TIME, at, ())).to(z.device)
        return Noise(
            units=units, time=time, latents=draws.normal(step.seed, NOISE, at, tuple(z.shape[1:])).to(z.device)
        )

    def _weight(self, step: Step) -> float:
        """Return the KL's weight, beta included."""
        config = self._config.objective
        ramp = parse_moment(config.ramp)
        return config.beta * kl_factor(config.schedule, ramp, config.cycles, config.cycle_ramp, step.images, step.share)

    def _kl(self, out: Outputs, step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what the weight multiplies, in nats, and what is to be logged of it."""
        config = self._config.objective
        values: dict[str, torch.Tensor] = {}
        if config.kind == "tcvae":
            parts = decompose(
                out.units[0], out.posteriors[0], len(self._data.training), prior=_expanded(out.prior, out.units[0])
            )
            kl = parts.weighted(beta=config.total_correlation)
            names = ("index_code_mi", "total_correlation", "dimension_kl")
            values |= {name: getattr(parts, name).detach() for name in names}
        else:
            kl = weighted_kl(out.kl[0], free_nats=config.free_bits)
        if len(out.kl) == 2:
            kl = kl + weighted_kl(out.kl[1].sum((2, 3)), free_nats=config.free_bits)
        if config.kind == "factor":
            assert self.critic is not None
            with frozen(self.critic), step.autocast():
                tc = total_correlation(self.critic(out.units[0]))
            kl = kl + config.total_correlation * tc
            values["total_correlation"] = tc.detach()
        return kl, values

    def _said_of_the_class(self, u: torch.Tensor, carry: Carried, step: Step) -> torch.Tensor:
        """Return nats that units say about the class as the critic reads them: those of images whose class is told."""
        assert self.critic is not None
        with frozen(self.critic), step.autocast():
            logits = self.critic(u)
        return (self._label_entropy - class_surprise(logits, carry.label, carry.told)).clamp_min(0)

    def critic_step(self, critic: nn.Module, batch: Mapping[str, Any], carry: Carried, step: Step) -> Terms | None:
        """See `train.task.Task.critic_step`.

        factor: one half of the batch as it is, the other one permuted; independence: classes of units.
        """
        if self._config.objective.kind != "factor":
            with step.autocast():
                logits = critic(carry.units)
            loss = class_surprise(logits, carry.label, carry.told)
            return Terms(loss, {"critic_loss": loss.detach()})
        u = carry.units
        half = len(u) // 2
        keys = draws.uniform(step.seed, PERMUTE, step.positions, tuple(u.shape[1:])).to(u.device)
        permuted = permute_dims(u[half:], keys[half:])
        with step.autocast():
            logits = critic(torch.cat([u[:half], permuted]))
        together, apart = logits.float().split([half, len(u) - half])
        loss = critic_loss(together, apart)
        right = torch.cat([together > 0, apart < 0]).float().mean()
        return Terms(loss, {"critic_loss": loss.detach(), "critic_accuracy": right})

    def after_step(self, values: Values, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """See `train.task.Task.after_step`."""
        return []

    def discard_step(self) -> None:
        """See `train.task.Task.discard_step`."""

    # --- validation, export -------------------------------------------------------------------------------------

    def after_validation(self, metrics: Mapping[str, float], step: Step) -> list[str]:
        """See `train.task.Task.after_validation`; a line of warning where units have collapsed."""
        return sentences(metrics, self._config)

    def evaluate(
        self, module: nn.Module, device: torch.device, rank: int, n_ranks: int
    ) -> tuple[list[dict[str, Any]], np.ndarray | None]:
        """Measure this rank's held-out samples; see `train.task.Task.evaluate` and `train.head.measure.measure`.

        Reconstructions, which cost most, are made by the averaged weights alone.
        """
        averaged = module is not self.module
        chosen = range(rank, len(self._held.latents), n_ranks)
        return measure(_network(module), self._held, chosen, self._config, device, self._engine, draw=averaged)

    def state_dict(self) -> dict[str, Any]:
        """See `train.task.Task.state_dict`: everything is in the module; what it was learned from is named, for a
        resume and an export."""
        data = self._data
        return {
            "encoder": data.origin.encoder_id,
            "classes": list(data.classes),
            "space": data.space.to_json(),
            "training samples": data.digests[0],
            "held-out samples": data.digests[1],
            "conditions of the training": data.condition_digest(data.training),
            "conditions of the held-out samples": data.condition_digest(data.held_out),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `train.task.Task.load_state_dict`."""

    def export(self, module: nn.Module, out: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Write the head's folder; see `codec.head.folder` and `train.head.card`."""
        return write_folder(_network(module), out, self._data, record, self._config)


def _network(module: nn.Module) -> ConditionalHead:
    assert isinstance(module, ConditionalHead)
    return module


def _expanded(prior: Gaussian | None, like: torch.Tensor) -> Gaussian | None:
    return None if prior is None else Gaussian(prior.mean.expand_as(like), prior.logvar.expand_as(like))


def _seen_embeddings(data: HeadData) -> torch.Tensor | None:
    """Return the embeddings of the training, (n, E): those of held-out images, or of none, say nothing of it."""
    return None if data.embeddings is None else data.embeddings[data.training.labels]


def _examples(data: HeadData, n: int) -> torch.Tensor:
    """Return n training latents at even distances, (n, D, h, w) normalized; some more than once where they are few."""
    every: Sequence[int] = np.linspace(0, len(data.training) - 1, n).round().astype(int).tolist()
    return data.training.mean[list(every), 0]
