import math
from pathlib import Path

import pytest
import torch

from codec.errors import UsageError
from eval.features import SqueezeFeatures
from train.loss_config import KLConfig, LossConfig
from train.losses import (
    ReconstructionLoss,
    build_perceptual,
    kl_loss,
    kl_nats,
    kl_weight_in_ldm,
    ms_ssim_loss,
    pixel_loss,
    vq_loss,
)


def pair(side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(2, 3, side, side) * 2 - 1
    return x, (x + 0.2 * torch.randn_like(x)).requires_grad_(True)


def test_kl_is_in_nats_per_position_and_channel() -> None:
    mean, logvar = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, -2.0]).view(1, 2, 1, 1)
    nats = kl_nats(mean.expand(3, 2, 4, 4), logvar.expand(3, 2, 4, 4))
    assert nats.tolist() == pytest.approx([0.5 * 4, 0.5 * (math.exp(-2) - 1 + 2)])
    # Against Monte Carlo: E_q[log q - log p].
    torch.manual_seed(0)
    q = torch.distributions.Normal(mean.flatten(), torch.exp(0.5 * logvar.flatten()))
    z = q.sample((200_000,))
    monte_carlo = (q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)).mean(0)
    assert monte_carlo.tolist() == pytest.approx(nats.tolist(), rel=0.01)


def test_each_reduction_of_the_kl_says_what_it_is_and_converts_to_ldm() -> None:
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    mean, logvar = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    nats = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    per_image = float(nats.sum((1, 2, 3)).mean())
    expected = {"pixel": per_image / 64**2, "image": per_image, "element": float(nats.mean())}
    for reduction, value in expected.items():
        config = KLConfig(weight=0.3, reduction=reduction)
        term = float(kl_loss(kl_nats(mean, logvar), config, 64 * 64, 8 * 8, factor=1.0))
        assert term == pytest.approx(0.3 * value, rel=1e-5)
        # LDM's loss, sums divided by B, is ours times the number of values: the same minimum.
        in_ldm = kl_weight_in_ldm(config, pixel_weight=2.0, crop=64, f=8, channels=4)
        ours = 2.0 * float(pixel_loss(x, x_hat, "l1")) + term
        ldm = (float((x - x_hat).abs().sum()) / 2 + in_ldm * per_image) / (3 * 64 * 64)
        assert 2.0 * ldm == pytest.approx(ours, rel=1e-5)


def test_free_bits_leave_channels_below_them_alone_and_capacity_pulls_towards_it() -> None:
    per_channel = torch.tensor([0.1, 2.0], requires_grad=True)
    kl_loss(per_channel, KLConfig(weight=1.0, free_bits=0.5), 64, 1, 1.0).backward()
    assert per_channel.grad is not None
    assert per_channel.grad.tolist() == pytest.approx([0.0, 1 / 64])
    for capacity, sign in ((1.0 / 64, 1.0), (3.0 / 64, -1.0)):  # nats per pixel; the sum above is 2.1 nats per position
        per_channel.grad = None
        config = KLConfig(weight=1.0, schedule="capacity", capacity=capacity, reduction="image")
        loss = kl_loss(per_channel, config, 64, 1, 1.0)
        assert loss.item() == pytest.approx(abs(2.1 - 64 * capacity), rel=1e-5)
        loss.backward()
        assert per_channel.grad.tolist() == [sign, sign]
    half = kl_loss(per_channel, KLConfig(weight=1.0, schedule="capacity", capacity=1.0, reduction="image"), 64, 1, 0.5)
    assert half.item() == pytest.approx(32 - 2.1, rel=1e-5)


