"""The losses of the autoencoder task; each says its reduction. Computed in float32, outside autocast."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from eval.features import MIN_SIDE, Distance, FeaturesError, SqueezeFeatures, find_backbone, load_lpips
from train.channels import Channels
from train.loss_config import KLConfig, LossConfig

_BCE_RANGE = 1 - 1 / 255  # half a level of 8 bits away from black and white: a finite cost there
_MS_SSIM_SCALES = 5
MS_SSIM_MIN_SIDE = 2 * 2 ** (_MS_SSIM_SCALES - 1) + 1  # pixels; five scales with a window of 3


def kl_nats(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(q(z|x) || N(0, I)) in nats per latent position and channel: mean over B, h, w.

    Kingma & Welling 2013, appendix B, arXiv:1312.6114.

    Args:
        mean: (B, D, h, w) raw.
        logvar: (B, D, h, w).

    Returns:
        (D,) float32.
    """
    mean, logvar = mean.float(), logvar.float()
    return (0.5 * (mean**2 + logvar.exp() - 1.0 - logvar)).mean((0, 2, 3))


def vq_loss(z: torch.Tensor, z_q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of a vector quantiser: mean over all elements of (sg[z] - z_q)^2 + beta * (z - sg[z_q])^2.

    The first term draws the codebook to the latents; the second, the commitment, the latents to the codebook, and it
    is the one that beta weighs. van den Oord et al. 2017 eq. 3, arXiv:1711.00937.

    Args:
        z: (B, D, h, w) raw latents of the encoder.
        z_q: (B, D, h, w) the codebook's vectors in their place, with a gradient to the codebook and none to z.
        beta: weight of the commitment; 0.25 in the paper.
    """
    z, z_q = z.float(), z_q.float()
    return F.mse_loss(z_q, z.detach()) + beta * F.mse_loss(z, z_q.detach())


def commitment_loss(z: torch.Tensor, z_q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the second term of `vq_loss` alone, beta * (z - sg[z_q])^2: of a codebook that no gradient moves."""
    return beta * F.mse_loss(z.float(), z_q.detach().float())


def kl_scale(reduction: str, n_pixels: int, n_positions: int, channels: int) -> float:
    """Return what the KL per position, summed over channels, is multiplied by for a reduction of `kl.reduction`.

    Args:
        reduction: "pixel" (KL of an image / H * W), "image" (sum over D, h, w) or "element" (mean over D, h, w).
        n_pixels: H * W.
        n_positions: h * w.
        channels: D.
    """
    return {"pixel": n_positions / n_pixels, "image": float(n_positions), "element": 1.0 / channels}[reduction]


def kl_loss(
    per_channel: torch.Tensor, config: KLConfig, n_pixels: int, n_positions: int, factor: float
) -> torch.Tensor:
    """Return the weighted KL term of a batch, a scalar.

    Args:
        per_channel: (D,) nats per latent position, of `kl_nats`.
        config: weight, reduction, schedule, free bits.
        n_pixels: H * W.
        n_positions: h * w.
        factor: of `train.schedules.kl_factor`, 0..1.
    """
    if config.free_bits > 0:  # Kingma et al. 2016, arXiv:1606.04934 eq. 15, a channel being a group
        per_channel = per_channel.clamp(min=config.free_bits)
    scale = kl_scale(config.reduction, n_pixels, n_positions, per_channel.numel())
    if config.schedule != "capacity":
        return config.weight * factor * scale * per_channel.sum()
    # Burgess et al. 2018, arXiv:1804.03599 eq. 8; C is given per pixel, the sum is per position
    target = factor * config.capacity * n_pixels / n_positions
    return config.weight * scale * (per_channel.sum() - target).abs()


def kl_weight_in_ldm(
    config: KLConfig, pixel_weight: float, crop: int, f: int, channels: int, image_channels: int = 3
) -> float:
    """Return the weight that gives the same balance in LDM's convention.

    LDM adds w * (KL summed over D, h, w) to the pixel error *summed* over C * H * W, both divided by B; here the pixel
    error is a mean. So w = C * H * W * (our factor on that sum) / pixel_weight.

    Args:
        config: weight and reduction.
        pixel_weight: of the pixel term.
        crop: H = W, pixels.
        f: downsampling factor.
        channels: D.
        image_channels: C.
    """
    n_pixels, n_positions = crop**2, (crop // f) ** 2
    on_sum = config.weight * kl_scale(config.reduction, n_pixels, n_positions, channels) / n_positions
    return image_channels * n_pixels * on_sum / pixel_weight if pixel_weight > 0 else float("inf")


def pixel_loss(x: torch.Tensor, x_hat: torch.Tensor, kind: str, huber_delta: float = 0.1) -> torch.Tensor:
    """Mean over B, C, H, W of one error per value; pixels in [-1, 1].

    l1: |x - x_hat|; l2: its square; huber: Huber 1964, e^2 / 2 up to `huber_delta`, then delta (e - delta / 2), divided
    by delta so that large errors cost as in l1; bce: binary cross-entropy in nats of the pixels in [0, 1], plus the
    distance by which x_hat leaves its range, where the cross-entropy says nothing.
    """
    x, x_hat = x.float(), x_hat.float()
    if kind == "bce":
        inside = x_hat.clamp(-_BCE_RANGE, _BCE_RANGE)
        cross_entropy = F.binary_cross_entropy((inside + 1) / 2, (x + 1) / 2)
        return cross_entropy + (x_hat - inside).abs().mean()
    if kind == "huber":
        return F.huber_loss(x_hat, x, delta=huber_delta) / huber_delta
    return F.l1_loss(x_hat, x) if kind == "l1" else F.mse_loss(x_hat, x)


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

    def __init__(self, config: LossConfig, channels: Channels | None = None) -> None:
        """Prepare the terms.

        Args:
            config: of the terms.
            channels: of the images; None = RGB.

        Raises:
            FeaturesError: (a UsageError) the features that the recipe asks for are missing.
        """
        super().__init__()
        self._config = config
        self.channels = channels or Channels()
        self.perceptual = build_perceptual(config)
        self.perceptual_weight = config.perceptual_weight
        looked = config.perceptual == "auto" and config.perceptual_weight > 0
        self.why_not_perceptual = "no features found" if looked else "not asked for"
        self.ms_ssim_weight = config.ms_ssim_weight
        if self.perceptual is None and looked:
            self.ms_ssim_weight = max(config.ms_ssim_weight, config.fallback_ms_ssim_weight)
        if self.ms_ssim_weight > 0:
            import pytorch_msssim  # noqa: F401  (missing: found here, before training)

    @property
    def min_side(self) -> int:
        """Smallest side of a crop that the terms can take, pixels."""
        smallest = MIN_SIDE if self.perceptual is not None else 1
        return max(smallest, MS_SSIM_MIN_SIDE) if self.ms_ssim_weight > 0 else smallest

    def describe(self) -> str:
        """Return the terms with their weights."""
        config = self._config
        terms = [config.pixel if config.pixel_weight == 1 else f"{config.pixel_weight:g} {config.pixel}"]
        if self.perceptual is not None:
            terms.append(f"{config.perceptual_weight:g} {self.perceptual.name}")
        if self.ms_ssim_weight > 0:
            terms.append(f"{self.ms_ssim_weight:g} (1 - MS-SSIM)")
        text = " + ".join(terms)
        return f"({text}) exp(-s) + s, s learned" if config.learned_scale else text

    def forward(
        self, x: torch.Tensor, x_hat: torch.Tensor, background: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the named terms, each a scalar that is already weighted; `train.channels` says what each looks at.

        Args:
            x: (B, C, H, W) in [-1, 1].
            x_hat: the same shape.
            background: (B, 3, 1, 1) in [-1, 1], behind transparent pixels of both; None = white.
        """
        config = self._config
        compared, compared_hat = (self.channels.compared(image.float(), background) for image in (x, x_hat))
        pixel = pixel_loss(compared, compared_hat, config.pixel, config.huber_delta)
        x, x_hat = (self.channels.seen(image.float(), background) for image in (x, x_hat))
        terms: dict[str, torch.Tensor] = {config.pixel: config.pixel_weight * pixel}
        if self.perceptual is not None:
            terms["perceptual"] = self._config.perceptual_weight * self.perceptual(x, x_hat).mean()
        if self.ms_ssim_weight > 0:
            terms["ms_ssim"] = self.ms_ssim_weight * ms_ssim_loss(x, x_hat)
        return terms
