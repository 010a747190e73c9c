"""Metrics against known answers and against the packages called directly."""

import math

import numpy as np
import pytest
import torch

from eval.features import SqueezeFeatures
from eval.metrics import METRICS, Metrics, ms_ssim, psnr, ssim, ssimulacra2


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (12, 11, 3)).repeat(16, 0).repeat(16, 1)  # 192x176
    noise = rng.integers(-12, 13, smooth.shape)
    return smooth.astype(np.uint8), (smooth + noise).clip(0, 255).astype(np.uint8)


def test_psnr_known_answers() -> None:
    x = np.full((5, 7, 3), 100, np.uint8)
    assert psnr(x, x + 1) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(x, x - 10) == pytest.approx(28.1308, abs=1e-4)
    one_channel = x.copy()
    one_channel[..., 0] += 1
    assert psnr(x, one_channel) == pytest.approx(48.1308 + 10 * math.log10(3), abs=1e-4)
    assert psnr(np.zeros_like(x), np.full_like(x, 255)) == 0  # uint8 must not wrap around
    assert psnr(x, x) == math.inf


def test_identical_images(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, x_hat = pair
    assert ssim(x, x) == pytest.approx(1, abs=1e-6)
    assert ms_ssim(x, x) == pytest.approx(1, abs=1e-6)
    assert ssimulacra2(x, x) == pytest.approx(100, abs=1e-6)
    assert (ssimulacra2(x, x_hat) or 100) < 95


def test_msssim_equals_the_package(pair: tuple[np.ndarray, np.ndarray]) -> None:
    import pytorch_msssim

    x, x_hat = (torch.from_numpy(image).permute(2, 0, 1)[None].float() for image in pair)
    assert ms_ssim(*pair) == pytest.approx(float(pytorch_msssim.ms_ssim(x, x_hat, data_range=255)), abs=1e-7)
    assert ssim(*pair) == pytest.approx(float(pytorch_msssim.ssim(x, x_hat, data_range=255)), abs=1e-7)
    assert (ssim(*pair) or 1) < 0.999


def test_undefined_for_small_images() -> None:
    small = np.zeros((160, 200, 3), np.uint8)
    assert ms_ssim(small, small) is None
    assert ms_ssim(*[np.zeros((161, 161, 3), np.uint8)] * 2) == 1
    tiny = small[:7, :7]
    assert Metrics(SqueezeFeatures())(tiny, tiny) == dict.fromkeys((metric.key for metric in METRICS), None) | {
        "psnr": math.inf
    }


def test_all_metrics_and_features(pair: tuple[np.ndarray, np.ndarray]) -> None:
    values = Metrics(SqueezeFeatures())(*pair)
    assert list(values) == [metric.key for metric in METRICS]
    assert all(value is not None and math.isfinite(value) for value in values.values())
    assert Metrics(None)(*pair)["lpips_sqz10"] is None


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, ssimulacra2])
def test_mismatch_raises(metric) -> None:  # type: ignore[no-untyped-def]
    x = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\(32, 32, 3\) and \(32, 31, 3\)"):
        metric(x, x[:, :31])
    with pytest.raises(ValueError, match="float32"):
        metric(x, x.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(32, 32, 1\)"):
        metric(x[..., :1], x[..., :1])
