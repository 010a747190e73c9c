from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.resnet import ResnetBlockCondNorm2D

from codec import tiled
from codec.errors import ModelError, NonFiniteError
from codec.latent_model import LatentModel, latent_model
from codec.pixels import to_float, to_uint8
from codec.rows import Moments
from tests.conftest import photo

SMALL = 200 * 2**20  # less than the buffers alone: everything is computed again instead of kept


def kl(channels: tuple[int, ...] = (8, 16, 16), layers: int = 1, **more: Any) -> LatentModel:
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        norm_num_groups=4,
        **more,
    )
    for parameter in network.parameters():
        if parameter.ndim == 1:  # norms and biases begin as ones and zeros, which hide mistakes
            torch.nn.init.normal_(parameter, mean=float(parameter.mean() > 0.5), std=0.3)
    return latent_model(network.eval().requires_grad_(False))


def tiny(width: int = 8, blocks: tuple[int, ...] = (1, 2, 1), **more: Any) -> LatentModel:
    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(width,) * len(blocks),
        decoder_block_out_channels=(width,) * len(blocks),
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        **more,
    )
    for parameter in network.parameters():
        parameter.mul_(1.5) if not parameter.requires_grad else parameter.data.mul_(1.5)  # else far pixels hardly count
    return latent_model(network.eval().requires_grad_(False))


MODELS = {
    "attention": lambda: kl(),
    "plain": lambda: kl(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False),
    "two layers": lambda: kl((4, 4, 12), layers=2, mid_block_add_attention=False),
    "gelu": lambda: kl((8, 8), act_fn="gelu"),
    "tiny": lambda: tiny(),
    "tiny, deep": lambda: tiny(4, (2, 1, 1, 2)),
}


