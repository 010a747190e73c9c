import math

import numpy as np
import pytest
import torch

from codec import fitting, tables
from codec.quantiser import from_steps
from train.loss_config import RateConfig
from train.rate import RateModel, draw_quality, price

QUALITIES = (0, 25, 50, 75, 100)


def random_model(channels: int = 3, components: int = 4) -> RateModel:
    """A model whose parameters all differ."""
    torch.manual_seed(0)
    model = RateModel(channels, components)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def reference_bits(model: RateModel, y: np.ndarray, quality: float) -> np.ndarray:
    """-log2 of the plain difference of the cumulative functions in float64; y is (D, n)."""
    state = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    weights = np.exp(state["logits"]) / np.exp(state["logits"]).sum(axis=1, keepdims=True)
    least = np.exp(state["log_step"])[:, None] * 2 ** (-100 / 16) / 32
    means, scales = np.exp(state["log_unit"])[:, None] * state["offsets"], np.exp(state["log_scales"]) + least
    step = np.exp(state["log_step"])[:, None, None] * 2 ** (-quality / 16)

    def below(at: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-at))

    low, high = ((y[..., None] + side * step / 2 - means[:, None]) / scales[:, None] for side in (-1, 1))  # (D, n, K)
    mass = np.where(low + high > 0, below(-low) - below(-high), below(high) - below(low))  # the smaller tail
    return -np.log2((weights[:, None] * mass).sum(axis=2))


def estimated(model: RateModel, z: torch.Tensor, mean: np.ndarray, quality: int) -> np.ndarray:
    """Bits per latent of each channel, (D,), of values rounded as the codec rounds; z is (1, D, h, w)."""
    q = torch.tensor([float(quality)])
    rounded = model.quantised(z, q, torch.from_numpy(mean))
    return model.bits_per_channel(rounded, q)[0].detach().numpy() / z[0, 0].numel()


def test_steps_are_those_of_the_codec() -> None:
    model = random_model()
    steps = model.steps(torch.tensor([0.0, 37.0, 100.0]))
    assert steps.shape == (3, 3, 1, 1)
    expected = [[float(s) * tables.step_scale(q) for s in model.step] for q in (0, 37, 100)]
    np.testing.assert_allclose(steps.detach().numpy()[:, :, 0, 0], expected, rtol=1e-6)


def test_the_noise_is_one_step_wide_and_rounding_is_the_codecs() -> None:
    model = random_model()
    rng = np.random.default_rng(0)
    z = rng.normal(0.3, 2.0, (3, 20, 20)).astype(np.float32)
    uniform = torch.rand(2, 3, 20, 20) - 0.5
    q = torch.tensor([10.0, 90.0])
    y = model.noisy(torch.zeros(2, 3, 20, 20), q, uniform)
    assert torch.equal(y, uniform * model.steps(q))
    assert not torch.equal(y[0], y[1])

    mean = np.array([0.1, -0.2, 0.3], np.float32)
    for quality in QUALITIES:
        step = model.step.numpy()
        indices = tables.to_indices(z, mean, step, quality)
        rounded = model.quantised(torch.from_numpy(z)[None], torch.tensor([float(quality)]), torch.from_numpy(mean))
        np.testing.assert_allclose(rounded[0].numpy(), from_steps(indices, mean, step, quality), atol=1e-5)
    # Without a mean, index 0 lies at that of the density.
    far = torch.full((1, 3, 1, 1), 1e-3) + model.mean[None, :, None, None]
    assert torch.allclose(model.quantised(far, torch.zeros(1)).flatten(), model.mean)


