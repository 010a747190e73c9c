"""Metrics against known answers, and against implementations that share no code with them."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codec.errors import UsageError
from eval.features import FeaturesError, SqueezeFeatures
from eval.metrics import KNOWN, METRICS, Metrics, chosen, flip, ms_ssim, psnr, ssim, ssimulacra2
from tests.conftest import photo

WEIGHT_FREE = ["psnr", "ssim", "ms_ssim", "ssimulacra2", "flip"]


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (12, 11, 3)).repeat(16, 0).repeat(16, 1)  # 192x176
    noise = rng.integers(-12, 13, smooth.shape)
    return smooth.astype(np.uint8), (smooth + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of SqueezeNet 1.0 and AlexNet, without the classifiers, which no metric reads."""
    import torchvision

    folder = tmp_path_factory.mktemp("backbones")
    for name in ("squeezenet1_0", "alexnet"):
        torch.manual_seed(2)
        state = getattr(torchvision.models, name)(weights=None).state_dict()
        torch.save({key: value for key, value in state.items() if "features" in key}, folder / f"{name}-12345678.pth")
    return folder


def through_png(image: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return np.asarray(Image.open(data))


def test_psnr_known_answers() -> None:
    x = np.full((5, 7, 3), 100, np.uint8)
    assert psnr(x, x + 1) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(x, x - 10) == pytest.approx(28.1308, abs=1e-4)
    one_channel = x.copy()
    one_channel[..., 0] += 1
    assert psnr(x, one_channel) == pytest.approx(48.1308 + 10 * math.log10(3), abs=1e-4)
    assert psnr(np.zeros_like(x), np.full_like(x, 255)) == 0  # uint8 must not wrap around


def test_a_png_round_trip_is_perfect_for_every_metric_without_weights() -> None:
    x = photo(170, 190, seed=4)
    values = chosen(",".join(WEIGHT_FREE))(x, through_png(x))
    assert values == {
        "psnr": math.inf,
        "ssim": pytest.approx(1, abs=1e-6),
        "ms_ssim": pytest.approx(1, abs=1e-6),
        "ssimulacra2": pytest.approx(100, abs=1e-6),
        "flip": 0,
    }


def test_ssim_is_scikit_images_away_from_the_border(pair: tuple[np.ndarray, np.ndarray]) -> None:
    # scikit-image pads where pytorch-msssim takes the inside only: compare over the pixels that both have.
    # 1e-5: pytorch-msssim is float32, and the variance of a flat block is what two large numbers leave of each other.
    from skimage.metrics import structural_similarity

    images = [image.astype(np.float64) for image in pair]
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    _, values = structural_similarity(*images, channel_axis=2, full=True, **how)
    assert ssim(*pair) == pytest.approx(values[5:-5, 5:-5].mean(), abs=1e-5)
    assert (ssim(*pair) or 1) < 0.999


def test_ms_ssim_is_torchmetrics(pair: tuple[np.ndarray, np.ndarray]) -> None:
    # 2e-3: torchmetrics pads the image where pytorch-msssim takes the inside only, at each of five scales.
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as theirs

    x, x_hat = (torch.from_numpy(image).permute(2, 0, 1)[None].double() for image in pair)
    assert ms_ssim(*pair) == pytest.approx(float(theirs(x_hat, x, data_range=255.0, kernel_size=11)), abs=2e-3)
    assert (ms_ssim(*pair) or 1) < 0.999


def test_ssimulacra2_is_the_packages_own_in_every_digit(pair: tuple[np.ndarray, np.ndarray]) -> None:
    from ssimulacra2 import compute_ssimulacra2

    measure = chosen("ssimulacra2")
    for x, x_hat in (pair, (photo(97, 65), photo(97, 65) // 2), (pair[0], pair[1] // 2), pair):
        files = [io.BytesIO(), io.BytesIO()]
        for image, file in zip((x, x_hat), files, strict=True):
            Image.fromarray(image).save(file, "PPM")
        expected = compute_ssimulacra2(*files)
        assert expected < 95
        assert ssimulacra2(x, x_hat) == pytest.approx(expected, abs=1e-9)
        assert measure(x, x_hat)["ssimulacra2"] == pytest.approx(expected, abs=1e-9)  # its part of x is kept


def test_flip_of_flat_images_by_hand() -> None:
    """On flat images the filters and the edge detectors drop out: Andersson et al. 2020, sections 4.1 and 4.2."""

    def hunt_adjusted_lab(gray_or_color: tuple[float, float, float]) -> np.ndarray:
        s = np.array(gray_or_color)
        linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
        to_xyz = np.array(
            [
                [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
                [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
                [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
            ]
        )
        t = to_xyz @ linear / to_xyz.sum(1)
        f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
        lightness = 116 * f[1] - 16
        return np.array([lightness, 0.01 * lightness * 500 * (f[0] - f[1]), 0.01 * lightness * 200 * (f[1] - f[2])])

    def hyab(a: np.ndarray, b: np.ndarray) -> float:
        return float(abs(a[0] - b[0]) + np.hypot(*(a[1:] - b[1:])))

    def expected(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        green, blue = hunt_adjusted_lab((0, 1, 0)), hunt_adjusted_lab((0, 0, 1))
        largest = hyab(green, blue) ** 0.7
        error = hyab(*(hunt_adjusted_lab(tuple(v / 255 for v in c)) for c in (a, b))) ** 0.7  # type: ignore[arg-type]
        knee = 0.4 * largest
        return error * 0.95 / knee if error < knee else 0.95 + (error - knee) / (largest - knee) * 0.05

    for a, b in (((128, 128, 128), (140, 140, 140)), ((90, 160, 40), (100, 140, 60)), ((0, 0, 0), (255, 255, 255))):
        x, x_hat = (np.full((40, 48, 3), color, np.uint8) for color in (a, b))
        assert flip(x, x_hat) == pytest.approx(expected(a, b), abs=2e-4)
    assert flip(np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)) > 0.95


def test_each_metric_tells_a_small_error_from_a_large_one(backbones: Path) -> None:
    x = photo(176, 180, seed=1)
    noise = np.random.default_rng(0).normal(size=x.shape)
    near, far = ((x + scale * noise).clip(0, 255).astype(np.uint8) for scale in (2, 20))
    metrics = chosen(None, backbones)
    assert [metric.key for metric in metrics.list] == [*WEIGHT_FREE, "lpips_sqz10", "lpips_alex"]
    a, b = metrics(x, near), metrics(x, far)
    for key, metric in ((metric.key, metric) for metric in metrics.list):
        first, second = a[key], b[key]
        assert first is not None
        assert second is not None
        assert (first > second) is metric.higher_is_better, key


def test_undefined_for_small_images(backbones: Path) -> None:
    small = np.zeros((160, 200, 3), np.uint8)
    assert ms_ssim(small, small) is None
    assert ms_ssim(*[np.zeros((161, 161, 3), np.uint8)] * 2) == 1
    tiny = small[:7, :7]
    values = chosen(None, backbones)(tiny, tiny)
    assert values == dict.fromkeys(values, None) | {"psnr": math.inf, "flip": 0}
    for metric in chosen(None, backbones).list:  # each is defined from its least side on, and not before
        measure = chosen(metric.key, backbones)
        for side in {metric.least_side, max(1, metric.least_side - 1)}:
            x = photo(side, side + 3)
            assert (measure(x, x)[metric.key] is None) == (side < metric.least_side), metric.key


def test_the_values_do_not_depend_on_threads_nor_on_what_was_measured_before(
    pair: tuple[np.ndarray, np.ndarray], backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, x_hat = pair
    expected = chosen(None, backbones)(x, x_hat)
    assert all(value is not None and math.isfinite(value) for value in expected.values())
    metrics = chosen(None, backbones)
    metrics(x_hat, x)
    buffer = x.copy()
    metrics(buffer, x_hat)
    buffer[:] = x_hat  # the same array with other pixels is another image
    again = metrics(buffer, x_hat)
    assert (again["psnr"], again["lpips_sqz10"]) == (math.inf, 0)
    assert again["ssimulacra2"] == pytest.approx(100, abs=1e-6)
    monkeypatch.setattr("eval.metrics._n_threads", lambda: 3)
    before = torch.get_num_threads()
    assert chosen(None, backbones)(x, x_hat) == pytest.approx(expected, rel=1e-6)
    assert torch.get_num_threads() == before


def test_a_backbone_is_measured_where_it_is_found_and_named_where_it_is_not(backbones: Path) -> None:
    metrics = chosen(None, backbones)
    assert set(metrics.weights()) == {"lpips_sqz10", "lpips_alex"}
    assert metrics.weights()["lpips_alex"]["name"] == "alexnet"
    assert len(metrics.weights()["lpips_alex"]["sha256"]) == 64
    assert metrics.weights()["lpips_alex"] != metrics.weights()["lpips_sqz10"]
    assert set(metrics.absent) == {"lpips_vgg", "lpips_squeeze", "dists"}
    assert metrics.settings() == {metric.key: metric.settings for metric in metrics.list}
    assert chosen().weights() == {}
    assert [metric.key for metric in chosen().list] == WEIGHT_FREE
    with pytest.raises(FeaturesError, match=r"vgg16-\*\.pth.*not found.*fetch them once with python -c .*vgg16"):
        chosen("psnr,dists", backbones)
    with pytest.raises(FeaturesError, match="squeezenet1_0"):  # a place with nothing in it is a mistake
        chosen(None, backbones.parent / "nothing")


def test_a_file_is_never_taken_for_another_network(backbones: Path, tmp_path: Path) -> None:
    alex = backbones / "alexnet-12345678.pth"
    assert [metric.key for metric in chosen(None, alex).list] == [*WEIGHT_FREE, "lpips_alex"]
    other = tmp_path / "mine.pth"
    other.write_bytes(alex.read_bytes())
    assert list(chosen("lpips-alex", other)(photo(40, 40), photo(40, 40))) == ["lpips_alex"]
    with pytest.raises(
        FeaturesError, match=r"mine\.pth: .*weights of another network"
    ):  # without a name: squeezenet1_0's
        chosen(None, other)
    with pytest.raises(FeaturesError, match="taken for the weights of alexnet, not of squeezenet1_0"):
        chosen("lpips_sqz10,lpips_alex", alex)


def test_names_of_metrics() -> None:
    assert [metric.key for metric in chosen("MS-SSIM, psnr").list] == ["psnr", "ms_ssim"]
    with pytest.raises(UsageError, match=r"unknown metric 'ssimulacra': did you mean ssimulacra2\?"):
        chosen("psnr,ssimulacra")
    with pytest.raises(UsageError, match="no metric"):
        chosen(" ,")
    assert len(KNOWN) == len(METRICS)
    assert all(metric.settings for metric in METRICS)


def test_the_short_form_gives_every_key() -> None:
    x = photo(32, 32)
    assert list(Metrics(SqueezeFeatures())(x, x)) == [metric.key for metric in METRICS]
    assert Metrics(SqueezeFeatures())(x, x)["lpips_sqz10"] == 0
    assert Metrics(None)(x, x)["lpips_sqz10"] is None


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, ssimulacra2, flip, chosen("psnr")])
def test_mismatch_raises(metric: Callable[[np.ndarray, np.ndarray], float]) -> None:
    x = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\(32, 32, 3\) and \(32, 31, 3\)"):
        metric(x, x[:, :31])
    with pytest.raises(ValueError, match="float32"):
        metric(x, x.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(32, 32, 1\)"):
        metric(x[..., :1], x[..., :1])


def test_many_reconstructions_at_once_measure_as_one_by_one() -> None:
    x = photo(176, 190, 3)
    x_hats = [np.clip(x.astype(int) + shift, 0, 255).astype(np.uint8) for shift in (0, 5, -9)]
    metrics = Metrics(metrics=[KNOWN[key] for key in ("psnr", "ssim", "ms_ssim", "ssimulacra2", "flip")])
    together = metrics.many(x, x_hats)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # with one there are neither threads nor processes
    try:
        assert Metrics(metrics=metrics.list, n_processes=2).many(x, x_hats) == together
    finally:
        torch.set_num_threads(before)
    assert together == [Metrics(metrics=metrics.list)(x, x_hat) for x_hat in x_hats]
    assert len({row["flip"] for row in together}) == 3
