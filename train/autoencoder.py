"""The autoencoder task: KL autoencoders now; VQ and Tiny share it and differ only inside the model.

image (B, 3, S, S) -> AutoencoderModule (encoder, posterior sample, decoder) -> x_hat -> ReconstructionLoss + KL
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from codec import console
from codec.errors import UsageError
from codec.latent_model import KLModel
from codec.pixels import to_float, to_uint8
from codec.shards import SampleRef
from eval.features import MIN_SIDE
from eval.metrics import ms_ssim, psnr
from train.config import Config
from train.data import whole_images
from train.export import export_model
from train.losses import MS_SSIM_MIN_SIDE, ReconstructionLoss, kl_per_pixel
from train.networks import build_network

_GRID = 6  # pictures in the validation grid


class AutoencoderModule(nn.Module):
    """What DDP wraps: one forward is the whole pass, so that every gradient is reduced over ranks."""

    def __init__(self, network: AutoencoderKL) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode, draw one sample of the posterior, decode.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            generator: of the posterior's noise; on the CPU, so that devices agree.

        Returns:
            x_hat (B, 3, H, W), mean and log-variance (B, D, h, w), raw.
        """
        posterior = self.network.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        z = mean + torch.exp(0.5 * logvar) * noise
        return self.network.decode(z).sample, mean, logvar


class AutoencoderTask:
    """See `train.task.Task`."""

    def __init__(self, config: Config, training: Sequence[SampleRef], validation: Sequence[SampleRef]) -> None:
        """Build network and losses; raises UsageError when the perceptual features are missing."""
        self._config = config
        self._training = training
        self._validation = validation
        self._network = build_network(config.model)
        self.module: nn.Module = AutoencoderModule(self._network)
        self.loss = ReconstructionLoss(config.loss)
        smallest = MIN_SIDE if self.loss.perceptual is not None else 1
        if self.loss.ms_ssim_weight > 0:
            smallest = max(smallest, MS_SSIM_MIN_SIDE)
        if config.data.crop < smallest:
            raise UsageError(f"data.crop = {config.data.crop}: this recipe's losses need at least {smallest} pixels")

    def to(self, device: torch.device) -> None:
        """Move the losses' frozen networks; the loop moves `module`."""
        self.loss.to(device)

    def describe(self) -> dict[str, str]:
        """Return what the run prints about the losses and the network."""
        n_parameters = sum(p.numel() for p in self.module.parameters())
        perceptual = self.loss.perceptual
        weights = self._config.loss
        terms: list[str] = [weights.pixel]
        if perceptual is not None:
            terms.append(f"{weights.perceptual_weight:g} {perceptual.name}")
        if self.loss.ms_ssim_weight > 0:
            terms.append(f"{self.loss.ms_ssim_weight:g} (1 - MS-SSIM)")
        terms.append(f"{weights.kl_weight:g} KL nats/pixel")
        model = self._config.model
        return {
            "network": f"AutoencoderKL f{model.f} c{model.latent_channels}, {n_parameters / 1e6:.2f} M parameters",
            "loss": " + ".join(terms) + ("" if perceptual else f" (perceptual: n/a, {self.loss.why_not_perceptual})"),
        }

    def generator_step(
        self, module: nn.Module, batch: Mapping[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See `train.task.Task.generator_step`."""
        x = batch["image"]
        x_hat, mean, logvar = module(x, generator)
        terms: dict[str, torch.Tensor] = self.loss(x, x_hat)
        terms["kl"] = self._config.loss.kl_weight * kl_per_pixel(mean, logvar, x.shape[-2] * x.shape[-1])
        return terms

    def evaluate(self, module: nn.Module, device: torch.device) -> tuple[dict[str, float], np.ndarray | None]:
        """Measure mode reconstructions of the held-out images; see `train.task.Task.evaluate`.

        Returns:
            psnr (dB, 8 bit, mean of images), ms_ssim (images with sides > 160 only), kl_bits_per_pixel; and a grid with
            originals above their reconstructions.
        """
        if not self._validation:
            return {}, None
        model = KLModel(_network_of(module))
        rows: list[dict[str, float]] = []
        columns: list[np.ndarray] = []
        with torch.inference_mode():
            side, f = self._config.data.validation_crop, self._config.model.f
            bad: list[tuple[str, str]] = []
            for _, image in whole_images(self._validation, side, f, bad):
                posterior = model.encode(to_float(image)[None].to(device))
                x_hat = to_uint8(model.decode(posterior.mean)[0])
                assert posterior.logvar is not None
                nats = float(kl_per_pixel(posterior.mean, posterior.logvar, image.shape[0] * image.shape[1]))
                row = {"psnr": psnr(image, x_hat), "kl_bits_per_pixel": nats / float(np.log(2))}
                similarity = ms_ssim(image, x_hat)
                rows.append(row if similarity is None else {**row, "ms_ssim": similarity})
                if len(columns) < _GRID:
                    columns.append(np.concatenate([image, x_hat]))
        for key, reason in bad:
            console.error(f"sample {key}: {reason} (left out of validation)")
        if not rows:
            return {}, None
        names = dict.fromkeys(name for row in rows for name in row)
        means = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
        return means, _side_by_side(columns)

    def export(self, module: nn.Module, out: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """See `train.task.Task.export`."""
        return export_model(
            _network_of(module), out, self._config, self._training, self._validation, record=record, device=device
        )


def _network_of(module: nn.Module) -> AutoencoderKL:
    assert isinstance(module, AutoencoderModule)
    return module.network


def _side_by_side(columns: Iterable[np.ndarray], gap: int = 4) -> np.ndarray:
    """Place (H, W, 3) pictures in a row on white, tops aligned."""
    columns = list(columns)
    height = max(column.shape[0] for column in columns)
    padded = [
        np.pad(column, ((0, height - column.shape[0]), (0, gap), (0, 0)), constant_values=255) for column in columns
    ]
    return np.concatenate(padded, axis=1)