@pytest.mark.parametrize("components", [1, 4])
def test_bits_are_those_of_the_cumulative_function(components: int) -> None:
    model = random_model(components=components)
    y = np.random.default_rng(0).normal(0.0, 4.0, (3, 400))
    for quality in (0.0, 33.3, 100.0):
        expected = reference_bits(model, y, quality)
        # Beyond what an escape costs, one bit per doubling, with the same slope at the limit.
        expected = np.where(expected > 22, 22 + np.log2(1 + (expected - 22).clip(0) * np.log(2)), expected)
        assert expected.max() > 24
        got = model._bits(torch.tensor(y, dtype=torch.float32)[None, :, None], model.steps(torch.tensor([quality])))
        np.testing.assert_allclose(got.detach().numpy()[0, :, 0], expected, rtol=2e-4, atol=2e-5)


def test_one_density_is_a_code_at_every_quality() -> None:
    model = random_model()
    for quality in (0.0, 16.0, 60.0):
        q = torch.tensor([quality])
        indices = torch.arange(-4000, 4001.0).repeat(1, 3, 1)[:, :, None]
        p = torch.exp2(-model._bits(indices * model.steps(q), model.steps(q)).double())
        assert p.sum(dim=3).flatten().tolist() == pytest.approx([1.0] * 3, abs=1e-3)  # the escapes add up to little


def test_bits_are_summed_per_image_and_channel() -> None:
    model = random_model()
    y, q = torch.randn(2, 3, 4, 5), torch.tensor([0.0, 80.0])
    per_channel = model.bits_per_channel(y, q)
    assert per_channel.shape == (2, 3)
    assert torch.allclose(model.bits(y, q), per_channel.sum(dim=1))
    alone = [model.bits(y[i : i + 1], q[i : i + 1]).item() for i in range(2)]
    assert model.bits(y, q).tolist() == pytest.approx(alone)
    assert alone[1] > 2 * alone[0]  # finer steps cost more
    assert torch.equal(model.bits(y, q), model.bits(y, q))


