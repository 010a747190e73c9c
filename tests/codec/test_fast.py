"""`codec.fast`: what diffusers computes, faster; the network stays what it was. Speeds are not tested."""

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny, VQModel
from torch.nn import functional

from codec import fast, kernels, striped
from codec.filtering import F23, F43, Convolution, DoublingConvolution
from codec.kernels import Buffers, as_image, as_rows
from codec.latent_model import decoder_id
from codec.pixels import to_float
from tests.conftest import photo


@pytest.fixture(autouse=True)
def _many_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the small images here into stripes too, and filter their few channels."""
    monkeypatch.setattr(kernels, "STRIPE_BYTES", 20_000)
    monkeypatch.setattr(striped, "FILTERED_CHANNELS", 1)
    monkeypatch.setattr(striped, "LEAST_VALUES", {torch.float32: 0, torch.bfloat16: 0})


def kl(channels: tuple[int, ...] = (8, 16, 16), seed: int = 0, **config: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    network = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **{"norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4} | config,
    )
    return stirred(network)


def tiny(**config: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    channels = (16, 16, 16)
    return stirred(
        AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            **{"num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (2, 1, 1)} | config,
        )
    )


def vq(**config: Any) -> VQModel:
    torch.manual_seed(0)
    down = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    up = ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    config = {"down_block_types": down, "up_block_types": up, "block_out_channels": (8, 16)} | config
    return stirred(VQModel(norm_num_groups=4, latent_channels=4, num_vq_embeddings=32, **config))


def stirred(network: Any) -> Any:
    """Give norms and biases values that matter; diffusers starts them at one and zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def image(height: int = 56, width: int = 40, n: int = 1) -> torch.Tensor:
    return torch.stack([to_float(photo(height, width, seed=seed)) for seed in range(n)])


