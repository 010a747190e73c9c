"""The losses of the autoencoder task; each says its reduction. Computed in float32, outside autocast."""

from pathlib import Path

import torch
from torch import nn

from eval.features import Distance, FeaturesError, SqueezeFeatures, find_backbone, load_lpips
from train.config import LossConfig

_MS_SSIM_SCALES = 5
MS_SSIM_MIN_SIDE = 2 * 2 ** (_MS_SSIM_SCALES - 1) + 1  # pixels; five scales with a window of 3


def kl_per_pixel(mean: torch.Tensor, logvar: torch.Tensor, n_pixels: int) -> torch.Tensor:
    """KL(q(z|x) || N(0, I)) in nats per image pixel: sum over D, h, w, divided by H * W, mean over B.

    Kingma & Welling 2013, appendix B, arXiv:1312.6114.

    Args:
        mean: (B, D, h, w) raw.
        logvar: (B, D, h, w).
        n_pixels: H * W.
    """
    nats = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1.0 - logvar.float())
    return nats.sum(dim=(1, 2, 3)).mean() / n_pixels


def pixel_loss(x: torch.Tensor, x_hat: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean over B, C, H, W of |x - x_hat| ("l1") or its square ("l2"); pixels in [-1, 1]."""
    error = x.float() - x_hat.float()
    return error.abs().mean() if kind == "l1" else error.square().mean()


def ms_ssim_loss(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """1 - MS-SSIM (Wang, Simoncelli & Bovik 2003), mean over B; pytorch-msssim, five scales.

    Args:
        x: (B, C, H, W) in [-1, 1], H, W >= MS_SSIM_MIN_SIDE; the window is 11 pixels where five scales fit with it
            (from 161 pixels on), smaller on smaller crops: 7 at 128 pixels, 3 at 64.
        x_hat: the same shape.
    """
    from pytorch_msssim import ms_ssim

    shortest = min(x.shape[-2:])
    window = min(11, (shortest - 1) // 2 ** (_MS_SSIM_SCALES - 1) + 1)
    window -= 1 - window % 2
    x01, x_hat01 = ((image.float() + 1.0) / 2.0 for image in (x, x_hat))
    loss: torch.Tensor = 1.0 - ms_ssim(x01, x_hat01, data_range=1.0, win_size=window, win_sigma=1.5 * window / 11)
    return loss


def build_perceptual(config: LossConfig) -> Distance | None:
    """Build the perceptual distance that a recipe asks for; None when it asks for none, or "auto" finds no features.

    Raises:
        FeaturesError: the backbone's file is missing or damaged; the message says which, and how to get it.
    """
    if config.perceptual == "none" or config.perceptual_weight == 0:
        return None
    path = Path(config.features) if config.features else None
    if config.perceptual.startswith("lpips-"):
        return load_lpips(config.perceptual.removeprefix("lpips-"), path)
    try:
        return SqueezeFeatures(find_backbone("squeezenet1_0", path))
    except FeaturesError:
        if config.perceptual == "auto" and path is None:
            return None
        raise


class ReconstructionLoss(nn.Module):
    """The weighted terms between an image and its reconstruction; no trainable parameter."""

    def __init__(self, config: LossConfig) -> None:
        """Raise FeaturesError (a UsageError) when the features that the recipe asks for are missing."""
        super().__init__()
        self._config = config
        self.perceptual = build_perceptual(config)
        looked = config.perceptual == "auto" and config.perceptual_weight > 0
        self.why_not_perceptual = "no features found" if looked else "not asked for"
        self.ms_ssim_weight = config.ms_ssim_weight
        if self.perceptual is None and looked:
            self.ms_ssim_weight = max(config.ms_ssim_weight, config.fallback_ms_ssim_weight)
        if self.ms_ssim_weight > 0:
            import pytorch_msssim  # noqa: F401  (missing: found here, before training)

    def forward(self, x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the named terms, each a scalar that is already weighted."""
        terms: dict[str, torch.Tensor] = {self._config.pixel: pixel_loss(x, x_hat, self._config.pixel)}
        if self.perceptual is not None:
            terms["perceptual"] = self._config.perceptual_weight * self.perceptual(x, x_hat.float()).mean()
        if self.ms_ssim_weight > 0:
            terms["ms_ssim"] = self.ms_ssim_weight * ms_ssim_loss(x, x_hat)
        return terms
