"""Metrics of sets of images against known answers, other packages, and themselves in shards."""

import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codec.errors import UsageError
from eval.distribution import (
    SET_METRICS,
    DistributionMetrics,
    Moments,
    frechet_distance,
    kernel_distance,
    neighbourhoods,
    patch_corners,
    settings,
)
from eval.feature_networks import FeatureNetwork, load_network
from eval.features import FeaturesError
from tests.conftest import photo

KEYS = [metric.key for metric in SET_METRICS]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def toy(dimension: int = 6) -> FeatureNetwork:
    """Random projections of an image shrunk to 8 x 8."""
    matrix = torch.randn(3 * 8 * 8, dimension, generator=torch.Generator().manual_seed(0)) / 50

    def features(images: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.interpolate(images.float(), size=(8, 8), mode="area")
        return small.flatten(1) @ matrix

    return FeatureNetwork("toy", "random", "projections", features)


def sets(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(8, 8))
    return rng.normal(size=(n, 8)) @ mix, rng.normal(size=(n, 8)) @ mix * 1.1 + 0.2


def pairs(n: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(3)
    found = []
    for index in range(n):
        x = photo(260 + 10 * (index % 14), 270, seed=index)
        x_hat = (x + rng.normal(4, 6, x.shape)).clip(0, 255).astype(np.uint8)
        found.append((f"image-{index}", x, x_hat))
    return found


def measured(found: list[tuple[str, np.ndarray, np.ndarray]], network: FeatureNetwork, n: int = 5000) -> Any:
    metrics = DistributionMetrics(network, n)
    for pair in found:
        metrics.update(*pair)
    return metrics


@pytest.mark.parametrize("n", [5, 8, 50])  # of 8 features: fewer, as many, more
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    a, _ = sets(n)
    assert frechet_distance(Moments.of(1000 * a), Moments.of(1000 * a)) == pytest.approx(0, abs=1e-6)
    assert neighbourhoods(*[sets(50)[0]] * 2) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}


def test_fid_of_gaussians_by_hand() -> None:
    a = np.array([[0.0, 0], [2, 0], [0, 4], [2, 4]])  # means 1 and 2, variances 4/3 and 16/3, no covariance
    b = 3 * a + np.array([5, 0])
    expected = (3 * 1 + 5 - 1) ** 2 + (3 * 2 - 2) ** 2 + (4 / 3 + 16 / 3) * (3 - 1) ** 2
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)


def test_fid_is_torchmetrics_on_the_same_features() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(torch.nn.Module):
        num_features = 8

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    a, b = sets(40)
    theirs = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(a), real=True)
    theirs.update(torch.from_numpy(b), real=False)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(float(theirs.compute()), rel=1e-8)


def test_kid_is_torchmetrics_on_the_same_features() -> None:
    """Theirs counts every pair, ours all but the n of an image and its reconstruction: over n pairings, each once."""
    from torchmetrics.image.kid import poly_mmd

    a, b = sets(30)
    expected = float(poly_mmd(*(torch.from_numpy(features) for features in (a, b))))
    pairings = [kernel_distance(a, np.roll(b, shift, axis=0)) for shift in range(30)]
    assert np.mean(pairings) == pytest.approx(expected, rel=1e-9)
    assert abs(expected) > 1e-3


