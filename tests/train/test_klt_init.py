"""Encoders that start as the Karhunen-Loeve transform, and decoders as the best linear guess of what it took."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from train.config import Config, ModelConfig, VQConfig
from train.klt_init import COLOURS, NOISE, RHO, synthesis, transform
from train.networks import build_network

SHAPE: dict[str, Any] = {
    "block_out_channels": (16, 48, 64),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
}


def markov(n: int = 16, side: int = 32) -> torch.Tensor:
    """Images of the model that the transform belongs to, (n, 3, side, side)."""
    at = torch.arange(side, dtype=torch.float64)
    line = torch.linalg.cholesky(RHO ** (at[:, None] - at).abs())
    colour = torch.linalg.cholesky(torch.tensor(COLOURS, dtype=torch.float64))
    noise = torch.randn(n, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.einsum("cd,yv,xw,ndvw->ncyx", colour, line, line, noise).float()


def coefficients(x: torch.Tensor, stages: list[torch.Tensor]) -> torch.Tensor:
    for stage in stages:
        x = F.conv2d(x, stage, stride=2)
    return x


def test_transform_loses_nothing_where_all_is_kept_and_leaves_no_correlation() -> None:
    stages, deviations = transform([12, 48])
    x = markov(400, 16)
    z = coefficients(x, stages)
    assert torch.allclose(z.square().sum(dim=1).mean(), x.square().sum(dim=1).mean(), rtol=1e-4)
    flat = z.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.std(dim=1), deviations, rtol=0.06)
    off = torch.corrcoef(flat) - torch.eye(48)
    assert off.abs().max() < 0.06
    assert torch.equal(deviations.sort(descending=True).values, deviations)


def test_guess_is_that_of_least_squares() -> None:
    """No other convolution of the doubled, noisy coefficients does better on images of the model."""
    stages, _ = transform([6])
    x = markov(64)
    z = coefficients(x, stages)
    z += NOISE * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    doubled = F.interpolate(z, scale_factor=2)
    (kernel,) = synthesis(stages)
    error = (F.conv2d(doubled, kernel) - x[:, :, 1:-1, 1:-1]).square().mean()
    columns = F.unfold(doubled, 3).transpose(1, 2).flatten(0, 1).double()
    wanted = x[:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2).flatten(0, 1).double()
    best = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution
    assert float(error) < 1.05 * float((columns @ best - wanted).square().mean())


@pytest.mark.parametrize(
    "change",
    [{}, {"use_quant_conv": True}, {"block_out_channels": (48, 48, 48)}, {"mid_block_add_attention": True}],
    ids=["small", "quant_conv", "equal_widths", "attention"],
)
@pytest.mark.parametrize("family", ["kl", "vq"])
def test_network_starts_as_the_transform_and_its_inverse(family: str, change: dict[str, Any]) -> None:
    config = ModelConfig(family=family, init="klt", **{**SHAPE, **change})  # type: ignore[arg-type]
    torch.manual_seed(0)
    network: Any = build_network(config, vq=VQConfig(codebook_dim=8)).eval()
    x = markov()
    stages, deviations = transform(config.klt_channels)
    expected = coefficients(x, stages)[:, :8] / (deviations[:8] if family == "kl" else deviations[:1])[:, None, None]
    with torch.no_grad():
        if family == "kl":
            z = network.encode(x).latent_dist.mean
            decoded = network.decode(z).sample
        else:
            z = network.encode(x).latents
            decoded = network.decode(z, force_not_quantize=True).sample
    assert (z - expected).square().mean() < 0.04 * expected.square().mean()
    assert (decoded - x).square().mean() < 0.2 * x.square().mean()


def test_every_parameter_learns_after_one_step() -> None:
    """No path is dead: what starts at zero has a gradient, and from the second step on all before it has one too."""
    torch.manual_seed(0)
    network: Any = build_network(ModelConfig(init="klt", **SHAPE))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        posterior = network.encode(markov(2)).latent_dist
        (network.decode(posterior.mean).sample.abs().mean() + posterior.logvar.mean()).backward()
        optimizer.step()
    without = [name for name, each in network.named_parameters() if each.grad is None or not each.grad.abs().sum() > 0]
    assert without == []


def test_groups_of_one_channel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.norm_num_groups = 16"):
        ModelConfig(init="klt", block_out_channels=(16, 16), norm_num_groups=16)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"family": "tiny", "block_out_channels": (16, 16)}, "model.init"),
        ({"latent_channels": 40}, "model.latent_channels"),
        ({"image_channels": 4}, "model.init"),
        ({"block_out_channels": (16,)}, "model.block_out_channels"),
        ({"block_out_channels": (4, 16, 32)}, "model.block_out_channels"),
        ({"block_out_channels": (64, 8, 64)}, "model.block_out_channels"),
    ],
)
def test_networks_that_cannot_hold_it_are_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Config(model=ModelConfig(init="klt", **{**SHAPE, **change}))
