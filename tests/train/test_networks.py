import pytest
import torch
from diffusers import AutoencoderKL

from train.config import ModelConfig
from train.networks import build_network


def network(init: str, groups: int = 1) -> AutoencoderKL:
    torch.manual_seed(0)
    config = ModelConfig(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        use_quant_conv=False,
        init=init,
    )
    return build_network(config).eval()


def error_after(vae: AutoencoderKL, steps: int) -> float:
    """L1 of a mode reconstruction after some steps of Adam on flat, differently coloured pictures with some texture."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    errors = []
    for _ in range(steps):
        colours = torch.rand(8, 3, 1, 1, generator=generator) * 1.6 - 0.8
        x = colours + 0.1 * torch.randn(8, 3, 32, 32, generator=generator)
        loss = (vae.decode(vae.encode(x).latent_dist.mode()).sample - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    return sum(errors[-5:]) / 5


@pytest.mark.parametrize("groups", [1, 4])
def test_the_linear_start_learns_brightness_sooner(groups: int) -> None:
    assert error_after(network("linear", groups), 60) < 0.7 * error_after(network("diffusers", groups), 60)


def test_the_linear_start_is_nearly_linear() -> None:
    vae = network("linear")
    generator = torch.Generator().manual_seed(2)
    a, b = (0.3 * torch.randn(1, 3, 32, 32, generator=generator) for _ in range(2))
    with torch.no_grad():
        encode = [vae.encode(x).latent_dist.mode() for x in (a + b, a, b, torch.zeros_like(a))]
    error = encode[0] - (encode[1] + encode[2] - encode[3])
    assert float(error.norm() / (encode[0] - encode[3]).norm()) < 0.5


def test_one_channel_a_group_is_refused_where_it_would_lose_brightness() -> None:
    with pytest.raises(ValueError, match="one channel a group loses brightness"):
        ModelConfig(block_out_channels=(32, 64), norm_num_groups=32)
    assert ModelConfig(block_out_channels=(32, 64), norm_num_groups=32, init="diffusers").f == 2