def test_pixel_losses_are_means_over_everything() -> None:
    x, x_hat = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    x_hat[0] = -0.1
    assert float(pixel_loss(x, x_hat, "l1")) == pytest.approx(0.3)
    assert float(pixel_loss(x, x_hat, "l2")) == pytest.approx((0.01 + 0.25) / 2)
    # delta 0.2: 0.1 lies in the squared part, 0.5 in the absolute one; divided by delta
    assert float(pixel_loss(x, x_hat, "huber", 0.2)) == pytest.approx((0.005 + 0.2 * (0.5 - 0.1)) / 2 / 0.2)
    p = torch.tensor([0.45, 0.75])
    assert float(pixel_loss(x, x_hat, "bce")) == pytest.approx(float((-0.5 * (p.log() + (1 - p).log())).mean()))
    assert float(pixel_loss(x, torch.full_like(x, 3.0), "bce")) > float(pixel_loss(x, torch.full_like(x, 1.1), "bce"))


@pytest.mark.parametrize("side", [48, 64, 128, 176])
def test_ms_ssim_loss_is_zero_for_equal_images_and_grows_with_noise(side: int) -> None:
    x, x_hat = pair(side)
    assert float(ms_ssim_loss(x, x)) == pytest.approx(0, abs=1e-5)
    assert 0 < float(ms_ssim_loss(x, x + 0.3 * (x_hat - x))) < float(ms_ssim_loss(x, x_hat)) < 1


def test_auto_takes_the_features_that_are_there_and_falls_back_to_ms_ssim(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENT_CODEC_FEATURES", raising=False)
    fallen = ReconstructionLoss(LossConfig())
    assert fallen.perceptual is None
    assert set(fallen(*pair())) == {"l1", "ms_ssim"}
    monkeypatch.setenv("LATENT_CODEC_FEATURES", str(backbone))
    found = ReconstructionLoss(LossConfig())
    assert isinstance(found.perceptual, SqueezeFeatures)
    assert set(found(*pair())) == {"l1", "perceptual"}
    assert build_perceptual(LossConfig(perceptual="none")) is None
    monkeypatch.delenv("LATENT_CODEC_FEATURES")
    for config in (
        LossConfig(perceptual="none"),
        LossConfig(perceptual_weight=0),
    ):
        assert set(ReconstructionLoss(config)(*pair())) == {"l1"}
    assert ReconstructionLoss(LossConfig(ms_ssim_weight=0.9)).ms_ssim_weight == 0.9


def test_features_that_were_asked_for_and_are_missing_are_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENT_CODEC_FEATURES", raising=False)
    for config in (
        LossConfig(perceptual="sqz10"),
        LossConfig(features=str(tmp_path / "no")),
        LossConfig(perceptual="lpips-vgg"),
    ):
        with pytest.raises(UsageError, match=r"squeezenet1_0|vgg16"):
            build_perceptual(config)


def test_the_perceptual_term_carries_its_weight(backbone: Path) -> None:
    x, x_hat = pair()
    light = ReconstructionLoss(LossConfig(features=str(backbone), perceptual_weight=0.1))(x, x_hat)["perceptual"]
    heavy = ReconstructionLoss(LossConfig(features=str(backbone), perceptual_weight=0.3))(x, x_hat)["perceptual"]
    assert float(heavy) == pytest.approx(3 * float(light), rel=1e-5)


def test_beta_weighs_the_commitment_of_the_latents_and_not_the_codebook() -> None:
    rng = torch.Generator().manual_seed(0)
    codebook = torch.randn(5, 3, generator=rng, requires_grad=True)
    z = torch.randn(2, 3, 4, 4, generator=rng, requires_grad=True)
    chosen = torch.randint(5, (2, 4, 4), generator=rng)
    z_q = codebook[chosen].permute(0, 3, 1, 2)
    loss = vq_loss(z, z_q, beta=0.25)
    towards_latents, towards_codebook = torch.autograd.grad(loss, (z_q, z))
    pull = 2 * (z_q - z).detach() / z.numel()
    assert torch.allclose(towards_latents, pull)
    assert torch.allclose(towards_codebook, -0.25 * pull)
    assert float(loss) == pytest.approx(1.25 * float((z - z_q).square().mean()), rel=1e-6)