def both_ways(network: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's output, and the decoder's for latents that do not depend on the first."""
    z = torch.randn(x.shape[0], 4, 14, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        code = network.encode(x)
        if hasattr(code, "latent_dist"):
            return code.latent_dist.parameters, network.decode(z).sample
        if isinstance(network, VQModel):
            return code.latents, network.decode(z, force_not_quantize=True).sample
        return code.latents, network.decode(z).sample


def error(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the plain output."""
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype
    return float((ours - plain).abs().max() / plain.std())


NETWORKS: dict[str, Any] = {
    "attention, odd count of resnets": lambda: kl(layers_per_block=1),
    "no attention, even count": lambda: kl(layers_per_block=2, mid_block_add_attention=False),
    "shortcuts, 8 groups": lambda: kl((8, 24, 40), norm_num_groups=8),
    "no quant convolutions": lambda: kl(use_quant_conv=False, use_post_quant_conv=False),
    "one level": lambda: kl((16,), layers_per_block=3),
    "ReLU": lambda: kl(act_fn="relu"),  # not known to the striped
    "VQModel with attention in its blocks": vq,
    "VQModel with spatial norms": lambda: vq(norm_type="spatial", block_out_channels=(32, 32)),
    "AutoencoderTiny": tiny,
    "AutoencoderTiny, bilinear": lambda: tiny(upsample_fn="bilinear"),
    "AutoencoderTiny, GELU": lambda: tiny(act_fn="gelu"),
}
NOT_STRIPED = {"ReLU", "VQModel with spatial norms", "AutoencoderTiny, bilinear", "AutoencoderTiny, GELU"}


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_equals_diffusers(name: str) -> None:
    network = NETWORKS[name]()
    assert striped.stripable(network.decoder) == (name not in NOT_STRIPED)
    x = image(n=2)
    plain = both_ways(network, x)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert fast.accelerate(network, torch.float32) is network
    for ours, expected in zip(both_ways(network, x), plain, strict=True):
        assert 0 <= error(ours, expected) < 5e-5
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["shortcuts, 8 groups", "AutoencoderTiny"])
@pytest.mark.parametrize("way", ["plain weights", "small images"])
def test_the_other_ways_equal_diffusers_too(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "plain weights":  # of a torch without the operations for packed ones
        monkeypatch.setattr(kernels, "_HAS_PACKED", False)
    else:
        monkeypatch.setattr(striped, "LEAST_VALUES", {torch.float32: 10**9, torch.bfloat16: 10**9})
    network, x = NETWORKS[name](), image(n=2)
    plain = both_ways(network, x)
    for ours, expected in zip(both_ways(fast.accelerate(network, torch.float32), x), plain, strict=True):
        assert error(ours, expected) < (5e-5 if way == "plain weights" else 5e-4)  # torch's own norm, channels last
        assert ours.is_contiguous()
    for ours, expected in zip(both_ways(fast.accelerate(network, torch.bfloat16), x), plain, strict=True):
        assert 1e-4 < error(ours, expected) < 0.2


def test_compiles_what_is_not_in_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    x = image()
    both_ways(fast.accelerate(kl(), torch.bfloat16, compile=True), x)
    assert compiled == []
    both_ways(fast.accelerate(kl(act_fn="relu"), torch.bfloat16, compile=True), x)
    assert [(type(module).__name__, module.conv_in.weight.dtype) for module in compiled] == [
        ("Encoder", torch.bfloat16),
        ("Decoder", torch.bfloat16),
    ]


@pytest.mark.parametrize("make", [kl, tiny])
def test_bfloat16_is_near_and_the_dtype_outside_stays(make: Any) -> None:
    network, x = make(), image()
    plain = both_ways(network, x)
    name = decoder_id(network)
    fast.accelerate(network, torch.bfloat16)
    assert fast.compute_dtype(network) is torch.bfloat16
    assert network.dtype is torch.float32
    assert decoder_id(network) == name
    for ours, expected in zip(both_ways(network, x), plain, strict=True):
        mse = float((ours - expected).pow(2).mean() / expected.var())
        assert 30 < -10 * math.log10(mse) < 80  # not float32 either


@pytest.mark.parametrize("size", [(41, 23), (4, 4), (9, 64), (16, 130)])
def test_any_size_that_diffusers_takes(size: tuple[int, int]) -> None:
    for make in (kl, tiny):
        network, x = make(), image(*size, n=2)
        with torch.no_grad():
            plain = network(x).sample
            assert error(fast.accelerate(network, torch.float32)(x).sample, plain) < 5e-5


def test_parameters_of_another_dtype() -> None:
    network = fast.accelerate(kl().bfloat16(), torch.float32)
    z = torch.randn(1, 4, 14, 10)
    with torch.no_grad():
        x_hat = network.decoder(z.to(memory_format=torch.channels_last))
        again = network.decoder(z)
        plain = fast.restore(network).float().decoder(z)  # the rounded weights, computed in float32
    assert x_hat.dtype is torch.bfloat16
    assert torch.equal(x_hat, again)
    torch.testing.assert_close(x_hat.float(), plain, rtol=2**-7, atol=1e-4)  # rounded once, at the end


def test_again_restored_copied_pickled() -> None:
    network, x = kl(), image()
    plain = both_ways(network, x)
    names = [name for name, _ in network.named_modules()]
    once = both_ways(fast.accelerate(network, torch.float32), x)
    twice = both_ways(fast.accelerate(fast.accelerate(network, torch.bfloat16), torch.float32), x)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    twin = copy.deepcopy(network)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        twin.decoder.conv_out.weight.zero_()  # must not reach the original
    for other in (network, loaded):
        assert all(torch.equal(a, b) for a, b in zip(both_ways(other, x), once, strict=True))
    assert both_ways(twin, x)[1].std(dim=(2, 3)).max() < 1e-6  # only the biases are left
    assert [name for name, _ in network.named_modules()] == names
    fast.restore(network)
    assert fast.compute_dtype(network) is None
    assert type(network.decoder).__name__ == "Decoder"
    assert all(torch.equal(a, b) for a, b in zip(both_ways(network, x), plain, strict=True))


def test_new_weights_count_at_once() -> None:
    network, other, x = kl(seed=0), kl(seed=1), image()
    expected = both_ways(other, x)
    fast.accelerate(network, torch.float32)
    both_ways(network, x)
    network.load_state_dict(other.state_dict())
    assert max(error(a, b) for a, b in zip(both_ways(network, x), expected, strict=True)) < 5e-5


def test_parts_stay_diffusers_own() -> None:
    network = fast.accelerate(kl())
    block: Any = network.decoder.up_blocks[1].resnets[0]
    h = torch.randn(1, 16, 6, 6)
    expected = block.conv2(functional.silu(block.norm2(block.conv1(functional.silu(block.norm1(h)))))) + h
    assert torch.equal(block(h, None), expected)


def test_tiling_and_slicing_of_diffusers() -> None:
    network, x = kl(), image(64, 64, n=2)
    network.enable_slicing()
    network.enable_tiling()
    network.tile_sample_min_size, network.tile_latent_min_size = 32, 8
    with torch.no_grad():
        plain = network(x).sample
        assert error(fast.accelerate(network, torch.float32)(x).sample, plain) < 5e-5


def test_several_threads_at_once() -> None:
    network = fast.accelerate(kl(), torch.float32)
    xs = [image(48 + 8 * n, 40) for n in range(4)]

    def encode(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network.encode(x).latent_dist.mean

    expected = [encode(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:  # each takes buffers of its own
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(encode, xs), expected, strict=True))


@pytest.mark.parametrize("name", ["no attention, even count", "ReLU", "AutoencoderTiny"])
def test_autocast_changes_nothing(name: str) -> None:
    network, z = fast.accelerate(NETWORKS[name](), torch.float32), torch.randn(1, 4, 14, 10)
    with torch.no_grad():
        expected = network.decoder(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network.decoder(z), expected)


def test_outputs_can_be_trained_on_and_changed() -> None:
    network = fast.accelerate(kl(), torch.float32)
    z = network.encode(image()).latent_dist.mean  # autograd is on
    assert not z.is_inference()
    weight = torch.ones(4, 1, 1, requires_grad=True)
    (z * weight).sum().backward()
    assert weight.grad is not None
    z.add_(1)


def test_gradients_and_training_take_the_plain_way() -> None:
    network, x = kl(), image()
    plain = network.encode(x).latent_dist.mean
    fast.accelerate(network, torch.bfloat16)
    assert not torch.equal(network.encode(x).latent_dist.mean, plain)
    x.requires_grad_(True)
    z = network.encode(x).latent_dist.mean
    assert torch.equal(z, plain)
    z.sum().backward()
    assert x.grad is not None
    network.train()
    assert torch.equal(network.encode(x).latent_dist.mean, plain)


@pytest.mark.parametrize(
    ("make", "dtype", "message"),
    [
        (lambda: kl().train(), None, "AutoencoderKL is in training mode"),
        (kl, torch.float16, "dtype torch.float16 on cpu, expected float32 or bfloat16"),
        (kl, torch.float64, "dtype torch.float64 on cpu"),
        (lambda: torch.nn.Linear(1, 1), None, "Linear.encoder is NoneType, expected one of Encoder, Decoder"),
    ],
)
def test_refused(make: Any, dtype: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fast.accelerate(make(), dtype)


def test_another_family_is_refused_and_left_alone() -> None:
    network = AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4).eval()
    kind = type(network.encoder)
    with pytest.raises(ValueError, match=r"AutoencoderKLTemporalDecoder\.decoder is TemporalDecoder, expected"):
        fast.accelerate(network)
    assert type(network.encoder) is kind


def test_best_dtype() -> None:
    assert fast.best_dtype("meta") is torch.float32
    assert fast.compute_dtype(fast.accelerate(kl())) is fast.best_dtype("cpu")


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (16, 9), (33, 17)])
@pytest.mark.parametrize("filtering", [None, F23, F43])
def test_filtered_convolutions_are_convolutions(filtering: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 12, 3, padding=1).requires_grad_(False)
    x, before = torch.randn(*size, 8), torch.randn(*size, 12)
    expected = as_rows(layer(as_image(x)))
    convolution, dest = Convolution(layer, torch.float32, filtering), before.clone()
    convolution(Buffers(), x, dest)
    torch.testing.assert_close(dest, expected, atol=1e-5, rtol=0)
    dest.copy_(before)
    convolution(Buffers(), x, dest, add=True, relu=True)
    torch.testing.assert_close(dest, (before + expected).relu(), atol=1e-5, rtol=0)
    enlarged = as_rows(layer(functional.interpolate(as_image(x), scale_factor=2.0)))
    dest = torch.full_like(enlarged, math.nan)
    DoublingConvolution(layer, torch.float32)(Buffers(), x, dest)
    torch.testing.assert_close(dest, enlarged, atol=1e-5, rtol=0)


def test_moments_survive_a_large_mean() -> None:
    x = torch.randn(40, 30, 8) + 1000
    norm = torch.nn.GroupNorm(4, 8).requires_grad_(False)
    scale, shift = kernels.moments(x).affine(norm)
    exact = as_rows(norm.double()(as_image(x.double())))
    assert float((x.double() * scale + shift - exact).abs().max()) < 1e-3
    assert float((x.double() * scale + shift).var(unbiased=False)) == pytest.approx(1, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, compile: bool) -> None:
    network, x = kl().cuda(), image(n=2).cuda()
    z = torch.randn(2, 4, 14, 10, device="cuda")
    with torch.no_grad():
        plain = network.decode(z).sample, network.encode(x).latent_dist.mean
        fast.accelerate(network, dtype, compile=compile)
        ours = network.decode(z).sample, network.encode(x).latent_dist.mean
    for found, expected in zip(ours, plain, strict=True):
        assert found.device == expected.device
        assert error(found, expected) < (1e-2 if dtype is torch.float32 else 0.5)  # TF32 where torch allows it
    assert fast.best_dtype("cuda") in (torch.float32, torch.bfloat16)
