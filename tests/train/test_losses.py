import math
from pathlib import Path

import pytest
import torch

from codec.errors import UsageError
from eval.features import SqueezeFeatures
from train.autoencoder import AutoencoderModule
from train.config import LossConfig, ModelConfig
from train.losses import ReconstructionLoss, build_perceptual, kl_per_pixel, ms_ssim_loss, pixel_loss
from train.networks import build_network

# torch's own initialisation: the linear one starts residual branches at zero, where their first half has no gradient.
TINY = ModelConfig(
    init="diffusers",
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_add_attention=False,
    use_quant_conv=False,
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import squeezenet1_0

    path = tmp_path_factory.mktemp("features") / "squeezenet1_0-random.pth"
    torch.manual_seed(0)
    torch.save(squeezenet1_0(weights=None).state_dict(), path)
    return path


def pair(side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(2, 3, side, side) * 2 - 1
    return x, (x + 0.2 * torch.randn_like(x)).requires_grad_(True)


def test_kl_is_the_sum_over_the_latent_divided_by_the_pixels() -> None:
    mean, logvar = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, -2.0]).view(1, 2, 1, 1)
    nats = 0.5 * 4 + 0.5 * (math.exp(-2) - 1 + 2)
    assert float(kl_per_pixel(mean.expand(3, 2, 4, 4), logvar.expand(3, 2, 4, 4), 64)) == pytest.approx(nats * 16 / 64)
    # Against Monte Carlo: E_q[log q - log p].
    torch.manual_seed(0)
    q = torch.distributions.Normal(mean.flatten(), torch.exp(0.5 * logvar.flatten()))
    z = q.sample((200_000,))
    monte_carlo = (q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)).sum(1).mean()
    assert float(monte_carlo) == pytest.approx(nats, rel=0.01)


def test_pixel_losses_are_means_over_everything() -> None:
    x, x_hat = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    x_hat[0] = -0.1
    assert float(pixel_loss(x, x_hat, "l1")) == pytest.approx(0.3)
    assert float(pixel_loss(x, x_hat, "l2")) == pytest.approx((0.01 + 0.25) / 2)


@pytest.mark.parametrize("side", [48, 64, 128, 176])
def test_ms_ssim_loss_is_zero_for_equal_images_and_grows_with_noise(side: int) -> None:
    x, x_hat = pair(side)
    assert float(ms_ssim_loss(x, x)) == pytest.approx(0, abs=1e-5)
    assert 0 < float(ms_ssim_loss(x, x + 0.3 * (x_hat - x))) < float(ms_ssim_loss(x, x_hat)) < 1


def test_each_term_reaches_the_reconstruction_and_the_kl_only_the_encoder(backbone: Path) -> None:
    torch.manual_seed(0)
    config = LossConfig(perceptual="sqz10", features=str(backbone), ms_ssim_weight=0.5)
    module, loss = AutoencoderModule(build_network(TINY)), ReconstructionLoss(config)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    x_hat, mean, logvar = module(x, torch.Generator().manual_seed(0))
    terms = {**loss(x, x_hat), "kl": kl_per_pixel(mean, logvar, 64 * 64)}
    assert set(terms) == {"l1", "perceptual", "ms_ssim", "kl"}
    parameters = dict(module.named_parameters())
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {key for key, g in zip(parameters, gradients, strict=True) if g is not None and bool((g != 0).any())}
        encoder = {key for key in parameters if key.startswith("network.encoder.")}
        assert encoder <= reached, name
        assert reached == (encoder if name == "kl" else set(parameters)), name
    assert all(not p.requires_grad for p in loss.parameters())


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
