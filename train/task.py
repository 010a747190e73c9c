"""What the training loop asks of a task. The loop knows nothing of images, perceptual losses or discriminators."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from train.bad_samples import BadSamples
from train.config import OptimConfig, RunConfig
from train.loss_config import AdversarialConfig


class LoopConfig(Protocol):
    """What the loop reads of a config; the rest of it is the task's."""

    @property
    def optim(self) -> OptimConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def adversarial(self) -> AdversarialConfig:
        """Of the critic; not looked at where there is none."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        ...


class Source(Protocol):
    """Where the loop's batches come from; see `train.feed.Feed`, which reads images.

    A batch is a dict of tensors and lists; "key" names its samples, and "bad" holds the `BadSample`s met on the way.
    """

    @property
    def bad(self) -> BadSamples: ...

    def describe(self) -> str:
        """Return one line on the data."""
        ...

    def stage(self, share: float) -> bool:
        """Return what batches to read when `share` (0..1) of the run is done; read anew where it changes."""
        ...

    def batches(self, share: float, start: int) -> Iterator[dict[str, Any]]:
        """Yield this rank's batches without end, from `start` samples (over all ranks) on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a run stands when one batch of one rank is computed, and what the loop lends for it.

    Attributes:
        number: optimizer steps done.
        images: images seen before this step, over all ranks.
        share: the part of the run that is done, 0..1.
        seed: the run's.
        positions: where the batch's samples stand in the run's sequence; what is random is drawn from (seed, position),
            so that neither ranks nor accumulation change it.
        autocast: a context for the networks' forward passes.
    """

    number: int
    images: int
    share: float
    seed: int
    positions: range
    autocast: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Terms:
    """What one batch gives.

    Attributes:
        objective: scalar whose backward pass gives the gradients; its value means nothing.
        values: what to log, scalars or 1-D; means over the batch, so that their mean over ranks is that of all images.
        carry: handed from the generator's step to the critic's.
    """

    objective: torch.Tensor
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    carry: Any = None


@runtime_checkable
class Tally(Protocol):
    """What one sample contributes to a metric that is no mean over samples."""

    def __add__(self, other: Any) -> Any: ...
    def figures(self) -> dict[str, float]:
        """Return the metrics that the sum over all samples gives."""
        ...


Values = dict[str, Any]
"""Logged values as plain floats, or lists of them."""


class Task(Protocol):
    """One thing that can be trained: an autoencoder, a denoiser of latents; a prior over codes later.

    Attributes:
        module: everything trainable, wrapped by the loop (DDP) and averaged (EMA); its forward does the whole pass.
        critic: the adversary, wrapped by the loop with an optimizer of its own; None where there is none.
    """

    module: nn.Module
    critic: nn.Module | None

    def to(self, device: torch.device) -> None:
        """Move what is not in `module` or `critic` (frozen networks of losses) to a device."""
        ...

    def compile(self) -> None:
        """torch.compile what gains from it, in place."""
        ...

    def describe(self) -> dict[str, str]:
        """Return short facts about the network and the losses, to print when the run starts."""
        ...

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the trainable parameters of `module` as optimizer groups; a group may have a rate of its own."""
        ...

    def generator_step(self, module: nn.Module, batch: Mapping[str, Any], step: Step) -> Terms:
        """Compute one batch.

        Args:
            module: `self.module`, wrapped: call it, so that gradients are reduced over ranks.
            batch: what the loader gave, on the device.
            step: where the run stands.
        """
        ...

    def critic_step(self, critic: nn.Module, batch: Mapping[str, Any], carry: Any, step: Step) -> Terms | None:
        """Compute the critic's objective on the same batch; None when it does not train now.

        Args:
            critic: `self.critic`, wrapped: call it once.
            batch: as in `generator_step`.
            carry: what `generator_step` handed over; nothing of it may lead back into `module`.
            step: where the run stands.
        """
        ...

    def after_step(self, values: Values, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """Take note of a finished optimizer step; called on every rank with equal values.

        Args:
            values: of the step, averaged over its batches and over ranks.
            step: where the run stood when it was taken, with the positions of the first batch.
            reduce: averages a tensor over ranks.

        Returns:
            Lines to print: what changed, what is wrong and what is done about it.
        """
        ...

    def discard_step(self) -> None:
        """Forget what this step's batches gave: it was not finite and is left out; `after_step` is not called."""
        ...

    def after_validation(self, metrics: Mapping[str, float], step: Step) -> list[str]:
        """Take note of a validation; called on every rank with equal metrics. Returns lines to print."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what else an exact resume needs, as plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...

    def evaluate(
        self, module: nn.Module, device: torch.device, rank: int, n_ranks: int
    ) -> tuple[list[dict[str, Any]], np.ndarray | None]:
        """Return a row of metrics per held-out sample of this rank, and a picture, (H, W, 3) uint8, or None.

        A metric is a number, whose mean over the samples counts, or a `Tally`.

        Over all ranks every held-out sample has exactly one row. "loss" is what the best checkpoint is chosen by.
        """
        ...

    def export(self, module: nn.Module, out: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Write the model folder of `module` to `out`.

        Args:
            module: the averaged weights.
            out: the folder; created.
            record: what the run knows about itself (images seen, time, metrics, versions), for the model card.
            device: where `module` lies.

        Returns:
            What the run should print about the model.
        """
        ...
