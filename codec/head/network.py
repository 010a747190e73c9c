"""The network of a head: a CVAE of normalized latents, whose three parts the condition c modulates.

    z, c -> Encoder -> q(u|z, c)         c -> prior -> p(u|c)         u, c -> TopDown -> decoder -> p(z|u, c)

u is U numbers that describe an image as a whole and, with a second level, a grid of further ones below them:
q(u2|z, u1, c) and p(u2|u1, c), which both look at the features of the way down (Sonderby et al. 2016,
arXiv:1602.02282). Latents are standardised inside, each channel by the training's mean and deviation; outside they are
normalized ones, as a diffusion model sees them. Imports torch alone.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codec.head.blocks import Condition
from codec.head.config import NetworkConfig, Space
from codec.head.decoders import FlowDecoder, GaussianDecoder
from codec.head.flows import AutoregressiveFlow, FlowSize, draw
from codec.head.gaussian import Gaussian
from codec.head.levels import Encoded, Encoder, Second, TopDown
from codec.head.priors import ConditionalGaussian, FlowPrior, Prior, StandardNormal, VampPrior
from codec.rectified_flow import guided, sample

Units = tuple[Tensor, ...]
"""The units of a batch, one tensor for each level: (B, U), (B, U2, h2, w2)."""

_DEAD = 1e-6  # deviation below which a channel says nothing
_LEAST_DEVIATION = 1e-2  # of a number of embeddings, in units of the mean over all


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is random in one pass.

    Attributes:
        units: standard normal, of the posteriors; shapes of `ConditionalHead.unit_shapes`.
        time: (B,) in [0, 1], where a flow-matching decoder is looked at; None with a Gaussian one.
        latents: (B, D, h, w) standard normal, of that decoder; None with a Gaussian one.
    """

    units: Units
    time: Tensor | None = None
    latents: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What one pass gives, float32.

    Attributes:
        error: (B,) how ill z is predicted, mean over D, h, w: nats of a Gaussian decoder, for standardised latents; the
            squared error of the velocity of a flow-matching one.
        kl: nats of each level: of each unit, (B, U), or of all together, (B, 1), where a flow or a mixture mixes them;
            of the second level (B, U2, h2, w2).
        units: drawn from the posteriors.
        posteriors: of each level, before any flow.
        prior: p(u|c) of the first level where it is Gaussian; None = N(0, I), or none.
    """

    error: Tensor
    kl: Units
    units: Units
    posteriors: tuple[Gaussian, ...]
    prior: Gaussian | None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a flow-matching decoder draws latents; a Gaussian one gives its mean and looks at nothing here.

    Attributes:
        noise: (B, D, h, w) standard normal: where it starts.
        steps: of the way from noise to latents.
        heun: second-order steps, of two passes each.
    """

    noise: Tensor
    steps: int = 20
    heun: bool = False


