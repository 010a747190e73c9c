"""The adversarial side of a run: three phases, the adaptive weight, the discriminator's step, and what they remember.

    reconstruction --start--> warm-up (only the discriminator learns) --> ramp (its weight grows from 0) --> adversarial

Everything that decides is averaged over ranks first, so that all ranks decide alike; everything that is remembered is
in `state_dict`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from codec.pixels import round_to_8_bit
from train.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    r1_penalty,
)
from train.loss_config import AdversarialConfig
from train.schedules import parse_moment
from train.task import Step, Terms, Values

Phase = Literal["reconstruction", "warmup", "ramp", "adversarial"]
_LEAST_NORM = 1e-12  # of a gradient that something is divided by


class Adversary:
    """A discriminator and where its game stands.

    Attributes:
        discriminator: the network; the loop wraps and optimises it.
        started: (images, share of the run) where its warm-up began; None before.
        warm: the same where the warm-up ended.
        ratio: the last adaptive ratio, not capped; None until one was measured.
    """

    def __init__(self, config: AdversarialConfig, discriminator: PatchDiscriminator) -> None:
        self._config = config
        self.discriminator = discriminator
        self.started: tuple[int, float] | None = None
        self.warm: tuple[int, float] | None = None
        self.ratio: float | None = None
        self._anchors = (0.0, 0.0)  # LeCAM's moving averages of the mean logits: real, fake
        self._gradients: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this step's batches, at the last layer
        self._best_loss: float | None = None  # of the validations so far, and how many since had no gain (start auto)
        self._stale = 0

    def begin(self, step: Step) -> None:
        """Start or end the warm-up if its moment has come; called before each batch, acts at the first of a step."""
        start, here = self._config.start, (step.images, step.share)
        if self.started is None and start != "auto" and parse_moment(start).passed(*here) >= 1:
            self.started = here
        if self.started is not None and self.warm is None and _since(self.started, self._config.warmup, step) >= 1:
            self.warm = here

    def phase(self, step: Step) -> Phase:
        """Return the phase of a step."""
        if self.started is None:
            return "reconstruction"
        if self.warm is None:
            return "warmup"
        return "ramp" if self._ramp(step) < 1 else "adversarial"

    def plays(self, step: Step) -> bool:
        """Whether the generator has an adversarial term in this step."""
        return self.phase(step) in ("ramp", "adversarial")

    def weight(self, step: Step) -> float:
        """Return the weight of the generator's adversarial loss: weight x ramp x capped adaptive ratio."""
        if not self.plays(step):
            return 0.0
        ratio = 1.0
        if self._config.adaptive:
            # Not measured yet in the first step, whose ramp stands at 0 in any case.
            ratio = 0.0 if self.ratio is None else min(self.ratio, self._config.adaptive_cap)
        return self._config.weight * self._ramp(step) * ratio

    def _ramp(self, step: Step) -> float:
        assert self.warm is not None
        return _since(self.warm, self._config.ramp, step)

    def generator_term(self, x_hat: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the unweighted adversarial loss of reconstructions; the discriminator itself stays untouched."""
        with frozen(self.discriminator), step.autocast():
            logits = self.discriminator(x_hat)
        return generator_loss(logits, self._config.loss)

    def remember(self, reconstruction: torch.Tensor, adversarial: torch.Tensor) -> None:
        """Note the two losses' gradients at the decoder's last layer, of one batch."""
        self._gradients.append((reconstruction.detach(), adversarial.detach()))

    def critic_terms(self, critic: nn.Module, x: torch.Tensor, x_hat: torch.Tensor, step: Step) -> Terms:
        """Return the discriminator's objective on one batch.

        Args:
            critic: the discriminator, wrapped by the loop.
            x: (B, 3, H, W) in [-1, 1].
            x_hat: the same shape, detached.
            step: where the run stands.
        """
        config = self._config
        if config.round_fakes:  # the images too: those that were shrunken with their latents have left the 256 values
            x, x_hat = round_to_8_bit(x), round_to_8_bit(x_hat)
        with step.autocast():  # one forward for both: one reduction of gradients, and no batch sees itself alone
            logits = critic(torch.cat([x, x_hat])).float()
        real, fake = logits.chunk(2)
        loss = discriminator_loss(real, fake, config.loss)
        objective = loss
        values = {
            "d_loss": loss,
            "d_real": real.mean(),
            "d_fake": fake.mean(),
            "d_accuracy_real": (real > 0).float().mean(),
            "d_accuracy_fake": (fake < 0).float().mean(),
        }
        if config.r1_weight > 0 and step.number % config.r1_every == 0:
            values["r1"] = r1_penalty(self.discriminator, x)
            objective = objective + config.r1_weight * config.r1_every * values["r1"]
        if config.lecam_weight > 0:
            values["lecam"] = lecam_loss(real, fake, *self._anchors)
            objective = objective + config.lecam_weight * values["lecam"]
        return Terms(objective, {name: value.detach() for name, value in values.items()})

    def after_step(self, values: Values, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """Update ratio, anchors and phase; see `train.task.Task.after_step`."""
        if self._gradients:
            # The gradient of all batches of all ranks, so that the ratio is that of one large batch. It counts from the
            # next step on. Esser et al. 2021, arXiv:2012.09841 eq. 7.
            sums = [torch.stack(side).mean(0).flatten() for side in zip(*self._gradients, strict=True)]
            reconstruction, adversarial = reduce(torch.cat(sums)).chunk(2)
            ratio = float(reconstruction.norm() / adversarial.norm().clamp(min=_LEAST_NORM))
            self.ratio = ratio
            self._gradients.clear()
        if "d_real" in values:
            decay = self._config.lecam_decay
            self._anchors = (
                decay * self._anchors[0] + (1 - decay) * values["d_real"],
                decay * self._anchors[1] + (1 - decay) * values["d_fake"],
            )
        by_recipe = self._config.start != "auto" and self.started == (step.images, step.share)
        return ["the discriminator's warm-up starts"] if by_recipe else []

    def after_validation(self, loss: float, step: Step) -> list[str]:
        """Start the warm-up when the validation's loss no longer falls (start = "auto")."""
        config = self._config
        if self.started is not None or config.start != "auto":
            return []
        if self._best_loss is None or loss < self._best_loss * (1 - config.auto_tolerance):
            self._best_loss, self._stale = loss, 0
            return []
        self._stale += 1
        if self._stale < config.auto_patience:
            return []
        self.started = (step.images, step.share)
        return [f"the validation's loss has flattened at {self._best_loss:.4f}: the discriminator's warm-up starts"]

    def rewarm(self, step: Step) -> None:
        """Go back to the warm-up: the adversarial weight falls to 0 and grows again."""
        self.started, self.warm = (step.images, step.share), None

    def discard(self) -> None:
        """Forget what this step's batches gave; the step is left out."""
        self._gradients.clear()

    def logged(self, step: Step) -> dict[str, float | str]:
        """Return phase and weights for the log; ratio raw and capped."""
        out: dict[str, float | str] = {"phase": self.phase(step), "adversarial_weight": self.weight(step)}
        if self.ratio is not None:
            out |= {"adaptive_raw": self.ratio, "adaptive": min(self.ratio, self._config.adaptive_cap)}
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs besides the discriminator's weights."""
        return {
            "started": self.started,
            "warm": self.warm,
            "ratio": self.ratio,
            "anchors": self._anchors,
            "best_loss": self._best_loss,
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.started = None if state["started"] is None else (state["started"][0], state["started"][1])
        self.warm = None if state["warm"] is None else (state["warm"][0], state["warm"][1])
        self.ratio = state["ratio"]
        self._anchors = (state["anchors"][0], state["anchors"][1])
        self._best_loss, self._stale = state["best_loss"], state["stale"]


def _since(moment: tuple[int, float], length: str, step: Step) -> float:
    """The part of a length that has passed since a moment, 0..1."""
    return parse_moment(length).passed(step.images - moment[0], step.share - moment[1])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keep a network's parameters out of the graph, and in evaluation mode, while the context is open."""
    trains = module.training
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True).train(trains)
