"""Codebooks that are given: a lattice (fsq), the corners of a cube (lfq). The latents are what learns.

Entries: `FSQ`, `LFQ`, `corners`, `whiten`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel

from codec import fsq
from train.losses import commitment_loss
from train.vq.config import VQConfig
from train.vq.quantiser import Codes, Quantiser, Taken, straight_through

_GROUP_BITS = 10  # whose joint frequencies are kept
_LEAST_VARIANCE = 1e-3  # of the largest one
_MOMENTS_RATE = 0.1  # of running second moments: a few steps tell them, and what pulls must not lag


class FSQ(Quantiser):
    """Finite scalar quantisation: each channel is squashed and rounded; formulas in `codec.fsq`.

    The paper has no loss of its own for it. But large steps carry latents to where tanh is flat, for good, so that all
    lie in the corners; and nothing keeps them from gathering in the middle. Two terms hold them:

    - commitment: beta * the squared distance beyond the middle of the outermost cells (mean over B, d, h, w), which the
      tails of a standard normal latent feel a little (10 % of it with 8 levels);
    - spread: the latents shall be as independent standard normal ones, whose cells are about equally frequent. Encoder
      and decoder can undo what it asks for, which is linear. Its gradient goes through the batch's own second moments
      and its distance is that of the running ones: so it adds up over ranks and accumulated batches, as LFQ's does.

    Attributes:
        moments: (d + 1, d + 1) running second moments of the latents, from the middle of the lattice, and a 1.
    """

    moments: torch.Tensor

    def __init__(self, config: VQConfig, levels: tuple[int, ...], size: int, *, trains: bool) -> None:
        """Prepare; see `Quantiser`; `levels`: of each channel, product K."""
        super().__init__(config, size, len(levels), trains=trains)
        self.levels = levels
        self.register_buffer("moments", torch.eye(len(levels) + 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *how: Any) -> None:
        state_dict.setdefault(prefix + "moments", self.moments.clone())  # of a run from before there were any
        super()._load_from_state_dict(state_dict, prefix, *how)

    def _quantise(self, z: torch.Tensor, weight: torch.Tensor) -> Codes:
        halves = torch.tensor([level // 2 for level in self.levels]).to(z)[:, None, None]
        bounded = fsq.bounded(z, self.levels) / halves
        indices = fsq.to_index(fsq.cells(z.detach(), self.levels), self.levels)
        chosen = F.embedding(indices, weight).movedim(-1, 1).contiguous()
        z_q = straight_through(bounded, chosen)
        if not self.trains:
            return Codes(z_q=z_q, z=bounded.detach(), indices=indices)
        config = self.config
        flat = F.pad(fsq.centred(z, self.levels).movedim(1, -1).reshape(-1, self.dim), (0, 1), value=1.0)  # (N, d + 1)
        batch = flat.T @ flat / len(flat)
        off = self.moments - torch.eye(self.dim + 1).to(z)
        along = (off * batch).sum()
        spread = along - along.detach() + 0.5 * off.square().sum()
        terms = {
            "commitment": config.weight * config.beta * fsq.excess(z, self.levels).square().mean(),
            "spread": config.weight * config.spread_weight * spread / self.dim,
        }
        return Codes(z_q=z_q, z=bounded.detach(), indices=indices, terms=terms, frequencies=batch.detach())

    def _learn(self, taken: Taken) -> list[str]:
        self.moments.lerp_(taken.reduce(taken.tokens.mean_frequencies()), _MOMENTS_RATE)
        return []


class LFQ(Quantiser):
    """Lookup-free quantisation: the signs of the latents (Yu et al. 2023 section 3.2, arXiv:2310.05737).

    The entropy loss wants each latent sure of its corner and all corners used alike. The second entropy is that of all
    latents, of which a batch of one rank shows few; here it is taken of running frequencies, and its gradient goes
    through the batch's own: sum over corners of (batch's frequency) * log(running frequency). So it adds up over ranks
    and accumulated batches. Many bits are split into groups, whose entropies are added: never less than that of all.

    Attributes:
        frequencies: running means of the softmax over the corners of each group, one group behind the other.
    """

    frequencies: torch.Tensor

    def __init__(self, config: VQConfig, size: int, *, trains: bool) -> None:
        bits = size.bit_length() - 1
        super().__init__(config, size, bits, trains=trains)
        n_groups = -(-bits // _GROUP_BITS)
        self._groups = [bits // n_groups + (n < bits % n_groups) for n in range(n_groups)]
        uniform = [torch.full((1 << group,), 1 / (1 << group)) for group in self._groups]
        self.register_buffer("frequencies", torch.cat(uniform))

    def _quantise(self, z: torch.Tensor, weight: torch.Tensor) -> Codes:
        bits = (z.detach() > 0).long()
        indices = (bits << torch.arange(self.dim, device=z.device)[:, None, None]).sum(1)
        chosen = (2 * bits - 1).to(z)
        z_q = straight_through(z, chosen)
        if not self.trains:
            return Codes(z_q=z_q, z=z.detach(), indices=indices)
        config = self.config
        batch, unsure = self._soft(z)
        spread = (batch * self.frequencies.clamp(min=1e-12).log()).sum()
        terms = {
            "commitment": config.weight * commitment_loss(z, chosen, config.beta),
            "entropy": config.weight * config.entropy_weight * (unsure + config.diversity * spread),
        }
        return Codes(z_q=z_q, z=z.detach(), indices=indices, terms=terms, frequencies=batch.detach())

    def _soft(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch's mean softmax over the corners of each group, and a latent's mean entropy in nats.

        The softmax over corners c of 2 z . c / temperature is a product over channels, and so the entropy a sum.
        """
        logits = 4 / self.config.entropy_temperature * z.movedim(1, -1).reshape(-1, self.dim)  # (N, d)
        yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
        unsure = -(yes.exp() * yes + no.exp() * no).sum(1).mean()
        parts, at = [], 0
        for group in self._groups:
            chosen = ((corners(group) + 1) / 2).to(z)  # (2^group, group)
            log_p = yes[:, at : at + group] @ chosen.T + no[:, at : at + group] @ (1 - chosen).T
            parts.append(log_p.exp().mean(0))
            at += group
        return torch.cat(parts), unsure

    def _learn(self, taken: Taken) -> list[str]:
        self.frequencies.lerp_(taken.reduce(taken.tokens.mean_frequencies()), 1 - self.config.decay)
        return []


