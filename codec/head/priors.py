"""Priors p(u|c) that are trained together with the rest of a head: N(0, I), Gaussian of c, VampPrior, flow.

    u, c -> log_prob -> (B,) nats             standard normal noise, a number in [0, 1), c -> draw -> u

c is the vector that a condition is to the networks, (B, E), gradients go back into it; those fitted afterwards are in
`codec.head.second_stage`. Imports torch alone.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from codec.head.flows import CouplingFlow, FlowSize
from codec.head.gaussian import Gaussian, standard_log_prob, total

Encode = Callable[[Tensor, Tensor | None], Gaussian]
"""Normalized latents (n, D, h, w) and conditions (n, E), or None = without -> q(u|z, c), (n, U)."""


class Prior(nn.Module):
    """What all priors can do.

    Attributes:
        n_units: U.
    """

    def __init__(self, n_units: int) -> None:
        super().__init__()
        self.n_units = n_units

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """Return log p(u|c) in nats, (B,).

        Args:
            u: (B, U).
            c: conditions, one for each u; None where the prior has none.
        """
        raise NotImplementedError

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Return units, (n, U); equal numbers give equal units, whatever else is in the batch.

        Args:
            noise: (n, U) standard normal.
            choice: (n,) in [0, 1): decides the component of a mixture; others do not look at it.
            c: conditions, one for each.
            temperature: factor of the noise: 1 = draws of the prior, 0 = its middle, that of a component in a mixture.
                Components are chosen by their own weights at any temperature.
        """
        raise NotImplementedError

    def sample(
        self,
        n: int,
        c: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw n times, (n, U); see `draw`.

        Args:
            n: how many.
            c: conditions, n of them.
            generator: None = torch's own. Where it lies, noise is drawn, so that a CPU's gives every device the same.
            temperature: factor of the noise.
        """
        if c is not None and len(c) != n:
            raise ValueError(f"sample: n = {n}, expected one condition for each, got {len(c)}")
        own = next(itertools.chain(self.parameters(), self.buffers()), c)
        device = torch.device("cpu") if own is None else own.device
        at = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(n, self.n_units, generator=generator, device=at)
        choice = torch.rand(n, generator=generator, device=at)
        return self.draw(noise.to(device), choice.to(device), c, temperature)


class StandardNormal(Prior):
    """N(0, I), whatever c."""

    def gaussian(self, c: Tensor | None = None) -> Gaussian | None:
        """Return None: what `Gaussian.kl` takes for N(0, I)."""
        return None

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """See `Prior.log_prob`."""
        return total(standard_log_prob(u))

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """See `Prior.draw`."""
        return temperature * noise


class ConditionalGaussian(Prior):
    """Independent Gaussians whose means and variances c decides; N(0, I) at the start."""

    def __init__(self, n_units: int, n_condition: int, width: int = 128) -> None:
        """Build it with weights from torch's generator.

        Args:
            n_units: U.
            n_condition: E.
            width: of the hidden layer.
        """
        super().__init__(n_units)
        last = nn.Linear(width, 2 * n_units)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(n_condition, width), nn.SiLU(), last)

    def gaussian(self, c: Tensor | None) -> Gaussian:
        """Return p(u|c), for the KL in closed form."""
        assert c is not None, "a conditional prior needs conditions"
        return Gaussian.of(self.layers(c))

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """See `Prior.log_prob`."""
        return total(self.gaussian(c).log_prob(u))

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """See `Prior.draw`."""
        return self.gaussian(c).at(noise, temperature)


class FlowPrior(Prior):
    """What a coupling flow makes of N(0, I); N(0, I) itself at the start."""

    def __init__(self, n_units: int, n_condition: int, size: FlowSize) -> None:
        """Build it with weights from torch's generator; n_condition is E, 0 = the prior has no condition."""
        super().__init__(n_units)
        self.flow = CouplingFlow(n_units, n_condition, size)

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """See `Prior.log_prob`."""
        noise, log_det = self.flow.inverse(u, c)
        return total(standard_log_prob(noise)) + log_det

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """See `Prior.draw`."""
        u: Tensor = self.flow(temperature * noise, c)[0]
        return u


class VampPrior(Prior):
    """The mean of the encoder's posteriors of K learned latents; Tomczak & Welling 2018, arXiv:1705.07120 eq. 9.

        p(u|c) = 1/K sum over k of q(u|z_k, c)

    q is the encoder's Gaussian, before any flow. Where it is conditional, the density of B units takes B * K encodings.

    Attributes:
        pseudo: (K, D, h, w) the learned latents, normalized.
        conditional: whether the encoder is told c; else p(u) is the same for all c.
    """

    def __init__(self, n_units: int, start: Tensor, encode: Encode, *, conditional: bool = False) -> None:
        """Build it.

        Args:
            n_units: U.
            start: (K, D, h, w) normalized latents to begin with: of the training, or noise.
            encode: the head's encoder, which stays the head's: gradients reach it, but its weights are none of this
                module's parameters.
            conditional: whether it is told the condition.
        """
        super().__init__(n_units)
        self.pseudo = nn.Parameter(start.clone())
        self.conditional = conditional
        self._encode = (encode,)  # in a tuple, or a module would be registered as part of this one

    def components(self, c: Tensor | None = None) -> Gaussian:
        """Return q(u|z_k, c): (1, K, U), or (B, K, U) where it is conditional."""
        n_components, encode = len(self.pseudo), self._encode[0]
        if not self.conditional:
            found = encode(self.pseudo, None)
            return Gaussian(found.mean[None], found.logvar[None])
        assert c is not None, "a conditional prior needs conditions"
        z = self.pseudo.repeat(len(c), *[1] * (self.pseudo.ndim - 1))  # (B*K, D, h, w)
        found = encode(z, c.repeat_interleave(n_components, dim=0))
        return Gaussian(*(part.reshape(len(c), n_components, -1) for part in (found.mean, found.logvar)))

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """See `Prior.log_prob`."""
        each = self.components(c).log_prob(u[:, None]).sum(2)  # (B, K)
        return each.logsumexp(1) - math.log(len(self.pseudo))

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """See `Prior.draw`."""
        chosen = (choice * len(self.pseudo)).long().clamp_max(len(self.pseudo) - 1)
        return self._encode[0](self.pseudo[chosen], c if self.conditional else None).at(noise, temperature)
