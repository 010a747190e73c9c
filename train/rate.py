"""Rate-aware training: steps and a density per latent channel, the differentiable counterpart of the codec's tables.

    z (raw) -> noisy: z + uniform * step_c * 2^(-q/16) = y -> bits(y) = -log2 P(y), times price(q)

The codec rounds z to a grid of step d = step_c * 2^(-q/16) and pays for the index under a static table per quality and
channel. Here uniform noise of one step stands for the rounding where bits are counted, and one density of the raw
latents per channel, with the cumulative function F_c, for the tables of every quality:
P(y) = F_c(y + d/2) - F_c(y - d/2). What is decoded is the same y, or z rounded (`rate.decoded`).

So this is the rate of the codec's STATIC mode, and of indices rounded to the nearest. Files are smaller, at high
qualities by some 5 to 20 %, at the lowest by half: the CONTEXT mode knows the neighbours of an index.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from codec.tables import INDEX_LIMIT, QUALITIES, QUALITY_PER_OCTAVE, entropy_bits
from train.loss_config import RateConfig

COARSEST_BPP = 0.08  # bits per pixel at q = 0, as the export chooses the steps of other models
_ESCAPE_BITS = 22.0  # 16 for the codec's least frequent symbol, 6 for sign and length of the index it announces
_FINEST = 2.0 ** (-(QUALITIES - 1) / QUALITY_PER_OCTAVE)  # the step at q = 100 / the step at q = 0


def draw_quality(uniform: torch.Tensor) -> torch.Tensor:
    """Map (B,) draws from [0, 1) to qualities, uniform in 0..100; not only whole ones, as steps are continuous in q."""
    return uniform.float() * (QUALITIES - 1)


def price(quality: torch.Tensor, config: RateConfig) -> torch.Tensor:
    """Return the price of one bit per pixel at each quality, (B,): weight * 2^(-exponent * q / 16).

    The loss of a batch is the mean over B of price * bits / (H * W).
    """
    return config.weight * torch.exp2(-config.exponent * quality.float() / QUALITY_PER_OCTAVE)


class RateModel(nn.Module):
    """The quantiser's steps and, per channel, a mixture of K logistics; all its parameters want a rate of their own.

    Steps and scales are learned as logarithms and means in units of `exp(log_unit)`, so that one learning rate serves
    latents of any size, and follows them while the encoder still changes. Weight decay would only pull steps and scales
    towards 1: use none. Everything is float32, under autocast too, which narrows none of these operations.

    Attributes:
        log_step: (D,) log of the step at q = 0.
        log_unit: (D,) log of the unit of `offsets`.
        logits: (D, K) weights of the components before their softmax.
        offsets: (D, K) their means.
        log_scales: (D, K) logs of their scales, raw units.
    """

    def __init__(self, channels: int, components: int) -> None:
        """Start with latents of mean 0 and deviation 1 and with step 1; `initialize` fits all to data.

        Args:
            channels: D.
            components: K, logistics per channel.
        """
        super().__init__()
        # Around one centre, from narrow to wide: peaked and heavy-tailed channels are what the encoder makes. The
        # means differ so that no two components get the same gradient; scales are such that the deviation is 1.
        offsets = torch.tensor([(-1.0) ** k * 0.2 * (k > 0) for k in range(components)])
        offsets = offsets - offsets.mean()
        widths = torch.exp2(torch.linspace(-1.0, 1.0, components) if components > 1 else torch.zeros(1))
        variance = 1.0 - offsets.square().mean()
        widths = widths * (variance / widths.square().mean()).sqrt()
        self.log_step = nn.Parameter(torch.zeros(channels))
        self.log_unit = nn.Parameter(torch.zeros(channels))
        self.logits = nn.Parameter(torch.zeros(channels, components))
        self.offsets = nn.Parameter(offsets.repeat(channels, 1))
        # The deviation of a logistic of scale 1 is pi / sqrt(3).
        self.log_scales = nn.Parameter((widths * math.sqrt(3.0) / math.pi).log().repeat(channels, 1))

    @property
    def step(self) -> torch.Tensor:
        """The steps at q = 0, (D,) float32, detached: what the codec's tables are to be fitted with."""
        return self.log_step.detach().float().exp()

    @property
    def mean(self) -> torch.Tensor:
        """The mean of each channel's density, (D,) float32, detached."""
        with torch.no_grad():
            log_weights, means, _ = self._mixture()
            return (log_weights.exp() * means).sum(dim=1)

    def steps(self, quality: torch.Tensor) -> torch.Tensor:
        """Return step_c * 2^(-q/16) for (B,) qualities in 0..100: (B, D, 1, 1) float32."""
        octaves = quality.float()[:, None] / QUALITY_PER_OCTAVE
        return torch.exp(self.log_step.float() - octaves * math.log(2.0))[:, :, None, None]

    def noisy(self, z: torch.Tensor, quality: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Add uniform noise as wide as the step, the quantiser's stand-in that has a gradient.

        Agustsson & Theis 2020, arXiv:2006.09952.

        Args:
            z: (B, D, h, w) raw.
            quality: (B,) 0..100.
            uniform: (B, D, h, w) in [-0.5, 0.5).

        Returns:
            y, (B, D, h, w) raw, float32.
        """
        return z.float() + uniform.float() * self.steps(quality)

    def rounded(self, z: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        """Round as the codec does, with the gradient of no rounding for z, and that of its error for the steps.

        What a decoder learns from is then what it will get: where steps are wide, noise is not like it. The rate still
        needs the noise (Minnen & Singh 2020, arXiv:2007.08739). The steps' gradient is that of Esser et al. 2020,
        arXiv:1902.08153, eq. 3, without their scale; of log-steps, and the grid lies at the density's mean.

        Args:
            z: (B, D, h, w) raw.
            quality: (B,) 0..100.

        Returns:
            (B, D, h, w) raw, float32.
        """
        steps = self.steps(quality)
        with torch.no_grad():
            error = (self.quantised(z, quality) - z.float()) / steps
        return z.float() + error * steps

    def quantised(self, z: torch.Tensor, quality: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """Return what a decoder would get: z rounded as the codec rounds; no gradient passes.

        Args:
            z: (B, D, h, w) raw.
            quality: (B,) 0..100.
            mean: (D,) where index 0 lies; None = the mean of the density.

        Returns:
            (B, D, h, w) raw, float32.
        """
        with torch.no_grad():
            steps = self.steps(quality)
            centre = (self.mean if mean is None else mean.to(z.device).float())[:, None, None]
            indices = ((z.float() - centre) / steps).round().clamp(-INDEX_LIMIT, INDEX_LIMIT)
            return centre + indices * steps

    def bits(self, y: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        """Return the estimated bits of each image, (B,): -log2 P, sum over D, h, w.

        Args:
            y: (B, D, h, w) raw, with the quantiser's noise or rounded.
            quality: (B,) 0..100, at which y was made.
        """
        return self.bits_per_channel(y, quality).sum(dim=1)

    def bits_per_channel(self, y: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        """Return the same per channel, (B, D) float32: sum over h, w."""
        return self._bits(y.float(), self.steps(quality)).sum(dim=(2, 3))

    def _bits(self, y: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return -log2 P of every latent, (B, D, h, w).

        -log p of noisy latents: Balle et al. 2018, appendix 6.1, arXiv:1802.01436; our density is a mixture,
        one for all steps. With a = (y + d/2 - m) / s and b = (y - d/2 - m) / s, the mass of one logistic is
        sigmoid(a) - sigmoid(b) = sigmoid(a) * sigmoid(-b) * (1 - exp(b - a)): a product, so nothing cancels in either
        tail, for tiny steps, or for steps much wider than s.
        """
        log_weights, means, scales = (t[:, :, None, None] for t in self._mixture())  # (D, K, 1, 1)
        width = steps.unsqueeze(2) / scales  # (B, D, K, 1, 1)
        u = (y.unsqueeze(2) - means) / scales  # (B, D, K, h, w)
        log_mass = F.logsigmoid(width / 2 + u) + F.logsigmoid(width / 2 - u) + torch.log(-torch.expm1(-width))
        return _with_escape(torch.logsumexp(log_weights + log_mass, dim=2) / -math.log(2.0))

    def _mixture(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-weights, means and scales of the components, each (D, K) float32, in raw units."""
        # A channel that carries nothing lets its scales fall for ever. What is narrower than the finest step changes
        # no rate, so that a part of it is the least scale, and division by it stays safe.
        least = self.step[:, None] * (_FINEST / 32)
        return (
            F.log_softmax(self.logits.float(), dim=1),
            self.log_unit.float().exp()[:, None] * self.offsets.float(),
            self.log_scales.float().exp() + least,
        )

    @torch.no_grad()
    def initialize(
        self, z: torch.Tensor, f: int, *, bpp: float = COARSEST_BPP, proportions: torch.Tensor | None = None
    ) -> None:
        """Set the densities by the moments of latents, and the steps so that q = 0 costs `bpp`.

        The steps only start there: the price decides where they go. Every rank must pass the same latents.

        Args:
            z: (B, D, h, w) raw, B * h * w >= 2; some 10,000 positions are plenty.
            f: downsampling factor.
            bpp: bits per pixel at q = 0, the entropy of the codec's indices of z.
            proportions: (D,) positive, of the steps to each other; None = the deviations of z. At high rates the least
                distortion has equal errors of the image from each channel, however much each varies.

        Raises:
            ValueError: z is not finite.
        """
        if not torch.isfinite(z).all():
            raise ValueError("rate model: the latents to start from are not finite")
        z = z.detach().float().to(self.log_step.device)
        mean, deviation = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
        # A channel that is still constant gets a thousandth of the others' deviation, not 0.
        deviation = deviation.clamp(min=max(1e-3 * float(deviation.square().mean().sqrt()), 1e-6))
        self.load_state_dict(RateModel(*self.logits.shape).state_dict())
        # The distance from 0, not the deviation: channels far from 0 would need offsets that no learning rate changes
        # once their deviation does.
        unit = (mean.square() + deviation.square()).sqrt()
        self.log_unit.copy_(unit.log())
        self.offsets.copy_((mean[:, None] + deviation[:, None] * self.offsets) / unit[:, None])
        self.log_scales.add_(deviation.log()[:, None])
        shape = (deviation if proportions is None else proportions.to(deviation)).log()
        shape = shape + (deviation.log() - shape).mean()  # as large as the deviations, on average
        flat, centre = z.transpose(0, 1).flatten(1).cpu().numpy(), mean.cpu().numpy()  # (D, B*h*w), (D,)
        low, high = -8.0, 8.0  # log of step / deviation; the rate falls as the steps grow
        for _ in range(20):
            middle = (low + high) / 2
            self.log_step.copy_(shape + middle)
            # Of the codec's indices, not of noisy latents: at steps of several deviations noise crosses bounds that a
            # grid centred on the mean keeps away from, and looks a few times dearer.
            got = entropy_bits(flat, centre, self.step.cpu().numpy(), 0) / f**2
            low, high = (middle, high) if got > bpp else (low, middle)


def _with_escape(bits: torch.Tensor) -> torch.Tensor:
    """Let bits above what the codec's escape costs grow by one per doubling, as the escape's length does.

    The exact -log2 P grows linearly with the distance, and its gradient with respect to a log-scale too: one outlier
    of 1e4 would own the step. Beyond the limit the cost goes on with slope 1 and then as log2 of the distance: finite,
    never flat, so that both latent and density are still pulled together, with a bounded gradient.
    """
    excess = (bits - _ESCAPE_BITS).clamp(min=0.0)
    return torch.where(bits > _ESCAPE_BITS, _ESCAPE_BITS + torch.log1p(excess * math.log(2.0)) / math.log(2.0), bits)
