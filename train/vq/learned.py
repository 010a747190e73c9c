"""Codebooks whose vectors are learned: running means (ema), by gradient, or under one linear map (simvq).

until vq.start: latents pass as they are, the last of them are kept in a pool -> k-means -> vectors
then, each step: ema: vector <- running sum / running share; dead vectors <- random latents of the step
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from train.draws import CODEBOOK, POOL, REVIVAL, rng
from train.losses import commitment_loss, vq_loss
from train.schedules import parse_moment
from train.task import Step
from train.vq.config import VQConfig
from train.vq.kmeans import kmeans, nearest
from train.vq.quantiser import Codes, Quantiser, Taken, rotated_through, straight_through
from train.vq.tokens import Extent, Reduce, StepTokens


class LearnedCodebook(Quantiser):
    """Nearest neighbours among learned vectors, which begin with what the encoder gives.

    Attributes:
        pool: (N, d) latents seen before the start, the newest last; part of the state, and empty after the start.
    """

    _term = "vq"

    def __init__(self, config: VQConfig, size: int, dim: int, *, trains: bool, trained: bool) -> None:
        """Prepare; see `Quantiser`.

        Args:
            config: of the quantiser.
            size: K.
            dim: d.
            trains: whether it learns.
            trained: whether the network's vectors are a codebook already, of an earlier run.
        """
        super().__init__(config, size, dim, trains=trains)
        self.started.fill_(trained or not self._waits)
        self.pool = torch.empty(0, dim)

    @property
    def _waits(self) -> bool:
        """Whether the vectors begin with latents, which have to be seen first."""
        return self.config.kmeans_init

    def get_extra_state(self) -> torch.Tensor:
        """The pool: unlike a buffer's, its size changes, and no average is taken of it."""
        return self.pool

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""
        self.pool = state.clone()

    def _vectors(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codebook, (K, d), with a gradient to what is learned."""
        return F.normalize(weight, dim=1) if self.config.cosine else weight

    def _quantise(self, z: torch.Tensor, weight: torch.Tensor) -> Codes:
        compared = F.normalize(z, dim=1) if self.config.cosine else z
        vectors = self._vectors(weight)
        if not bool(self.started):
            nothing = 0 * vectors.sum() + 0 * compared.sum()  # DDP waits for a gradient of each parameter
            return Codes(z_q=compared, z=compared.detach(), indices=None, terms={self._term: nothing})
        # Of raw latents, as diffusers does it: among vectors of one length the nearest is that of the smallest angle.
        flat = z.detach().movedim(1, -1)  # (B, h, w, d)
        indices = nearest(flat.reshape(-1, self.dim), vectors.detach()).reshape(flat.shape[:-1])
        chosen = F.embedding(indices, vectors).movedim(-1, 1).contiguous()
        through = rotated_through if self.config.rotation_trick else straight_through
        terms = {self._term: self.config.weight * self._loss(compared, chosen)} if self.trains else {}
        return Codes(z_q=through(compared, chosen), z=compared.detach(), indices=indices, terms=terms)

    def _loss(self, z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
        return vq_loss(z, z_q, self.config.beta)

    def _begin(self, weight: nn.Parameter, tokens: StepTokens, step: Step, reduce: Reduce) -> list[str]:
        """Keep latents, and begin with them when it is time."""
        extent = tokens.extent(step, reduce)
        most = self.config.kmeans_tokens * self.size
        fresh = tokens.draw(min(extent.n_tokens, most), POOL, step, extent, reduce)
        self.pool = torch.cat([self.pool.to(fresh), fresh])[-most:]
        if parse_moment(self.config.start).passed(step.images, step.share) < 1:
            return []
        line = self._first_vectors(weight, step, extent, reduce)
        self.started.fill_(True)
        self.replaced.fill_(True)
        self.share.fill_(1 / self.size)
        self.pool = self.pool[:0].clone()
        return [line]

    def _first_vectors(self, weight: nn.Parameter, step: Step, extent: Extent, reduce: Reduce) -> str:
        """Set the vectors by k-means of the pool; return a line to print."""
        config, n = self.config, len(self.pool)
        random = rng(step.seed, CODEBOOK, step.images)
        vectors, n_own = kmeans(
            self.pool, self.size, config.kmeans_iterations, random, extent, reduce, unit=config.cosine
        )
        weight.copy_(vectors)
        line = f"codebook: {self.size} vectors by k-means of {n} latents"
        if n_own < self.size:
            line += (
                f", of which only {n_own} are distinct: the other {self.size - n_own} vectors begin as copies of them, "
                "moved a little; a later vq.start or a smaller vq.codebook_size gives each its own"
            )
        return line

    def _learn(self, taken: Taken) -> list[str]:
        if self.config.cosine:
            taken.weight.copy_(F.normalize(taken.weight, dim=1))  # the optimizer leaves the sphere
        taken.values["codebook_revived"] = float(self._revive(taken))
        return []

    def _revive(self, taken: Taken) -> int:
        """Put random latents of the step in the place of vectors that are hardly used; return how many."""
        dead = torch.nonzero(self.share < self.config.revive_below / self.size)[:, 0]
        if not len(dead):
            return 0
        tokens, step, reduce = taken.tokens, taken.step, taken.reduce
        extent = tokens.extent(step, reduce)
        dead = dead[: extent.n_tokens]  # with more of them the others' turn comes with the next steps
        fresh = tokens.draw(len(dead), REVIVAL, step, extent, reduce)
        self._replace(taken.weight, dead, fresh)
        return len(dead)

    def _replace(self, weight: nn.Parameter, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        """Set vectors anew, with the share of one that is used as often as the others.

        Adam's moments of a row stay: the first one of a vector that was hardly chosen has fallen to almost nothing, and
        the second, if it were 0, would only make the first steps longer, whose bias nobody corrects by then.
        """
        weight[rows] = vectors
        self.share[rows] = 1 / self.size
        self.replaced[rows] = True

    def settle(self, average: torch.Tensor, weight: torch.Tensor, live: Quantiser) -> None:
        """See `Quantiser.settle`: one that was set anew is nobody's mean, and a mean of unit vectors is shorter."""
        rows = live.replaced if bool(live.started) else torch.ones_like(live.replaced)
        average[rows] = weight[rows]
        if self.config.cosine:
            average.copy_(F.normalize(average, dim=1))


class EMACodebook(LearnedCodebook):
    """Each vector is the running mean of the latents that chose it; no gradient reaches it.

    van den Oord et al. 2017 appendix A.1, arXiv:1711.00937, without smoothing of the counts: sums and shares of an
    unused vector fall alike, so that their quotient stays where it is until the vector is revived.

    Attributes:
        total: (K, d) running sum of the latents that chose each vector, over the number of latents.
    """

    total: torch.Tensor
    _term = "commitment"
    _wants_sums = True

    def __init__(self, config: VQConfig, size: int, dim: int, weight: torch.Tensor, **how: bool) -> None:
        """Prepare; see `LearnedCodebook`; `weight`: (K, d), the network's vectors."""
        super().__init__(config, size, dim, **how)
        vectors = F.normalize(weight.detach(), dim=1) if config.cosine else weight.detach()
        self.register_buffer("total", vectors / size)

    def _vectors(self, weight: torch.Tensor) -> torch.Tensor:
        return weight  # of length 1 already, where that is wanted

    def _loss(self, z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
        return commitment_loss(z, z_q, self.config.beta)

    def _first_vectors(self, weight: nn.Parameter, step: Step, extent: Extent, reduce: Reduce) -> str:
        line = super()._first_vectors(weight, step, extent, reduce)
        self.total.copy_(weight / self.size)
        return line

    def _learn(self, taken: Taken) -> list[str]:
        weight = taken.weight
        assert taken.sums is not None
        self.total.lerp_(taken.sums, 1 - self.config.decay)
        known = self.share > torch.finfo(torch.float32).tiny  # long unused and never revived: stays where it was
        mean = torch.where(known[:, None], self.total / self.share[:, None], weight)
        weight.copy_(mean)
        return super()._learn(taken)

    def _replace(self, weight: nn.Parameter, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        super()._replace(weight, rows, vectors)
        self.total[rows] = vectors / self.size


class SimVQCodebook(LearnedCodebook):
    """Fixed random vectors under one learned linear map: all move together, so none is left behind.

    Zhu et al. 2024 section 4, arXiv:2411.02038; here the map begins with the mean and covariance of the latents.

    Attributes:
        base: (K, d) the fixed vectors.
        projection: the map; the network's own vectors are what it gives.
    """

    base: torch.Tensor

    def __init__(self, config: VQConfig, size: int, dim: int, weight: torch.Tensor, **how: bool) -> None:
        """Prepare; see `LearnedCodebook`; `weight`: (K, d), the network's vectors, which a trained one goes on from."""
        super().__init__(config, size, dim, **how)
        self.register_buffer("base", weight.detach().clone() if how["trained"] else torch.randn(size, dim))
        self.projection = nn.Linear(dim, dim)
        with torch.no_grad():
            self.projection.weight.copy_(torch.eye(dim))
            self.projection.bias.zero_()
        self.projection.requires_grad_(self.trains)

    @property
    def _waits(self) -> bool:
        return True

    def _vectors(self, weight: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.projection(self.base)
        return vectors

    def _first_vectors(self, weight: nn.Parameter, step: Step, extent: Extent, reduce: Reduce) -> str:
        pool = self.pool.double()
        mean = pool.mean(0)
        covariance = (pool - mean).T @ (pool - mean) / len(pool)
        covariance += 1e-6 * (covariance.trace() + 1e-6) * torch.eye(self.dim).to(covariance)
        self.projection.weight.copy_(reduce(torch.linalg.cholesky(covariance).float()))
        self.projection.bias.copy_(reduce(mean.float()))
        weight.copy_(self._vectors(weight))
        return f"codebook: {self.size} random vectors with mean and covariance of {len(pool)} latents"

    def _learn(self, taken: Taken) -> list[str]:
        taken.weight.copy_(self._vectors(taken.weight))
        return []

    def settle(self, average: torch.Tensor, weight: torch.Tensor, live: Quantiser) -> None:
        """See `Quantiser.settle`: what the averaged map gives; at its first setting, what that gave."""
        assert isinstance(live, SimVQCodebook)
        if bool(live.replaced.any()) or not bool(live.started):
            self.projection.load_state_dict(live.projection.state_dict())
        average.copy_(self._vectors(average))
