"""What every quantiser is: latents -> codebook vectors, with gradients past them; statistics once per step.

    z (B, d, h, w) -> compared -> indices -> z_q -> decoder        vectors: network.quantize.embedding.weight, (K, d)
         ^------------- straight, or turned ------------ gradient

The vectors lie in the network itself, where diffusers looks for them: what is exported is what was trained. All is
float32, whatever the networks compute in. What is learned from a step's latents is learned in `update`, after the
optimizer's step, from sums over all ranks; never in evaluation, never of a step that is left out.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from train.task import Step, Values
from train.vq.config import VQConfig
from train.vq.tokens import Reduce, StepTokens
from train.vq.usage import perplexity

_TINY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Codes:
    """What the quantiser makes of one batch.

    Attributes:
        z_q: (B, d, h, w) for the decoder: vectors of the codebook, to the bit, with a gradient to the latents.
        z: (B, d, h, w) the latents as they were compared with the codebook, detached.
        indices: (B, h, w) int64; None where the latents passed as they are.
        terms: named losses, weighted scalars.
        frequencies: means over the batch that the quantiser wants to see in `update`; None where it wants none.
    """

    z_q: torch.Tensor
    z: torch.Tensor
    indices: torch.Tensor | None
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    frequencies: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A finished step, as a quantiser learns from it; see `Quantiser.update`.

    Attributes:
        weight: (K, d) the vectors; changed in place.
        sums: of `StepTokens.totals`, where the quantiser wants them.
        tokens: the step's latents, of this rank.
        step: where the run stood.
        reduce: averages over ranks.
        values: takes what is to be logged.
    """

    weight: nn.Parameter
    sums: torch.Tensor | None
    tokens: StepTokens
    step: Step
    reduce: Reduce
    values: Values


class Quantiser(nn.Module):
    """One quantiser; subclasses differ in how they choose vectors, and in what they learn.

    Attributes:
        size: K.
        dim: d.
        trains: whether it learns; not where the decoder is trained alone.
        share: (K,) running share of the latents that chose each vector.
        started: whether latents are quantised already.
        replaced: (K,) whose vectors jumped in the last step: averages of weights jump too.
    """

    share: torch.Tensor
    started: torch.Tensor
    replaced: torch.Tensor

    def __init__(self, config: VQConfig, size: int, dim: int, *, trains: bool) -> None:
        super().__init__()
        self.config = config
        self.size, self.dim, self.trains = size, dim, trains
        self.register_buffer("share", torch.full((size,), 1.0 / size))
        self.register_buffer("started", torch.tensor(True))
        self.register_buffer("replaced", torch.zeros(size, dtype=torch.bool))

    def forward(self, z: torch.Tensor, weight: torch.Tensor) -> Codes:
        """Quantise a batch.

        Args:
            z: (B, d, h, w) raw latents.
            weight: (K, d) the vectors, as the network holds them.

        Raises:
            ValueError: latents of another number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.dim:
            raise ValueError(f"latents of shape {tuple(z.shape)}, expected (B, {self.dim}, h, w): vq.codebook_dim")
        with torch.autocast(z.device.type, enabled=False):
            return self._quantise(z.float(), weight)

    @abstractmethod
    def _quantise(self, z: torch.Tensor, weight: torch.Tensor) -> Codes:
        """See `forward`; float32, outside autocast."""

    def update(self, weight: nn.Parameter, tokens: StepTokens, step: Step, reduce: Reduce, values: Values) -> list[str]:
        """Learn from a finished step; called on every rank.

        Args:
            weight: (K, d) the vectors; changed in place.
            tokens: the step's latents, of this rank.
            step: as given to `train.task.Task.after_step`.
            reduce: averages over ranks.
            values: takes what is to be logged: usage and perplexity of the step's latents, over all ranks, and the
                perplexity of the running shares.

        Returns:
            Lines to print.
        """
        with torch.no_grad():
            self.replaced.zero_()
            if not bool(self.started):
                return self._begin(weight, tokens, step, reduce)
            share, sums = tokens.totals(self.size, reduce, sums=self._wants_sums)
            self.share.lerp_(share, 1 - self.config.decay)
            values["codebook_usage"] = float((share > 0).float().mean())
            values["codebook_perplexity"] = perplexity(share.cpu().numpy())
            running = self.share / self.share.sum()
            values["codebook_running_perplexity"] = perplexity(running.cpu().numpy())
            if not self.trains:
                return []
            return self._learn(Taken(weight=weight, sums=sums, tokens=tokens, step=step, reduce=reduce, values=values))

    _wants_sums = False

    def _begin(self, weight: nn.Parameter, tokens: StepTokens, step: Step, reduce: Reduce) -> list[str]:
        """Learn from a step whose latents were not quantised."""
        return []

    def _learn(self, taken: Taken) -> list[str]:
        """Learn from a step whose latents were."""
        return []

    def settle(self, average: torch.Tensor, weight: torch.Tensor, live: "Quantiser") -> None:
        """Make averaged vectors a codebook again; `self` is the averaged quantiser.

        Args:
            average: (K, d) the averaged vectors; changed in place.
            weight: (K, d) the vectors that are trained.
            live: the quantiser that is trained.
        """


def straight_through(z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """Return z_q, to the bit, whose gradient goes to z as it is (Bengio et al. 2013, arXiv:1308.3432)."""
    return z_q.detach() + (z - z.detach())


def rotated_through(z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """Return z_q, to the bit, whose gradient goes to z by the turn and scaling that bring z onto z_q.

    Fifty et al. 2024 section 4.2, arXiv:2410.06424: a reflection at the bisector of the two, and one at z_q. Where the
    two point away from each other there is no such turn, and the gradient goes straight.

    Args:
        z: (B, d, h, w).
        z_q: the same shape.
    """
    with torch.no_grad():
        length, length_q = z.norm(dim=1, keepdim=True), z_q.norm(dim=1, keepdim=True)
        unit, unit_q = F.normalize(z, dim=1), F.normalize(z_q, dim=1)
        bisector = unit + unit_q
        opposed = bisector.norm(dim=1, keepdim=True) < 1e-3
        bisector = F.normalize(bisector, dim=1)
        scale = length_q / length.clamp(min=_TINY)
    along = (z * bisector).sum(1, keepdim=True)
    turned = z - 2 * bisector * along + 2 * unit_q * (z * unit).sum(1, keepdim=True)
    turned = torch.where(opposed, z, scale * turned)
    return z_q.detach() + (turned - turned.detach())
