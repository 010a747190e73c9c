"""Normalizing flows of units: invertible maps of vectors whose log|det du'/du| is known exactly.

    IAF:       u, context -> masked layers -> shift_i, scale_i of u_1 .. u_(i-1) -> u' = u * scale + shift
    coupling:  half of u, context -> layers -> shift, scale of the other half; then the other way round

    q(u|z, c):  u_0 of a Gaussian -> flow -> u;  log q(u) = log q_0(u_0) - log_det        (`draw`)

Every flow is the identity at the start. Log-scales of a step are bounded, and everything is computed in float32,
outside autocast. Imports torch alone.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codec.head.gaussian import Gaussian, total, wide

LOG_SCALE = 3.0
"""What a step can add to the logarithm of a unit's scale, at most."""


@dataclass(frozen=True, kw_only=True)
class FlowSize:
    """How large a flow is."""

    steps: int = 4
    """Maps one after the other. A coupling changes half of the units, so that two of them change all."""
    width: int = 128
    """Of the hidden layers of each step."""
    depth: int = 2
    """Hidden layers of each step."""

    def __post_init__(self) -> None:
        for name in ("steps", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}, allowed: >= 1")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Flow(nn.Module):
    """Steps one after the other.

    Attributes:
        n_units: U.
        n_context: numbers that a context has; 0 = there is none.
    """

    def __init__(self, steps: list[nn.Module], n_units: int, n_context: int) -> None:
        super().__init__()
        self.n_units, self.n_context = n_units, n_context
        self.steps = nn.ModuleList(steps)

    def forward(self, u: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map u.

        Args:
            u: (B, U).
            context: (B, n_context): condition, features of an encoder, or both side by side; None = there is none.

        Returns:
            u', (B, U) float32, and log|det du'/du|, (B,).
        """
        return self._through(list(self.steps), "forward", u, context)

    def inverse(self, u: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map u' back: u, (B, U), and log|det du/du'|, (B,). An IAF takes U passes of every step for it."""
        return self._through(list(reversed(self.steps)), "inverse", u, context)

    def _through(self, steps: list[nn.Module], way: str, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        n_context = 0 if context is None else context.shape[-1]
        if u.shape[1:] != (self.n_units,) or n_context != self.n_context:
            raise ValueError(
                f"flow: expected u (B, {self.n_units}) and {self.n_context} numbers of context, got {tuple(u.shape)} "
                f"and {n_context}"
            )
        u, context = wide(u), None if context is None else wide(context)
        log_det = u.new_zeros(len(u))
        with torch.autocast(u.device.type, enabled=False):
            for step in steps:
                u, change = getattr(step, way)(u, context)
                log_det = log_det + change
        return u, log_det


class AutoregressiveFlow(Flow):
    """Inverse autoregressive flow; Kingma et al. 2016, arXiv:1606.04934, algorithm 1.

    Where they take sigmoid gates, the scale is exp of a bounded number, so that the flow can start as the identity.
    Between steps the order of the units is turned round, as they do; here inside the masks.
    """

    def __init__(self, n_units: int, n_context: int, size: FlowSize) -> None:
        """Build it with weights from torch's generator.

        Args:
            n_units: U.
            n_context: numbers of the context, h in the paper; 0 = none.
            size: see there.
        """
        order = torch.arange(n_units)
        orders = [order if number % 2 == 0 else order.flip(0) for number in range(size.steps)]
        super().__init__([_Autoregressive(each, n_context, size) for each in orders], n_units, n_context)


class CouplingFlow(Flow):
    """Affine couplings; Dinh et al. 2016, arXiv:1605.08803, section 3.2. Both ways cost the same.

    Steps 2 j and 2 j + 1 part the units by bit j of their number, once each way, so that any two units are parted
    within 2 log2(U) steps.
    """

    def __init__(self, n_units: int, n_context: int, size: FlowSize) -> None:
        """Build it with weights from torch's generator.

        Args:
            n_units: U, 2 or more.
            n_context: numbers of the context; 0 = none.
            size: see there.

        Raises:
            ValueError: fewer than 2 units.
        """
        if n_units < 2:
            raise ValueError(f"a coupling flow: n_units = {n_units}, allowed: >= 2")
        n_bits = (n_units - 1).bit_length()
        numbers = torch.arange(n_units)
        changed = [((numbers >> (step // 2 % n_bits)) + step) % 2 == 1 for step in range(size.steps)]
        super().__init__([_Coupling(each, n_context, size) for each in changed], n_units, n_context)


def draw(
    posterior: Gaussian, noise: Tensor, flow: Flow | None = None, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw from a posterior: units and their log-density, both differentiable.

    Args:
        posterior: (B, U), or (B, U, ...) without a flow.
        noise: standard normal, of the same shape.
        flow: what the Gaussian's draws go through; None = nothing.
        context: of the flow.

    Returns:
        u, (B, U, ...), and log q(u), (B,) nats.
    """
    u = posterior.at(noise)
    log_q = total(posterior.log_prob(u))
    if flow is None:
        return u, log_q
    u, log_det = flow(u, context)
    return u, log_q - log_det


def _bounded(raw: Tensor) -> Tensor:
    return LOG_SCALE * torch.tanh(raw / LOG_SCALE)


class _Masked(nn.Linear):
    """A linear layer that only sees what its mask lets through; Germain et al. 2015, arXiv:1502.03509 eq. 8."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class _Autoregressive(nn.Module):
    """u'_i = u_i * exp(s_i) + m_i, with s_i and m_i of the units before i in an order, and of the context."""

    def __init__(self, order: Tensor, n_context: int, size: FlowSize) -> None:
        """Build it.

        Args:
            order: (U,) place of each unit in the order, 0 .. U - 1.
            n_context: numbers of the context.
            size: see there.
        """
        super().__init__()
        n_units = len(order)
        # A hidden number of degree k has seen the units at places below k; degree 0 knows the context alone.
        hidden = torch.arange(size.width) * n_units // size.width  # 0 .. U - 1, evenly
        self.first = _Masked(hidden[:, None] > order[None])
        self.context = nn.Linear(n_context, size.width, bias=False) if n_context else None
        self.hidden = nn.ModuleList(_Masked(hidden[:, None] >= hidden[None]) for _ in range(size.depth - 1))
        self.last = _Masked((order[:, None] >= hidden[None]).repeat(2, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def _affine(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.first(u)
        if self.context is not None:
            x = x + self.context(context)
        for layer in self.hidden:
            x = layer(F.silu(x))
        shift, raw = self.last(F.silu(x)).chunk(2, dim=1)
        return shift, _bounded(raw)

    def forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._affine(u, context)
        return u * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        found, log_scale = torch.zeros_like(u), torch.zeros_like(u)
        for _ in range(u.shape[1]):  # pass k settles the unit at place k
            shift, log_scale = self._affine(found, context)
            found = (u - shift) * torch.exp(-log_scale)
        return found, -log_scale.sum(1)


class _Coupling(nn.Module):
    """u' = u * exp(s) + m for the units that change, with s and m of the others and of the context."""

    changed: Tensor

    def __init__(self, changed: Tensor, n_context: int, size: FlowSize) -> None:
        super().__init__()
        n_units = len(changed)
        self.register_buffer("changed", changed.float(), persistent=False)
        layers: list[nn.Module] = [nn.Linear(n_units + n_context, size.width), nn.SiLU()]
        for _ in range(size.depth - 1):
            layers += [nn.Linear(size.width, size.width), nn.SiLU()]
        last = nn.Linear(size.width, 2 * n_units)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def _affine(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = u * (1 - self.changed)
        seen = kept if context is None else torch.cat([kept, context], dim=1)
        shift, raw = self.layers(seen).chunk(2, dim=1)
        return self.changed * shift, self.changed * _bounded(raw)

    def forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._affine(u, context)
        return u * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._affine(u, context)
        return (u - shift) * torch.exp(-log_scale), -log_scale.sum(1)
