"""Known answers of what `codec-eval latents` measures, on latents and autoencoders made for the purpose."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from codec.latent_model import Posterior, latent_model
from codec.pixels import to_float
from codec.statistics import LatentStatistics
from eval import latent_fp16, latent_posterior, latent_probes, latent_spectrum
from eval.draws import generator
from eval.latent_grid import measure_colour, period_shares
from eval.latent_locality import cell_reaches
from eval.latent_posterior import PosteriorTally, Samples
from tests.conftest import photo


class Averaging:
    """An autoencoder that averages f x f pixels and repeats them; what it decodes may be spoilt."""

    family = "kl"
    network = torch.nn.Identity()
    receptive_field = None
    shift_factor = 0.0
    channels = 3

    def __init__(self, f: int = 4, scaling_factor: float = 1.0, spoil: Any = None) -> None:
        self.f, self.scaling_factor, self.spoil = f, scaling_factor, spoil

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(F.avg_pool2d(x, self.f), None)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        x_hat = z.repeat_interleave(self.f, dim=2).repeat_interleave(self.f, dim=3)
        return x_hat if self.spoil is None else self.spoil(x_hat)


def as_model(toy: Averaging) -> Any:
    return toy


# Posterior


def posterior(mean: np.ndarray, logvar: np.ndarray | None = None) -> Posterior:
    """A posterior of one image from (D, h, w)."""
    return Posterior(*(None if part is None else torch.from_numpy(part)[None] for part in (mean, logvar)))


def test_moments_and_kl_by_hand() -> None:
    mean = np.array([[[1.0, 3.0]], [[0.0, 0.0]]])  # (2, 1, 2)
    logvar = np.array([[[0.0, np.log(4.0)]], [[-30.0, 20.0]]])
    tally = PosteriorTally.empty(2)
    tally.update(posterior(mean, logvar))
    summary = tally.statistics.summary()
    assert summary.mean.tolist() == [2, 0]
    assert summary.std.tolist() == [1, 0]
    first = (0.5 * 1 + 0.5 * (9 + 4 - 1 - np.log(4))) / 2
    assert summary.kl_nats[0] == pytest.approx(first)
    assert tally.covariance.tolist() == [[1, 0], [0, 0]]
    assert tally.clamped.tolist() == [[0, 1], [0, 1]]
    assert tally.largest.tolist() == [3, 0]


def test_tallies_of_two_ranks_are_that_of_one() -> None:
    rng = np.random.default_rng(0)
    parts = [posterior(rng.normal(n, 1 + n, (3, 4, 5)), rng.normal(-2, 1, (3, 4, 5))) for n in range(5)]
    whole, *halves = (PosteriorTally.empty(3) for _ in range(3))
    for n, part in enumerate(parts):
        whole.update(part)
        halves[n % 2].update(part)
    halves[0].merge(halves[1])
    halves[0].merge(PosteriorTally.empty(3))  # a rank without images
    np.testing.assert_allclose(halves[0].covariance, whole.covariance, rtol=1e-12)
    one, other = whole.statistics.summary().to_json(), halves[0].statistics.summary().to_json()
    for key, value in one.items():
        np.testing.assert_allclose(other[key], value, rtol=1e-12)
    z = np.concatenate([part.mean[0].numpy().reshape(3, -1) for part in parts], axis=1)
    np.testing.assert_allclose(whole.covariance, np.cov(z, bias=True), rtol=1e-12)


@pytest.mark.parametrize(
    ("std", "noise", "verdict"),
    [
        ([0.05, 0.05], [1.0, 1.0], "collapsed"),
        ([0.05, 1.0], [1.0, 0.3], "partly collapsed"),
        ([1.0, 1.0], [0.3, 0.3], "healthy"),
        ([5.0, 5.0], [1e-3, 1e-3], "nearly deterministic"),
        ([0.05, 0.05], [1e-4, 1e-4], "nearly deterministic"),  # small in scale only
    ],
)
def test_verdicts(std: list[float], noise: list[float], verdict: str) -> None:
    n = 2000
    statistics = LatentStatistics(2)
    mean = np.random.default_rng(0).standard_normal((2, 1, n)) * np.array(std)[:, None, None]
    logvar = np.broadcast_to(2 * np.log(noise)[:, None, None], mean.shape).copy()
    statistics.update(posterior(mean, logvar))
    assert latent_posterior.judge(statistics.summary(), True).name == verdict
    assert latent_posterior.judge(statistics.summary(), False).name == "no posterior"


def test_mutual_information_of_a_gaussian_channel() -> None:
    """mean ~ N(0, I), z = mean + 0.5 n: I = D / 2 ln(1 + 4), and both bounds are close."""
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((2, 64, 64))
    part = posterior(mean, np.full(mean.shape, np.log(0.25)))
    samples = Samples.draw(part, 2048, generator(0, "a", "positions"))
    assert samples.z.shape == (2048, 2)
    assert (samples.z - samples.mean).std() == pytest.approx(0.5, rel=0.05)
    truth = np.log(5)
    assert latent_posterior.mutual_information_lower(samples) == pytest.approx(truth, abs=0.06)
    tally = PosteriorTally.empty(2)
    tally.update(part)
    summary = tally.statistics.summary()
    matched = latent_posterior.gaussian_distances(summary.mean, tally.covariance + 0.25 * np.eye(2))
    assert summary.kl_nats.sum() - matched["kl_nats"] == pytest.approx(truth, abs=0.03)


def test_the_lower_bound_saturates_and_survives_tiny_variances() -> None:
    mean = np.random.default_rng(0).standard_normal((4, 32, 32)) * 5
    samples = Samples.draw(posterior(mean, np.full(mean.shape, -25.0)), 1024, generator(0, "", ""))
    assert latent_posterior.mutual_information_lower(samples) == pytest.approx(np.log(1024), abs=1e-6)


def test_distances_of_gaussians_by_hand() -> None:
    found = latent_posterior.gaussian_distances(np.array([1.0, 0.0]), np.diag([4.0, 1.0]))
    assert found["kl_nats"] == pytest.approx(0.5 * (1 + 4 - 1 - np.log(4)))
    assert found["frechet"] == pytest.approx(1 + 1)
    assert latent_posterior.gaussian_distances(np.zeros(3), np.eye(3)) == {"kl_nats": 0, "frechet": 0}
    assert latent_posterior.gaussian_distances(np.zeros(2), np.diag([1.0, 0.0]))["kl_nats"] == np.inf


def test_correlation_and_effective_rank_of_a_made_latent() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 100, 100))
    z = np.stack([a, 3 * (0.8 * a + 0.6 * b), np.full_like(a, 2.0)])
    tally = PosteriorTally.empty(3)
    tally.update(posterior(z))
    matrix = latent_posterior.correlation(tally.covariance)
    assert matrix[0, 1] == pytest.approx(0.8, abs=0.02)
    assert matrix[0, 2] == 0
    assert latent_posterior.effective_rank(np.diag([1.0, 1.0, 1.0, 0.0])) == pytest.approx(3)
    assert latent_posterior.effective_rank(tally.covariance) < 2


# Spectrum


@pytest.mark.parametrize("a", [0.0, 1.0, 2.0, 3.0])
def test_the_slope_of_made_noise_is_found(a: float) -> None:
    rng, side = np.random.default_rng(0), 128
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    white = np.fft.fft2(rng.standard_normal((8, side, side)))
    planes = np.fft.ifft2(white * frequency ** (-a / 2)).real
    power = latent_spectrum.radial_power(planes[:, :96, :96])  # not periodic
    assert power.shape == (48,)
    assert latent_spectrum.slope(power) == pytest.approx(-a, abs=0.12)
    share = latent_spectrum.high_share(power)
    assert share is not None
    if a == 0:
        assert share == pytest.approx(0.75, abs=0.03)  # of a disc's area beyond half its radius
        assert power.mean() == pytest.approx(1, rel=0.05)
    assert share == pytest.approx([0.75, 0.5, 0.2, 0.05][int(a)], abs=0.06)  # of the integral of r^(1 - a) over it


def test_a_constant_has_no_spectrum() -> None:
    power = latent_spectrum.radial_power(np.zeros((2, 16, 16)))
    assert latent_spectrum.slope(power) is None
    assert latent_spectrum.high_share(power) is None


# Probes


def test_noise_costs_what_it_must() -> None:
    model = Averaging(1, scaling_factor=2.0)
    x = to_float(np.full((64, 64, 3), 128, np.uint8))[None]
    curve = latent_probes.noise_curve(as_model(model), x, x, (0.0, 0.2), generator(0, "a", "noise"))
    assert curve[0] == np.inf
    deviation = 0.2 / 2.0 * 127.5
    assert curve[1] == pytest.approx(20 * np.log10(255 / deviation), abs=0.1)


def test_an_equivariant_autoencoder_has_no_equivariance_error() -> None:
    x = to_float(photo(64, 64))[None]

    def measure(spoil: Any = None) -> dict[str, Any]:
        model = Averaging(4, spoil=spoil)
        z = model.encode(x).mean
        return latent_probes.equivariance(as_model(model), x, z, model.decode(z))

    found = measure()
    assert set(found) == {"half", "three_quarters", "quarter_turn", "half_turn", "three_quarter_turn"}
    for name in ("quarter_turn", "half_turn", "three_quarter_turn"):
        assert found[name]["drop_db"] == 0
        assert found[name]["latent_error"] == pytest.approx(0, abs=1e-6)
    for name in ("half", "three_quarters"):  # filters differ a little: measured 0.09 and 0.04
        assert found[name]["latent_error"] < 0.15
    top = torch.linspace(-0.5, 0.5, 64)[:, None]
    spoilt = measure(lambda x_hat: x_hat + F.interpolate(top[None, None], x_hat.shape[-2:]))  # knows where up is
    assert spoilt["half_turn"]["psnr_db"] < found["half_turn"]["psnr_db"] - 3
    assert measure(lambda x_hat: x_hat.flip(-1))["quarter_turn"]["psnr_db"] < found["quarter_turn"]["psnr_db"] - 3


def test_drift_sums_up_over_trips() -> None:
    model = Averaging(1, spoil=lambda x_hat: x_hat + torch.tensor([1.0, 0.0, -2.0])[:, None, None] / 127.5)
    x = to_float(np.full((16, 16, 3), 128, np.uint8))[None]
    found = latent_probes.drift(as_model(model), x, model.decode(x), 4)
    np.testing.assert_allclose(found["rgb_shift"], [[n, 0, -2 * n] for n in (1, 2, 3, 4)], atol=1e-4)
    mse = [5 * n**2 / 3 for n in (1, 2, 3, 4)]
    assert found["original_db"] == pytest.approx([10 * np.log10(255**2 / e) for e in mse])
    assert found["first_db"] == pytest.approx(found["original_db"][:3])


# Locality


def test_a_cell_of_a_bounded_decoder_reaches_no_further_than_its_receptive_field() -> None:
    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter *= 3 if parameter.ndim == 4 else 1  # so that the outermost change is not lost in rounding
        z = torch.randn(1, 4, 24, 24)
        reaches = cell_reaches(latent_model(network), z, 20, generator(0, "", "cells"))
    bound = 2 * (1 + 3) + 1 + 3 + 1  # cells: first convolution and block; pixels: convolution, block, convolution
    assert len(reaches) == 21
    assert max(reach.reach_px for reach in reaches) == bound
    for reach in reaches:
        assert reach.energy[bound + 1 :].max() == 0
        assert reach.share_within(bound) == pytest.approx(1)
    largest = (z - z.mean(dim=(2, 3), keepdim=True)).square().sum(1).argmax()
    assert [divmod(int(largest), 24)] == [(reach.row, reach.column) for reach in reaches if reach.largest]
    assert len({(reach.row, reach.column) for reach in reaches}) == 21


def test_shares_and_reach_by_hand() -> None:
    """Half of every cell's change also lands on the far corner's pixel."""

    def leak(x_hat: torch.Tensor) -> torch.Tensor:
        x_hat = x_hat.clone()
        x_hat[:, :, -1, -1] = x_hat.sum(dim=(2, 3)) / 16
        return x_hat

    model, z = Averaging(2, scaling_factor=4.0, spoil=leak), torch.zeros(1, 3, 8, 8)
    (cell,) = [reach for reach in cell_reaches(as_model(model), z, 1, generator(0, "", "")) if reach.largest]
    assert (cell.row, cell.column) == (0, 0)
    own, leaked = 3 * 4 / 16, 3 * (4 / 16 / 4) ** 2
    assert cell.energy[0] == pytest.approx(own)
    assert cell.share_within(13) == pytest.approx(own / (own + leaked))
    assert cell.share_within(14) == pytest.approx(1)
    assert (cell.reach_px, cell.visible_px) == (14, 14)
    still = Averaging(2, spoil=lambda x_hat: 0 * x_hat)
    (cell, _) = cell_reaches(as_model(still), z, 1, generator(0, "", ""))
    assert (cell.share_within(4), cell.reach_px) == (None, 0)


# Grid


def test_a_planted_grid_is_found() -> None:
    def plant(x_hat: torch.Tensor) -> torch.Tensor:
        n = torch.arange(x_hat.shape[-1])
        eight, four = (torch.cos(2 * torch.pi * n / period) for period in (8, 4))
        five = torch.cos(2 * torch.pi * n / 16)  # no divisor of f
        return x_hat + (3 * eight[None] + 2 * four[:, None] + five[None]) / 127.5

    size = 64 + 2 * 2 * 8
    found = measure_colour(as_model(Averaging(8, spoil=plant)), (128, 60, 200), size)
    total = 9 + 4 + 1
    assert found["energy"] == pytest.approx({"2": 0, "4": 4 / total, "8": 9 / total}, abs=1e-4)
    assert found["grid_rms"] == pytest.approx(np.sqrt(13 / 2), rel=1e-3)
    assert found["ripple_rms"] == pytest.approx(np.sqrt(total / 2), rel=1e-3)
    clean = measure_colour(as_model(Averaging(8)), (128, 60, 200), size)
    assert clean["grid_rms"] < 1e-3
    assert set(clean["energy"].values()) == {0.0}


def test_a_pattern_repeats_when_both_its_axes_do() -> None:
    n = np.arange(36)
    pattern = np.cos(np.pi * n)[:, None] * np.cos(2 * np.pi * n / 3)[None]
    assert period_shares(pattern[None], 6) == pytest.approx({2: 0, 3: 0, 6: 1})


def test_border_and_colour_errors_are_told_apart() -> None:
    def frame(x_hat: torch.Tensor) -> torch.Tensor:
        x_hat = x_hat + torch.tensor([2.0, 0.0, 0.0])[:, None, None] / 127.5
        x_hat[:, :, :4] += 10 / 127.5
        return x_hat

    found = measure_colour(as_model(Averaging(4, spoil=frame)), (100, 100, 100), 64)
    assert found["mean"] == pytest.approx([2, 0, 0], abs=1e-4)
    assert found["centre_rms"] == pytest.approx(np.sqrt(4 / 3), rel=1e-4)
    assert found["border_rms"] > 3
    assert found["grid_rms"] < 1e-3


# float16


def test_activations_are_recorded_by_block() -> None:
    network = torch.nn.Sequential()
    network.add_module("encoder", torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU()))
    torch.nn.init.constant_(network.encoder[0].weight, -70000.0)
    with latent_fp16.recording(network) as blocks:
        network(torch.ones(1, 1))
    network(torch.full((1, 1), 5.0))  # no longer listening
    assert blocks == {"encoder.0": 70000.0, "encoder.1": 0.0}
    assert latent_fp16.judge(blocks, 0.0)["verdict"] == "overflows"
    assert latent_fp16.judge({"a": 20000.0}, 0.0)["verdict"] == "at risk"
    assert latent_fp16.judge({"a": 10.0}, 70000.0)["verdict"] == "overflows"
    assert latent_fp16.judge({"a": 10.0}, 1.0)["verdict"] == "safe"
    assert latent_fp16.judge({"a": np.inf}, 1.0)["verdict"] == "overflows"
    assert latent_fp16.judge({}, 1.0)["verdict"] == "not measured"
    assert latent_fp16.block_of("decoder.up_blocks.1.resnets.0.conv1") == "decoder.up_blocks.1"
    assert latent_fp16.block_of("decoder.mid_block.resnets.0.conv1") == "decoder.mid_block"