def whole(model: LatentModel, image: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Raw latents and x_hat (3, h*f, w*f) as diffusers computes them."""
    f = model.f
    padded = np.pad(image, ((0, -image.shape[0] % f), (0, -image.shape[1] % f), (0, 0)), mode="edge")
    dtype = next(model.network.parameters()).dtype
    with torch.inference_mode():
        mean = model.encode(to_float(padded)[None].to(dtype)).mean
        return mean[0].numpy(), model.decode(mean.to(dtype))[0].float()


def close(image: np.ndarray, x_hat: torch.Tensor) -> bool:
    """Whether pixels are those of x_hat but for the rounding of values next to one half."""
    exact = (x_hat.permute(1, 2, 0).numpy()[: image.shape[0], : image.shape[1]] + 1.0) * 127.5
    return bool(np.abs(image - np.clip(exact, 0, 255)).max() < 0.51)


@pytest.mark.parametrize("stripe_rows", [1, 2, 3, 5, None])
@pytest.mark.parametrize("name", MODELS)
def test_tiled_is_untiled(name: str, stripe_rows: int | None) -> None:
    model, image = MODELS[name](), photo(46, 39)
    z, x_hat = whole(model, image)
    tiles = tiled.encode(model, image, stripe_rows=stripe_rows)
    assert (tiles.shape, tiles.dtype) == (z.shape, np.float32)
    assert np.abs(tiles - z).max() < 1e-5 * np.abs(z).max()
    decoded = tiled.decode(model, z, 46, 39, stripe_rows=stripe_rows)
    assert (decoded.shape, decoded.dtype) == ((46, 39, 3), np.uint8)
    assert close(decoded, x_hat)
    assert not close(decoded[::-1], x_hat)  # it is not that all pixels are alike


@pytest.mark.parametrize("stripe_rows", [1, 4, None])
@pytest.mark.parametrize("name", MODELS)
def test_a_small_budget_changes_the_memory_and_not_the_result(name: str, stripe_rows: int | None) -> None:
    model, image = MODELS[name](), photo(30, 41)
    z, x_hat = whole(model, image)
    tiles = tiled.encode(model, image, stripe_rows=stripe_rows, budget_bytes=SMALL)
    assert np.abs(tiles - z).max() < 1e-5 * np.abs(z).max()
    assert close(tiled.decode(model, z, 30, 41, stripe_rows=stripe_rows, budget_bytes=SMALL), x_hat)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (4, 4), (8, 9)])
@pytest.mark.parametrize("name", ["attention", "tiny"])
def test_smallest_images(name: str, size: tuple[int, int]) -> None:
    model, image = MODELS[name](), photo(*size)
    z, x_hat = whole(model, image)
    assert np.abs(tiled.encode(model, image, stripe_rows=2) - z).max() < 1e-5 * np.abs(z).max()
    assert close(tiled.decode(model, z, *size, stripe_rows=2), x_hat)


@pytest.mark.parametrize("name", ["attention", "tiny", "tiny, deep"])
@pytest.mark.parametrize("region", [(0, 0, 90, 70), (40, 33, 1, 1), (13, 20, 31, 17), (80, 60, 10, 10), (0, 69, 90, 1)])
def test_a_region_is_that_part_of_the_image(name: str, region: tuple[int, int, int, int]) -> None:
    model = MODELS[name]()
    z, _ = whole(model, photo(70, 90))
    left, top, width, height = region
    image = tiled.decode(model, z, 70, 90)
    part = tiled.decode(model, z, 70, 90, region=region)
    assert part.shape == (height, width, 3)
    assert np.abs(part.astype(int) - image[top : top + height, left : left + width]).max() <= 1


def test_a_region_of_a_tiny_model_needs_its_own_latents_only() -> None:
    model = MODELS["tiny"]()
    z, _ = whole(model, photo(300, 300))
    part = tiled.decode(model, z, 300, 300, region=(120, 140, 16, 8))
    z[:, :15] = z[:, 60:] = z[:, :, :10] = z[:, :, 55:] = np.nan
    assert np.array_equal(tiled.decode(model, z, 300, 300, region=(120, 140, 16, 8)), part)


@pytest.mark.parametrize("name", ["attention", "tiny"])
def test_bfloat16_is_as_close_to_float32_as_untiled_bfloat16(name: str) -> None:
    model, image = MODELS[name](), photo(64, 48)
    z, x_hat = whole(model, image)
    in_tiles = tiled.encode(model, image, dtype=torch.bfloat16, stripe_rows=6)
    decoded = tiled.decode(model, z, 64, 48, dtype=torch.bfloat16, stripe_rows=6)
    model.network.to(torch.bfloat16)
    converted = tiled.encode(model, image, stripe_rows=6)
    z_16, _ = whole(model, image)
    with torch.inference_mode():
        x_hat_16 = model.decode(torch.from_numpy(z)[None].bfloat16())[0].float()
    tolerance = 1.5 * np.abs(z_16 - z).max()
    assert 0 < np.abs(in_tiles - z).max() <= tolerance
    assert np.abs(converted - z).max() <= tolerance
    error = np.abs(decoded.astype(int) - to_uint8(x_hat)[:64, :48]).max()
    assert error <= np.abs(to_uint8(x_hat_16).astype(int) - to_uint8(x_hat)).max() + 1


@pytest.mark.parametrize("name", ["attention", "tiny"])
def test_an_image_that_is_not_finite_is_never_returned(name: str) -> None:
    model, image = MODELS[name](), photo(24, 24)
    z, _ = whole(model, image)
    bad = z.copy()
    bad[0, 3, 3] = np.inf if name == "attention" else np.nan  # tanh bounds inf
    with pytest.raises(NonFiniteError):
        tiled.decode(model, bad, 24, 24)
    model.decoder_out.bias.data[0] = np.inf
    with pytest.raises(NonFiniteError, match="float32"):
        tiled.decode(model, z, 24, 24)
    last = [layer for layer in model.network.encoder.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    last.bias.data[0] = np.inf
    with pytest.raises(NonFiniteError, match="float32"):
        tiled.encode(model, image)


def test_statistics_do_not_suffer_from_a_large_mean_or_many_pieces() -> None:
    x = 1000 + torch.randn(1, 6, 300, 400, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for top in range(0, 300, 7):
        moments.add(x[:, :, top : top + 7].contiguous(memory_format=torch.channels_last))
    mean, variance = moments.groups(3)
    expected = x.double().view(3, -1)
    torch.testing.assert_close(mean, expected.mean(1).repeat_interleave(2).float())
    expected_variance = expected.var(1, correction=0).repeat_interleave(2).float()
    torch.testing.assert_close(variance, expected_variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AutoencoderKL(down_block_types=("AttnDownEncoderBlock2D",), norm_num_groups=4), "AttnDownEncoder"),
        (lambda: AutoencoderKL(up_block_types=("AttnUpDecoderBlock2D",), norm_num_groups=4), "AttnUpDecoder"),
        (lambda: AutoencoderTiny(upsample_fn="bilinear"), "bilinear"),
    ],
)
def test_other_structures_are_refused_by_name(make: Any, named: str) -> None:
    model = latent_model(make())
    z = np.zeros((model.channels, 1, 1), np.float32)
    run = (lambda: tiled.encode(model, photo(8, 8))) if "Down" in named else lambda: tiled.decode(model, z, 1, 1)
    with pytest.raises(ModelError, match=named):
        run()


def test_a_resnet_of_another_kind_is_refused() -> None:
    model = kl()
    block = ResnetBlockCondNorm2D(in_channels=16, temb_channels=4, groups=4)
    model.network.decoder.mid_block.resnets[0] = block
    with pytest.raises(ModelError, match="ResnetBlockCondNorm2D"):
        tiled.decode(model, np.zeros((4, 2, 2), np.float32), 8, 8)


def test_wrong_input_is_refused() -> None:
    model = kl()
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), got float32"):
        tiled.encode(model, np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(4, 2, 2\), expected \(4, 3, 2\)"):
        tiled.decode(model, np.zeros((4, 2, 2), np.float32), 9, 8)
    for region in ((0, 0, 9, 8), (-1, 0, 4, 4), (0, 0, 0, 4)):
        with pytest.raises(ValueError, match="not inside an image of 8 x 8"):
            tiled.decode(model, np.zeros((4, 2, 2), np.float32), 8, 8, region=region)