def test_kid_has_no_bias() -> None:
    rng = np.random.default_rng(1)
    values = [kernel_distance(*rng.normal(size=(2, 6, 3))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert min(values) < 0 < max(values)


def test_kid_has_no_bias_where_each_image_is_like_its_reconstruction() -> None:
    def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        x = 1 + rng.normal(size=(n, 32))
        return x, x + 0.3 * rng.normal(size=(n, 32)) + 0.2

    exact = kernel_distance(*drawn(2000, 0))
    few = [kernel_distance(*drawn(12, seed)) for seed in range(1, 200)]
    assert np.mean(few) == pytest.approx(exact, rel=0.1)
    assert exact > 0.1
    x, _ = drawn(12, 0)
    assert kernel_distance(x, x.copy()) == pytest.approx(0, abs=1e-12)


def test_precision_recall_density_coverage_of_points_on_a_line_by_hand() -> None:
    """Real 0..9; radii to the third neighbour 3 at the ends, else 2; to the fifth 5, 4, then 3."""
    real = np.array([(float(v), 0) for v in range(10)])
    fake = np.array([(v, 0) for v in (4.5, 5.5, 6.5, 7.5, 30, 31, 32, 33)])
    # Fake radii 3, 2, 2, 3: they hold 2..9. 10, 7, 6 and 5 real balls hold the first four.
    assert neighbourhoods(real, fake) == {
        "precision": 4 / 8,
        "recall": 8 / 10,
        "density": pytest.approx((10 + 7 + 6 + 5) / (8 * 5)),
        "coverage": 1.0,
    }
    fewer = np.array([(v, 0) for v in (7.5, 8.5, 9.5, 30, 31, 32)])
    assert neighbourhoods(real, fewer)["coverage"] == 5 / 10  # the balls around 5..9
    edge = np.array([(v, 0) for v in (12.0, 12.1, 30, 31, 32, 33)])
    assert neighbourhoods(real, edge)["precision"] == 1 / 6  # 12 is just on the ball around 9


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = sets(60)
    b = 1.5 * b + 2
    precision, recall = calculate_precision_recall_full(torch.from_numpy(b), torch.from_numpy(a), neighborhood=3)
    found = neighbourhoods(a, b)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall), abs=1e-6)
    assert 0 < found["precision"] < 1


def test_patches_are_neural_compressions() -> None:
    assert list(patch_corners(512, 768)) == [
        *((top, left) for top in (0, 256) for left in (0, 256, 512)),
        *((128, 128), (128, 384)),
    ]
    assert list(patch_corners(384, 384)) == [(0, 0), (128, 128)]
    assert list(patch_corners(383, 1000)) == [(0, 0), (0, 256), (0, 512)]  # one side is too short for the second grid
    assert list(patch_corners(255, 900)) == []


