"""The patch discriminator and the losses of the adversarial game.

    x (B, C, H, W) in [-1, 1] -> stride-2 convolutions -> logits (B, 1, h', w'): one judgement per overlapping patch

GroupNorm or spectral norm, never BatchNorm, whose statistics would mix images and differ between ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from train.loss_config import AdversarialConfig

_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004, appendix 6.1.2) with GroupNorm or spectral norm.

    Attributes:
        config: what rebuilds it, as plain JSON values.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "group", image_channels: int = 3) -> None:
        """Build it with normal(0, 0.02) weights.

        Args:
            channels: width of the first layer; doubles per layer, up to 8 times.
            layers: stride-2 layers, >= 1; 3 sees patches of 70 pixels.
            norm: "group", "spectral" or "none".
            image_channels: C.
        """
        super().__init__()
        self.config: dict[str, Any] = {"channels": channels, "layers": layers, "norm": norm}
        self.config |= {"image_channels": image_channels}
        widths = [channels * min(2**n, 8) for n in range(layers + 1)]
        blocks: list[nn.Module] = [_convolution(image_channels, widths[0], 2, norm), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            blocks.append(_convolution(widths[n - 1], widths[n], 2 if n < layers else 1, norm))
            if norm == "group":
                blocks.append(nn.GroupNorm(_GROUPS, widths[n]))
            blocks.append(nn.LeakyReLU(0.2))
        blocks.append(_convolution(widths[-1], 1, 1, norm))
        self.layers = nn.Sequential(*blocks)

    @property
    def min_side(self) -> int:
        """Smallest side of an image, pixels: below it nothing is left of the last layers."""
        return int(3 * 2 ** self.config["layers"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 1, h', w'), larger for what looks real, of x (B, C, H, W) in [-1, 1]."""
        logits: torch.Tensor = self.layers(x)
        return logits


def _convolution(inputs: int, outputs: int, stride: int, norm: str) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 4, stride, 1)
    nn.init.normal_(convolution.weight, 0.0, 0.02)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return nn.utils.parametrizations.spectral_norm(convolution) if norm == "spectral" else convolution


def build_discriminator(config: AdversarialConfig, image_channels: int = 3) -> PatchDiscriminator:
    """Build the discriminator of a recipe, with random weights, for images of C = `image_channels`."""
    return PatchDiscriminator(config.channels, config.layers, config.norm, image_channels)


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, kind: str) -> torch.Tensor:
    """Half the sum of the means over B and patches for real and fake logits.

    hinge: relu(1 - D(x)), relu(1 + D(x_hat)) (Lim & Ye 2017, arXiv:1705.02894 eq. 2); else softplus(-D(x)),
    softplus(D(x_hat)) (Goodfellow et al. 2014, arXiv:1406.2661 eq. 1).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean over B and patches: softplus(-D(x_hat)) for "non-saturating", else -D(x_hat)."""
    return F.softplus(-fake.float()).mean() if kind == "non-saturating" else -fake.float().mean()


def r1_penalty(discriminator: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Squared norm of the gradient of D at real images: sum over C, H, W, mean over B.

    Mescheder et al. 2018, arXiv:1801.04406 eq. 9 (without its 1/2). Logits are averaged over patches, as in the losses.

    Args:
        discriminator: not wrapped and not compiled: this needs second derivatives.
        x: (B, 3, H, W) in [-1, 1].
    """
    x = x.detach().float().requires_grad_()
    logits = discriminator.forward(x).float()  # .forward: past torch.compile, which has no double backward
    (gradient,) = torch.autograd.grad(logits.mean((1, 2, 3)).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def lecam_loss(real: torch.Tensor, fake: torch.Tensor, real_anchor: float, fake_anchor: float) -> torch.Tensor:
    """LeCAM: mean over B and patches of relu(D(x) - a_fake)^2 plus that of relu(a_real - D(x_hat))^2.

    Tseng et al. 2021, arXiv:2104.03310 eq. 7; per logit. The anchors are moving averages of the mean logits.
    """
    return F.relu(real.float() - fake_anchor).square().mean() + F.relu(real_anchor - fake.float()).square().mean()
