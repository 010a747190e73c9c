"""The training step as one writes it by hand, for `train.bench` to compare ours with: eager, no loop around it.

    x -> encoder -> z = mean + deviation * noise -> decoder -> x_hat -> losses -> backward, clip, AdamW -> EMA
                                                                     -> discriminator's loss -> backward, clip, AdamW

It computes what `train.trainer.Trainer.step` computes, which a test holds it to, by the formulas alone. Of ours it has
the networks' configuration, the frozen perceptual network, and pytorch-msssim with its window.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from codec.latent_model import latent_model
from codec.pixels import round_to_8_bit
from train.config import Config
from train.discriminator import build_discriminator
from train.losses import ReconstructionLoss, kl_scale, ms_ssim_loss
from train.networks import build_network, checkpoint_activations
from train.precision import autocast
from train.trainer import Trainer

_LEAST_NORM = 1e-12  # of a gradient that something is divided by, as in `train.adversary`


class PlainLoop:
    """The same networks and losses, trained as in latent diffusion's `contperceptual.py`, with one network pass.

    Rombach et al. 2022, arXiv:2112.10752; the adaptive weight is eq. 7 of Esser et al. 2021, arXiv:2012.09841. Terms
    are means as in our losses, where latent diffusion takes sums, and their weights are the recipe's.

    Attributes:
        network: the autoencoder.
        discriminator: its adversary.
        ratio: the last adaptive ratio, capped.
    """

    def __init__(self, config: Config, trainer: Trainer) -> None:
        """Build networks of a `comparable` config, with the weights that the trainer has now."""
        task: Any = trainer.task
        optim, adversarial, device = config.optim, config.adversarial, trainer.device
        self._config = config
        self.network: nn.Module = build_network(config.model)
        self.network.load_state_dict(task.module.network.state_dict())
        self.discriminator: nn.Module = build_discriminator(adversarial)
        self.discriminator.load_state_dict(task.critic.state_dict())
        if config.run.gradient_checkpointing:
            checkpoint_activations(self.network)
        self.network.to(device)
        self.discriminator.to(device)
        self._model = latent_model(self.network)
        self._last_weight = self._model.decoder_out.get_parameter("weight")
        self._loss = ReconstructionLoss(config.loss).to(device)
        self._autocast = autocast(config.run.precision, device)
        self._weights = list(self.network.parameters())
        self._averages = [parameter.detach().clone() for parameter in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        self._d_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(),
            lr=adversarial.lr or optim.lr,
            betas=adversarial.betas,
            weight_decay=0.0,
        )
        self._clip_norm = optim.clip_norm or float("inf")
        self.ratio: torch.Tensor | None = None

    def step(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Train both networks on one batch and return the weighted losses, named as ours.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            noise: (B, D, h, w) standard normal, of the posterior's sample; None draws it.
        """
        config = self._config
        with self._autocast():
            posterior = self._model.encode(x)
            z = posterior.mean
            if posterior.logvar is not None:
                noise = torch.randn_like(z) if noise is None else noise
                z = z + torch.exp(0.5 * posterior.logvar) * noise
            x_hat = self._model.decode(z)
        x_hat = x_hat.float()
        losses = self._reconstruction(x, x_hat)
        nll = torch.stack(list(losses.values())).sum()
        if posterior.logvar is not None:
            mean, logvar = posterior.mean, posterior.logvar
            nats = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
            n_positions = z.shape[-2] * z.shape[-1]
            scale = kl_scale(config.kl.reduction, x.shape[-2] * x.shape[-1], n_positions, z.shape[1])
            losses["kl"] = config.kl.weight * scale / n_positions * nats
        self.discriminator.requires_grad_(False)
        with self._autocast():
            logits = self.discriminator(x_hat)
        adversarial = self._generator_loss(logits.float())
        losses["adversarial"] = config.adversarial.weight * self._adaptive(nll, adversarial) * adversarial
        total = nll + losses["adversarial"] + losses.get("kl", 0.0)
        self._update(total, self._optimizer, self._weights)
        self.discriminator.requires_grad_(True)
        d_loss = self._discriminator_loss(x, x_hat.detach())
        self._update(d_loss, self._d_optimizer, list(self.discriminator.parameters()))
        torch._foreach_lerp_(self._averages, [weight.detach() for weight in self._weights], 1 - config.optim.ema_decay)
        return {name: loss.detach() for name, loss in {"loss": total, **losses, "d_loss": d_loss}.items()}

    def _reconstruction(self, x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, torch.Tensor]:
        config, loss = self._config.loss, self._loss
        error = (x - x_hat).abs() if config.pixel == "l1" else (x - x_hat) ** 2
        losses: dict[str, torch.Tensor] = {config.pixel: config.pixel_weight * error.mean()}
        if loss.perceptual is not None:
            losses["perceptual"] = loss.perceptual_weight * loss.perceptual(x, x_hat).mean()
        if loss.ms_ssim_weight > 0:
            losses["ms_ssim"] = loss.ms_ssim_weight * ms_ssim_loss(x, x_hat)
        return losses

    def _adaptive(self, nll: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor | float:
        config = self._config.adversarial
        if not config.adaptive:
            return 1.0
        (of_nll,) = torch.autograd.grad(nll, self._last_weight, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(adversarial, self._last_weight, retain_graph=True)
        ratio = of_nll.norm() / of_adversarial.norm().clamp(min=_LEAST_NORM)
        self.ratio = ratio.clamp(max=config.adaptive_cap)
        return self.ratio

    def _generator_loss(self, logits: torch.Tensor) -> torch.Tensor:
        return F.softplus(-logits).mean() if self._config.adversarial.loss == "non-saturating" else -logits.mean()

    def _discriminator_loss(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        config = self._config.adversarial
        if config.round_fakes:
            x, x_hat = round_to_8_bit(x), round_to_8_bit(x_hat)
        with self._autocast():
            real, fake = self.discriminator(x).float(), self.discriminator(x_hat).float()
        if config.loss == "hinge":
            return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

    def _update(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, self._clip_norm)
        optimizer.step()