@torch.no_grad()
def whiten(network: VQModel, z: torch.Tensor) -> None:
    """Change the two convolutions around the latents so that these are white, and the decoder sees what it saw.

    The cells of a lattice have the size that they have: latents that are small against them all fall into a few.
    Directions of hardly any variance, which are noise, are enlarged less.

    Args:
        network: of random weights; changed in place.
        z: (d, N) its latents of a few images.
    """
    z = z.double()
    mean = z.mean(1)
    variances, directions = torch.linalg.eigh(torch.cov(z, correction=0).reshape(len(z), len(z)))
    deviations = variances.clamp(min=_LEAST_VARIANCE * float(variances.max()) + 1e-12).sqrt()
    white = directions @ torch.diag(1 / deviations) @ directions.T
    colour = directions @ torch.diag(deviations) @ directions.T
    into, out = network.quant_conv, network.post_quant_conv
    w_into, w_out = (conv.weight[:, :, 0, 0].double() for conv in (into, out))
    out.bias.add_((w_out @ mean).float())
    out.weight.copy_((w_out @ colour)[:, :, None, None])
    into.weight.copy_((white @ w_into)[:, :, None, None])
    into.bias.copy_(white @ (into.bias.double() - mean))


def corners(bits: int) -> torch.Tensor:
    """Return the corners of a cube, (2^bits, bits) float32 of -1 and 1; bit n of an index: the sign of channel n."""
    index = torch.arange(1 << bits)[:, None] >> torch.arange(bits)
    return (2 * (index & 1) - 1).float()