class ConditionalHead(nn.Module):
    """See the module.

    Attributes:
        config: its sizes.
        space: what it is for.
        unit_shapes: shape of each level's units, without the batch.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: NetworkConfig, space: Space) -> None:
        """Build it with weights from torch's generator; `standardise` makes it fit its latents."""
        super().__init__()
        self.config, self.space = config, space
        features = 2 * config.width
        self.register_buffer("shift", torch.zeros(space.channels))
        self.register_buffer("scale", torch.ones(space.channels))
        self.condition = Condition(features, n_classes=space.n_classes, embedding_width=space.embedding_width)
        self.encoder = Encoder(config, space, features)
        self.top_down = TopDown(config, space, features)
        self.second = Second(config, space, features) if config.levels == 2 else None
        self.unit_shapes: list[tuple[int, ...]] = [(config.units,)]
        if config.levels == 2:
            self.unit_shapes.append((config.spatial_units, *space.grids[space.second]))
        size = FlowSize(steps=config.flow_steps, width=config.flow_width)
        self.flow = AutoregressiveFlow(config.units, features, size) if config.posterior == "iaf" else None
        self.prior = self._build_prior(features, size)
        self.decoder: GaussianDecoder | FlowDecoder = (
            GaussianDecoder(config, space) if config.decoder == "gaussian" else FlowDecoder(config, space, features)
        )

    def _build_prior(self, features: int, size: FlowSize) -> Prior:
        config = self.config
        if config.prior == "conditional":
            return ConditionalGaussian(config.units, features, features)
        if config.prior == "flow":
            return FlowPrior(config.units, features, size)
        if config.prior == "standard":
            return StandardNormal(config.units)
        start = torch.randn(config.components, *self.space.shape)
        return VampPrior(config.units, start, self._encode_pseudo, conditional=config.prior == "conditional-vamp")

    def _encode_pseudo(self, z: Tensor, e: Tensor | None) -> Gaussian:
        e = self.condition.none(len(z)) if e is None else e
        found: Encoded = self.encoder(self.standardised(z), e)
        return found.posterior

    def standardise(
        self, moments: tuple[Tensor, Tensor], embeddings: Tensor | None = None, examples: Tensor | None = None
    ) -> None:
        """Take note of what the training's latents and embeddings are like.

        Args:
            moments: mean and deviation of each channel of normalized latents, (D,) each.
            embeddings: (N, E); None without.
            examples: (config.components, D, h, w) normalized latents that a vamp prior begins with; None = noise.
        """
        self.shift.copy_(moments[0])
        self.scale.copy_(moments[1].clamp_min(_DEAD))
        if embeddings is not None:
            deviation = embeddings.std(0, correction=0)
            self.condition.mean.copy_(embeddings.mean(0))
            self.condition.deviation.copy_(deviation.clamp_min(_LEAST_DEVIATION * float(deviation.mean()) or 1.0))
        if isinstance(self.prior, VampPrior) and examples is not None:
            self.prior.pseudo.data.copy_(examples)

    def standardised(self, z: Tensor) -> Tensor:
        """Return what the networks see of normalized latents, (B, D, h, w) float32."""
        return (z.float() - self.shift[:, None, None]) / self.scale[:, None, None]

    def restored(self, z: Tensor) -> Tensor:
        """Return the normalized latents of standardised ones, (B, D, h, w)."""
        return z * self.scale[:, None, None] + self.shift[:, None, None]

    def log_volume(self) -> float:
        """Return what has to be added to -log p of standardised latents, mean over D, for that of normalized ones."""
        return float(self.scale.double().log().mean())

    def forward(self, z: Tensor, c: Tensor, hidden: Tensor, noise: Noise) -> Outputs:
        """Encode, draw units, and see how well they predict z.

        Args:
            z: (B, D, h, w) normalized.
            c: (B,) int64 classes or (B, E) embeddings.
            hidden: (B,) bool: the condition is not to be known.
            noise: all that is random.
        """
        z, e = self.standardised(z), self.condition(c, hidden)
        found = self.encoder(z, e)
        with _exactly(z):
            u, log_q = draw(found.posterior, noise.units[0], self.flow, found.context)
            gaussian = self.gaussian_prior(e.float())
            if self.config.has_plain_units:
                kl: Units = (found.posterior.kl(gaussian),)
            else:
                kl = ((log_q - self.prior.log_prob(u, e.float()))[:, None],)
        units: Units = (u,)
        posteriors: tuple[Gaussian, ...] = (found.posterior,)
        x, v = self.top_down.upper(u, e)
        if self.second is not None:
            q, p = self.second.posterior(found.features, x, v), self.second.prior(x)
            units, posteriors = (u, q.at(noise.units[1])), (found.posterior, q)
            kl = (*kl, q.kl(p))
        x = self.top_down.lower(x, v, units)
        if isinstance(self.decoder, GaussianDecoder):
            error = self.decoder.error(z, x)
        else:
            assert noise.time is not None
            assert noise.latents is not None
            error = self.decoder.error(z, x, v, noise.time, noise.latents)
        return Outputs(error=error, kl=kl, units=units, posteriors=posteriors, prior=gaussian)

    def gaussian_prior(self, e: Tensor) -> Gaussian | None:
        """Return p(u|c) of the first level where it is Gaussian, None = N(0, I), or no Gaussian; e: (B, features)."""
        return self.prior.gaussian(e) if isinstance(self.prior, ConditionalGaussian) else None

    def encode(self, z: Tensor, c: Tensor, hidden: Tensor, noise: Units | None = None) -> tuple[Units, Units]:
        """Return units of q(u|z, c), and the deviations of the posteriors, before any flow.

        Args:
            z: (B, D, h, w) normalized.
            c: conditions, (B,) or (B, E).
            hidden: whether they are not to be known, (B,).
            noise: standard normal, shapes of `unit_shapes`; None = the posteriors' means.
        """
        e = self.condition(c, hidden)
        found = self.encoder(self.standardised(z), e)
        u = found.posterior.at(None if noise is None else noise[0])
        if self.flow is not None:
            u, _ = self.flow(u, found.context)
        if self.second is None:
            return (u,), (torch.exp(0.5 * found.posterior.logvar),)
        x, v = self.top_down.upper(u, e)
        q = self.second.posterior(found.features, x, v)
        deviations = tuple(torch.exp(0.5 * each.logvar) for each in (found.posterior, q))
        return (u, q.at(None if noise is None else noise[1])), deviations

    def draw_units(self, c: Tensor, hidden: Tensor, noise: Units, choice: Tensor, temperature: float = 1.0) -> Units:
        """Return units of p(u|c).

        Args:
            c: conditions, (B,) or (B, E).
            hidden: whether they are not to be known, (B,).
            noise: standard normal, shapes of `unit_shapes`.
            choice: (B,) in [0, 1), which component of a mixture.
            temperature: factor of the noise; 0 = the middle.
        """
        u = self.prior.draw(noise[0], choice, self.condition(c, hidden), temperature)
        return self.complete(u, c, hidden, noise, temperature)

    def complete(self, u: Tensor, c: Tensor, hidden: Tensor, noise: Units, temperature: float = 1.0) -> Units:
        """Return first-level units u, (B, U), together with what is drawn of p(u2|u1, c); see `draw_units`."""
        if self.second is None:
            return (u,)
        x, _ = self.top_down.upper(u, self.condition(c, hidden))
        return u, self.second.prior(x).at(noise[1], temperature)

    def decode(
        self, units: Units, c: Tensor, hidden: Tensor, drawing: Drawing | None = None, guidance: float = 1.0
    ) -> Tensor:
        """Return normalized latents, (B, D, h, w), of units.

        Args:
            units: one tensor for each level.
            c: conditions, (B,) or (B, E).
            hidden: whether they are not to be known, (B,).
            drawing: how a flow-matching decoder draws them; None with a Gaussian one, whose mean is taken.
            guidance: weight of classifier-free guidance, of velocities or of means; 1 = none, 0 = no condition.
        """
        if guidance == 0:
            hidden = torch.ones_like(hidden)
        alone = guidance in (0, 1)
        x, v = self.features(units, c, hidden)
        x_0, v_0 = (x, v) if alone else self.features(units, c, torch.ones_like(hidden))
        if isinstance(self.decoder, GaussianDecoder):
            mean = self.decoder(x).mean
            if not alone:
                without = self.decoder(x_0).mean
                mean = without + guidance * (mean - without)
            return self.restored(mean)
        assert drawing is not None, "a flow-matching decoder draws from noise"
        known, unknown = (partial(self._velocity, x=a, v=b) for a, b in ((x, v), (x_0, v_0)))
        velocity = known if alone else guided(known, unknown, guidance)
        return self.restored(sample(velocity, drawing.noise, drawing.steps, heun=drawing.heun))

    def features(self, units: Units, c: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder sees: features, (B, width, h, w), and a vector, (B, features)."""
        e = self.condition(c, hidden)
        x, v = self.top_down.upper(units[0], e)
        return self.top_down.lower(x, v, units), v

    def _velocity(self, z_t: Tensor, t: Tensor, x: Tensor, v: Tensor) -> Tensor:
        velocity: Tensor = self.decoder(z_t, t, x, v)
        return velocity


def _exactly(like: Tensor) -> AbstractContextManager[Any]:
    """Compute in float32 while the context is open: densities."""
    return torch.autocast(like.device.type, enabled=False)