def test_what_is_measured_of_images_is_what_their_features_give() -> None:
    found, network = pairs(8), toy()

    def features(images: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(
            [network(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()).numpy() for image in images]
        )

    def cut(image: np.ndarray) -> list[np.ndarray]:
        return [image[top : top + 256, left : left + 256] for top, left in patch_corners(*image.shape[:2])]

    whole = [features([pair[n] for pair in found]).astype(np.float64) for n in (1, 2)]
    patches = [features([patch for pair in found for patch in cut(pair[n])]).astype(np.float64) for n in (1, 2)]
    metrics = measured(found, network)
    values = metrics.compute()
    assert list(values) == KEYS
    assert values["rfid"] == pytest.approx(frechet_distance(*map(Moments.of, whole)), rel=1e-5)
    assert values["patch_fid"] == pytest.approx(frechet_distance(*map(Moments.of, patches)), rel=1e-5)
    assert values["kid"] == pytest.approx(kernel_distance(*whole), rel=1e-4)
    assert values["patch_kid"] == pytest.approx(kernel_distance(*patches), rel=1e-4)
    assert values["rfid"] > 0.01
    about = metrics.about()
    assert (about["n_images"], about["n_patches"], about["n_kept"]) == (8, len(patches[0]), 8)
    same = measured([(key, x, x) for key, x, _ in found], network).compute()
    assert same == dict.fromkeys(KEYS, pytest.approx(0, abs=1e-6)) | {
        **dict.fromkeys(("precision", "recall", "density", "coverage"), 1)
    }


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_shards_give_what_one_process_gives(n_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.distribution._BUFFER", 4)
    found, network = pairs(23), toy()
    alone = measured(found, network, 10)
    ranks = [measured(found[rank::n_ranks], network, 10) for rank in range(n_ranks)]
    states = [pickle.loads(pickle.dumps(rank.state())) for rank in ranks]
    for rank in ranks:
        rank.merge(states)
    expected = alone.compute()
    assert all(value is not None for value in expected.values())
    assert ranks[0].compute() == pytest.approx(expected, rel=1e-6)
    assert ranks[-1].compute() == ranks[0].compute()
    assert ranks[0].about() == alone.about()
    assert alone.about()["n_kept"] == 10  # the same ten, whoever measured them
    assert alone.about()["n_images"] == 23
    other = DistributionMetrics(toy(5))
    with pytest.raises(ValueError, match="different networks"):
        other.merge(states)


def test_too_few_and_too_small_images_are_said() -> None:
    metrics = DistributionMetrics(toy())
    assert metrics.compute() == dict.fromkeys(KEYS)
    metrics.update("tiny", photo(31, 90), photo(31, 90))
    for key, x, x_hat in pairs(3):
        metrics.update(key, x[:200], x_hat[:200])
    values, about = metrics.compute(), metrics.about()
    assert values["rfid"] is not None
    assert values["patch_fid"] is None  # no side of 256
    assert values["precision"] is None  # no five neighbours
    assert (about["n_images"], about["n_too_small"], about["n_patches"]) == (3, 1, 0)
    assert len(about["warnings"]) == 2
    assert "rfid: 3 images cannot span 6 features" in about["warnings"][0]
    assert "1 images have a side below 32 pixels" in about["warnings"][1]
    with pytest.raises(RuntimeError, match="out of memory"):
        fails_on_patches(metrics)
    assert metrics.about() == about  # nothing of that image is counted
    with pytest.raises(ValueError, match=r"a\.png: expected two"):
        metrics.update("a.png", photo(40, 40), photo(40, 41))


def fails_on_patches(metrics: DistributionMetrics) -> None:
    whole = metrics.network._function

    def function(images: torch.Tensor) -> torch.Tensor:
        if images.shape[2:] == (256, 256):
            raise RuntimeError("out of memory")
        return whole(images)

    metrics.network._function = function
    metrics.update("large", photo(260, 270), photo(260, 270, seed=1))


def test_classifiers_from_files(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(4)
    squeeze, resnet = torchvision.models.squeezenet1_0(weights=None), torchvision.models.resnet18(weights=None)
    torch.save(squeeze.state_dict(), tmp_path / "squeezenet1_0-1.pth")
    torch.save(resnet.state_dict(), tmp_path / "resnet18-1.pth")
    image = torch.from_numpy(photo(70, 90)).permute(2, 0, 1)[None].contiguous()
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = (image / 255 - mean) / std
    with torch.no_grad():
        first = squeeze.eval().features(x).mean((2, 3))
        resnet.fc = torch.nn.Identity()
        second = resnet.eval()(x)
    for name, expected in (("squeezenet1_0", first), ("resnet18", second)):
        network = load_network(name, tmp_path)
        scaled = expected / expected.square().mean().sqrt()
        torch.testing.assert_close(network(image), scaled, rtol=1e-3, atol=1e-4)
        assert network.dimension == 512
        assert len(network.sha256) == 64
        assert network.sha256 in settings(network)["rfid"]
    with pytest.raises(FeaturesError, match="weights of another network"):
        load_network("vgg16", tmp_path / "resnet18-1.pth")
    with pytest.raises(FeaturesError, match=r"alexnet-\*\.pth"):
        load_network("alexnet", tmp_path)
    with pytest.raises(UsageError, match="unknown feature network 'resnet0'"):
        load_network("resnet0", tmp_path)


def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as package

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(package.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(6)
        theirs = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "weights-inception-2015-12-05-1.pth"
    torch.save(theirs.state_dict(), path)
    image = torch.from_numpy(photo(64, 80)).permute(2, 0, 1)[None].contiguous()
    network = load_network("inception", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(network(image), theirs(image)[0], rtol=1e-4, atol=1e-6)
    assert network.dimension == 2048
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(FeaturesError, match="not the weights of FID's Inception"):
        load_network("inception", path)


def test_a_transformers_folder(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(9)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, intermediate_size=16
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no preprocessor_config\.json"):
        load_network(str(tmp_path))
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    network = load_network(str(tmp_path))
    image = photo(50, 60)
    with torch.no_grad():
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).pooler_output  # DINOv2's is its class token
    torch.testing.assert_close(network(torch.from_numpy(image).permute(2, 0, 1)[None]), expected, rtol=0.02, atol=0.02)
    assert (network.dimension, len(network.sha256)) == (16, 64)
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    assert load_network(str(tmp_path)).settings != network.settings  # another crop is another metric
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_network(str(tmp_path))