def test_bits_do_not_change_under_autocast() -> None:
    model = random_model()
    y, q = torch.randn(2, 3, 4, 4), torch.tensor([0.0, 80.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = model.bits(y, q)
        half = model.noisy(y.bfloat16(), q, torch.full((2, 3, 4, 4), 0.25))
    assert under.dtype == half.dtype == torch.float32
    assert torch.equal(under, model.bits(y, q))
    assert torch.equal(half, y.bfloat16().float() + 0.25 * model.steps(q))


@pytest.mark.parametrize("far", [30.0, 1e3, 1e4, -1e4])
@pytest.mark.parametrize("quality", [0.0, 100.0])
def test_far_tails_are_finite_and_pull_back(far: float, quality: float) -> None:
    model = random_model()
    with torch.no_grad():
        model.log_scales.fill_(-3.0)
        model.log_step.fill_(-2.0)
    y = torch.full((1, 3, 1, 1), far, requires_grad=True)
    bits = model.bits_per_channel(y, torch.tensor([quality]))[0]
    assert (bits > 22).all()
    assert (bits < 22 + 32).all()  # an escape costs at most that
    bits.sum().backward()
    assert y.grad is not None
    pull = y.grad.flatten() * math.copysign(1.0, far)
    assert (pull > 0.1 / abs(far)).all()  # moving in saves bits
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() < 40, name  # one outlier does not own the step
    assert (model.offsets.grad.sum(dim=1) * math.copysign(1.0, far) < 0).all()
    assert (model.log_scales.grad.sum(dim=1) < 0).all()  # a wider density saves bits


def test_a_collapsed_channel_or_a_giant_step_stays_finite() -> None:
    model = RateModel(2, 3)
    with torch.no_grad():
        model.log_scales[0].fill_(-200.0)  # a channel that carries nothing
        model.log_step[1].fill_(12.0)  # a step of 160,000 deviations
    z = torch.tensor([0.0, 1e-6, -0.5, 2.0]).repeat(2, 1)[None, :, None].requires_grad_(True)
    for quality in (0.0, 100.0):
        bits = model.bits_per_channel(z, torch.tensor([quality]))
        bits.sum().backward()
        assert torch.isfinite(bits).all()
        assert bits[0, 1].item() == pytest.approx(0.0, abs=1e-3)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert z.grad is not None
        assert torch.isfinite(z.grad).all()


def test_gradients_reach_every_parameter_and_the_latents() -> None:
    model = random_model()
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    q = torch.tensor([5.0, 60.0])
    y = model.noisy(z, q, torch.rand(2, 3, 4, 4) - 0.5)
    (of_noise,) = torch.autograd.grad((y - z).square().sum(), model.log_step, retain_graph=True)
    assert (of_noise > 0).all()  # distortion wants finer steps ...
    model.bits(y, q).sum().backward()
    assert model.log_step.grad is not None
    assert (model.log_step.grad < 0).all()  # ... and rate coarser ones
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs() > 1e-6).all(), name
    assert z.grad is not None
    assert (z.grad != 0).all()


def test_a_fitted_density_costs_what_the_codecs_static_tables_cost() -> None:
    """Peaked, bell-shaped, shifted, large, small, two-humped: one density against a table per quality."""
    rng, n = np.random.default_rng(0), 20_000
    humps = np.where(rng.random(n) < 0.4, rng.normal(-1.0, 0.4, n), rng.normal(1.0, 0.5, n))
    samples = (
        rng.laplace(0.0, 0.7, n),
        rng.normal(0.0, 1.0, n),
        rng.normal(-30.0, 12.0, n),
        rng.laplace(0.1, 0.02, n),
        humps,
    )
    z = np.stack(samples).astype(np.float32)
    mean = z.mean(axis=1)
    images = torch.from_numpy(z).reshape(1, len(z), 100, 200)
    model = RateModel(len(z), 4)
    model.initialize(images, f=2, bpp=len(z) * 0.3 / 4)
    density = [parameter for name, parameter in model.named_parameters() if name != "log_step"]
    optimizer = torch.optim.Adam(density, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    parts = images.reshape(len(z), 100, 200).transpose(0, 1)[:, :, None]  # (100, D, 1, 200)
    for _ in range(400):
        x = parts[torch.randint(0, 100, (8,), generator=generator)]
        q = draw_quality(torch.rand(8, generator=generator))
        y = model.noisy(x, q, torch.rand(x.shape, generator=generator) - 0.5)
        optimizer.zero_grad()
        (model.bits(y, q).mean() / x[0, 0].numel()).backward()
        optimizer.step()
    rates = []
    for quality in QUALITIES:
        got = estimated(model, images, mean, quality)
        for channel in range(len(z)):
            one = slice(channel, channel + 1)
            fitted, _ = fitting.static_tables(z[one], mean[one], model.step.numpy()[one])
            indices = tables.to_indices(z[one], mean[one], model.step.numpy()[one], quality)
            ideal = fitted.bits(indices[:, None], quality).sum() / n
            rates.append(ideal)
            # Measured: at most 0.3 % from q = 25 on, 0.003 bits per latent at q = 0, where channels cost 0 to 0.4 bits.
            assert got[channel] == pytest.approx(ideal, rel=0.01, abs=0.005), (quality, channel)
    assert min(rates) < 0.35
    assert max(rates) > 6


def test_initialize_takes_size_and_place_from_data_and_the_coarsest_rate_from_the_codec() -> None:
    generator = torch.Generator().manual_seed(0)
    place = torch.tensor([0.0, 5.0, -40.0, 0.3])[:, None, None]
    size = torch.tensor([1.0, 0.2, 9.0, 0.0])[:, None, None]
    z = place + size * torch.randn(4, 4, 32, 32, generator=generator)
    model = RateModel(4, 4)
    model.initialize(z, f=8)
    assert model.mean.tolist() == pytest.approx(z.mean(dim=(0, 2, 3)).tolist(), rel=1e-2, abs=0.02)
    flat, mean = z.transpose(0, 1).reshape(4, -1).numpy(), z.mean(dim=(0, 2, 3)).numpy()
    entropy = tables.entropy_bits(flat[:3], mean[:3], model.step.numpy()[:3], 0)
    assert entropy / 64 == pytest.approx(0.08, rel=0.01)
    ratio = (model.step / z.std(dim=(0, 2, 3)))[:3].tolist()
    assert ratio == pytest.approx([ratio[0]] * 3, rel=1e-3)
    assert torch.isfinite(model.bits(z, torch.zeros(4))).all()  # the constant channel too

    again = RateModel(4, 4)
    with torch.no_grad():
        again.logits.normal_()  # what was there before does not matter
    again.initialize(z, f=8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    with pytest.raises(ValueError, match="not finite"):
        model.initialize(z * math.nan, f=8)


def test_initialize_keeps_the_steps_proportions() -> None:
    z = torch.tensor([1.0, 0.2, 3.0])[:, None, None] * torch.randn(4, 3, 32, 32)
    model = RateModel(3, 4)
    wanted = torch.tensor([1.0, 4.0, 0.5])
    model.initialize(z, f=8, proportions=wanted)
    torch.testing.assert_close(model.step / model.step[0], wanted)
    flat, mean = z.transpose(0, 1).reshape(3, -1).numpy(), z.mean(dim=(0, 2, 3)).numpy()
    assert tables.entropy_bits(flat, mean, model.step.numpy(), 0) / 64 == pytest.approx(0.08, rel=0.01)


def test_rounded_is_what_the_codec_decodes_and_passes_gradients() -> None:
    model = random_model()
    z = torch.randn(2, 3, 5, 5, requires_grad=True)
    q = torch.tensor([10.0, 60.0])
    rounded = model.rounded(z, q)
    torch.testing.assert_close(rounded, model.quantised(z, q))
    weights = torch.randn(rounded.shape)
    (rounded * weights).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, weights)
    # Of the steps: their error's share, (y - z) / d * d, by the logarithm; nothing of the density.
    expected = ((rounded - z) * weights).sum(dim=(0, 2, 3))
    assert model.log_step.grad is not None
    torch.testing.assert_close(model.log_step.grad, expected.detach())
    assert model.offsets.grad is None


@pytest.mark.parametrize("start", [0.02, 10.0])
def test_steps_settle_where_the_price_puts_them(start: float) -> None:
    """From steps far too fine or far too coarse to the same ones; twice the price, coarser steps."""
    found = []
    for weight in (0.1, 0.2):
        generator = torch.Generator().manual_seed(0)
        model = RateModel(1, 2)
        with torch.no_grad():
            model.log_step.fill_(math.log(start))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2, betas=(0.9, 0.99))
        config = RateConfig(weight=weight)
        for _ in range(400):
            z, u = torch.randn(16, 1, 8, 8, generator=generator), torch.rand(16, 1, 8, 8, generator=generator) - 0.5
            q = draw_quality(torch.rand(16, generator=generator))
            y = model.noisy(z, q, u)
            loss = (y - z).abs().mean() + (price(q, config) * model.bits(y, q) / 64).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(float(model.step))
    # The mean of |uniform| * d is d / 4; at fine steps bits fall by log2(e) / d: d = 4 * weight * log2(e).
    assert found == pytest.approx([4 * weight * math.log2(math.e) for weight in (0.1, 0.2)], rel=0.1)


def test_price_and_drawn_qualities() -> None:
    q = torch.tensor([0.0, 16.0, 100.0])
    assert price(q, RateConfig(weight=0.3)).tolist() == pytest.approx([0.3, 0.15, 0.3 * 2**-6.25])
    assert price(q, RateConfig(weight=0.3, exponent=2.0)).tolist() == pytest.approx([0.3, 0.075, 0.3 * 2**-12.5])
    assert draw_quality(torch.tensor([0.0, 0.25, 1 - 2**-24])).tolist() == pytest.approx([0.0, 25.0, 100.0], abs=1e-4)
    assert draw_quality(torch.tensor([1 - 2**-24])).max() <= 100
