"""codec-eval generated: a judge that tells classes, chance and copies apart, on coloured patterns as classes."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from codec import images
from codec.errors import UsageError
from eval.class_folders import UNLABELLED, Photo
from eval.class_means import class_mean, class_mean_ratio, median, median_ratio
from eval.cli import main
from eval.feature_networks import FeatureNetwork
from eval.generated import Images, judge
from eval.generated_cli import conclusions
from eval.probe import BLURS, fit, versions
from eval.sheet import sheet

CLASSES = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
SIDE = 32


def picture(label: str, seed: int) -> np.ndarray:
    """A picture in the colour of its class, no two alike: large soft spots and fine noise."""
    rng = np.random.default_rng((seed, sorted(CLASSES).index(label)))
    spots = np.asarray(
        Image.fromarray(rng.integers(0, 255, (4, 4), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    )
    base = np.array(CLASSES[label], float) + rng.normal(0, 12, 3)
    return np.clip(base + 0.3 * (spots[..., None] - 127.0) + rng.normal(0, 6, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def photos(n: int, first: int, named: Callable[[str], str] = lambda label: label) -> list[Photo]:
    return [
        Photo(f"{label}/{seed}.png", named(label), picture(label, seed))
        for label in sorted(CLASSES)
        for seed in range(first, first + n)
    ]


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    """A network that no file is needed for: means of colours over a grid of 4 x 4."""

    def features(batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(batch.float() / 255, 4).flatten(1)

    return FeatureNetwork("grid", "random", "mean colours of a grid", features)


def judged(samples: list[Photo], network: FeatureNetwork, codec: Any = None) -> dict[str, Any]:
    images_ = Images.of(samples, photos(12, 0), photos(8, 100))
    return judge(images_, network, codec)[0]


def test_samples_of_their_class_agree_as_photographs_do(network: FeatureNetwork) -> None:
    found = judged(photos(8, 200), network)
    assert found["A"]["value"] > 0.95
    assert found["agreement"]["value"] > 0.95
    assert found["agreement_of_A"]["value"] == pytest.approx(1, abs=0.06)
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["diversity"]["ratio"] == pytest.approx(1, abs=0.15)
    assert found["nearest"]["features"]["ratio"]["value"] == pytest.approx(1, abs=0.25)
    assert found["nearest"]["features"]["ratio_by_class"] == pytest.approx(1, abs=0.25)
    assert "Samples do not lie nearer" in " ".join(conclusions(found))
    assert found["sets"]["samples"]["recall"]["value"] > 0.5
    assert [row["asked"] for row in found["images"]] == ["blue"] * 8 + ["green"] * 8 + ["red"] * 8


def test_held_out_photographs_as_samples_reach_A(network: FeatureNetwork) -> None:
    found = judged(photos(8, 100), network)
    assert found["agreement"] == found["A"]
    assert found["sets"]["samples"]["frechet"]["value"] == pytest.approx(0, abs=1e-9)
    assert {found["sets"]["samples"][key]["value"] for key in ("precision", "recall", "coverage")} == {1.0}
    assert found["sets"]["control"]["frechet"]["value"] > 1e-4
    assert found["nearest"]["features"]["samples"] == found["nearest"]["features"]["held_out"]


def test_shuffled_classes_agree_by_chance(network: FeatureNetwork) -> None:
    labels = sorted(CLASSES)
    shuffled = [
        Photo(photo.key, labels[n % 3], photo.pixels) for n, photo in enumerate(photos(9, 200))
    ]  # a third of each class is asked for as each
    found = judged(shuffled, network)
    assert found["agreement"]["value"] == pytest.approx(1 / 3, abs=0.02)
    low, high = found["agreement_of_A"]["interval"]
    assert low < 1 / 3 < high < 0.7
    wrong = judged([Photo(p.key, labels[(labels.index(p.label) + 1) % 3], p.pixels) for p in photos(4, 200)], network)
    assert wrong["agreement"]["value"] == 0


def test_copies_of_training_images_are_found_also_mirrored_and_blurred(network: FeatureNetwork) -> None:
    copies = judged([Photo("c/" + p.key, p.label, p.pixels) for p in photos(8, 0)], network)
    for key in ("features", "pixels"):
        assert copies["nearest"][key]["samples"]["value"] == 0
        assert copies["nearest"][key]["held_out"]["value"] > 0
        assert copies["nearest"][key]["share_nearer_than_any_held_out"] == 1
    assert any(line.startswith("Copies are likely: 100%") for line in conclusions(copies))
    for key in ("features", "pixels"):
        assert copies["nearest"][key]["ratio_by_class"] == 0
    assert all(row["nearest"] == row["name"].removeprefix("c/") for row in copies["images"])
    mirrored = [Photo(p.key, p.label, np.ascontiguousarray(p.pixels[:, ::-1])) for p in photos(8, 0)]
    assert judged(mirrored, network)["nearest"]["pixels"]["samples"]["value"] == 0

    def soften(key: str, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)))

    decoded = [Photo(p.key, p.label, soften(p.key, p.pixels)) for p in photos(8, 0)]
    assert judged(decoded, network, soften)["nearest"]["features"]["samples"]["value"] == 0


def test_a_held_out_photograph_that_is_in_the_training_hides_no_copies(network: FeatureNetwork) -> None:
    copies = [Photo("c/" + p.key, p.label, p.pixels) for p in photos(8, 0)]
    doubled = [*photos(8, 100), photos(1, 0)[0]]
    found = judge(Images.of(copies, photos(12, 0), doubled), network, None)[0]
    assert found["nearest"]["features"]["share_nearer_than_any_held_out"] == 1
    assert "Copies are likely" in " ".join(conclusions(found))


def test_samples_that_are_more_ordinary_are_not_called_copies(network: FeatureNetwork) -> None:
    # Halfway to the mean of their class, as guidance makes them: nearer to all photographs, and copies of none.
    middle = {label: np.mean([picture(label, n) for n in range(12)], axis=0) for label in CLASSES}
    mixed = [
        Photo(p.key, p.label, (0.3 * p.pixels + 0.7 * middle[p.label]).round().astype(np.uint8)) for p in photos(8, 200)
    ]
    found = judged(mixed, network)
    assert found["nearest"]["features"]["ratio"]["value"] < 0.9
    found["nearest"]["features"]["share_nearer_than_any_held_out"] = 0.1  # 2 of 24, by chance 1 / 25 are expected
    assert "more ordinary than photographs" in " ".join(conclusions(found))
    assert "Copies are likely" in " ".join(conclusions(found | {"n_held_out": 200}))


def test_one_image_many_times_is_not_diverse(network: FeatureNetwork) -> None:
    same = [Photo(f"{label}/{n}.png", label, picture(label, 300)) for label in sorted(CLASSES) for n in range(6)]
    found = judged(same, network)
    assert found["diversity"]["samples"] == pytest.approx(0, abs=1e-9)
    assert found["agreement"]["value"] > 0.9
    other = judged(photos(6, 200), network)
    assert found["sets"]["samples"]["recall"]["value"] < other["sets"]["samples"]["recall"]["value"]
    assert found["sets"]["samples"]["coverage"]["value"] < other["sets"]["samples"]["coverage"]["value"]


def test_A_is_of_photographs_through_the_codec(network: FeatureNetwork) -> None:
    def to_grey(key: str, pixels: np.ndarray) -> np.ndarray:
        return np.full_like(pixels, 128)

    found = judged(photos(8, 200), network, to_grey)
    assert found["A"]["value"] == pytest.approx(1 / 3)  # all are taken for the same class
    assert found["accuracy_on_photographs"]["value"] > 0.95


def test_samples_without_classes_are_compared_as_sets(network: FeatureNetwork) -> None:
    def unlabelled(found: list[Photo]) -> list[Photo]:
        return [Photo(photo.key, UNLABELLED, photo.pixels) for photo in found]

    def against(samples: list[Photo], codec: Any = None) -> dict[str, Any]:
        parts = (unlabelled(part) for part in (samples, photos(12, 0), photos(8, 100)))
        return judge(Images.unconditional(*parts), network, codec)[0]

    found = against(photos(9, 200))
    assert {found[key] for key in ("A", "agreement", "by_class", "chance")} == {None}
    assert found["sets"]["n"] == {"samples": 27, "control": 27, "held_out": 24, "features": 48}
    assert found["sets_through_codec"] is None
    assert found["nearest"]["features"]["ratio_by_class"] is None
    assert "asked" not in found["images"][0]
    # One class alone is far from photographs of all, and no probe is asked.
    narrow = against([photo for photo in photos(27, 200) if photo.label == "red"])
    frechet = [each["sets"]["samples"]["frechet"]["value"] for each in (found, narrow)]
    assert frechet[1] > 5 * frechet[0]
    assert narrow["sets"]["control"] == found["sets"]["control"]
    assert narrow["diversity"]["ratio"] < 0.5 < found["diversity"]["ratio"]
    text = " ".join(conclusions(found))
    assert "27 samples, 27 control images and 24 photographs, 48 features" in text
    assert "probe" not in text

    def darken(key: str, pixels: np.ndarray) -> np.ndarray:
        return (pixels // 2).astype(np.uint8)

    dark = [Photo(photo.key, photo.label, darken(photo.key, photo.pixels)) for photo in photos(8, 100)]
    found = against(dark, darken)  # what the codec makes of the photographs themselves
    assert found["sets_through_codec"]["samples"]["frechet"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["sets"]["samples"]["frechet"]["value"] > 0.1


def test_classes_that_do_not_fit_are_refused() -> None:
    train, held_out = photos(2, 0), photos(2, 10)
    with pytest.raises(UsageError, match=r"samples of class mauve, .* --unconditional judges"):
        Images.of([Photo("a", "mauve", train[0].pixels)], train, held_out)
    with pytest.raises(UsageError, match="no held-out photograph of class blue"):
        Images.of(train, train, [photo for photo in held_out if photo.label != "blue"])
    red = [photo for photo in train if photo.label == "red"]
    with pytest.raises(UsageError, match="one class"):
        Images.of(red, red, red)


# --- its parts ------------------------------------------------------------------------------------------------------


def test_a_probe_weighs_classes_alike() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0] * 300 + [1] * 20)
    x = rng.normal(0, 1, (320, 5)) + labels[:, None] * 1.5
    probe = fit(x, labels, [str(n) for n in range(320)], 2)
    seen = probe.shares(x).argmax(1)
    assert (seen[labels == 1] == 1).mean() > 0.85
    assert (seen[labels == 0] == 0).mean() > 0.85
    np.testing.assert_allclose(probe.shares(x).sum(1), 1)
    again = fit(x, labels, [str(n) for n in range(320)], 2)
    np.testing.assert_array_equal(again.weights, probe.weights)


def test_versions_are_blurred_more_and_more_and_mirrored_in_turn() -> None:
    pixels = picture("red", 0)
    found = versions(pixels)
    np.testing.assert_array_equal(found[0], pixels)
    assert len(found) == len(BLURS)
    detail = [np.abs(np.diff(one.astype(float), axis=0)).mean() for one in found]
    assert detail == sorted(detail, reverse=True)
    assert np.abs(found[1][:, ::-1].astype(float) - pixels).mean() < np.abs(found[1].astype(float) - pixels).mean()


def test_intervals_of_class_means_and_medians() -> None:
    found = class_mean({"a": (10, 20), "b": (1, 1)})
    assert found["value"] == 0.75
    low, high = found["interval"]
    assert 0.62 < low < 0.68 < 0.82 < high < 0.88  # of a alone: half of 0.5 +- 0.22
    ratio = class_mean_ratio({"a": (5, 10)}, {"a": (10, 10)})
    assert ratio["value"] == 0.5
    assert class_mean_ratio({"a": (5, 10)}, {"a": (0, 10)}) == {"value": None, "interval": None}
    values = np.random.default_rng(0).normal(10, 1, 100).tolist()
    low, high = median(values)["interval"]
    assert low < median(values)["value"] < high < low + 1
    assert median_ratio(values, values)["value"] == 1
    assert median_ratio(values, [0.0])["value"] is None


def test_a_sheet_holds_the_images() -> None:
    a, b = picture("red", 0), picture("blue", 0)
    opened = np.asarray(Image.open(io.BytesIO(sheet([("x", [a, b]), ("y", [b])], "title", together=2))))
    large = [one.repeat(2, 0).repeat(2, 1) for one in (a, b)]
    left, top = 96, 22
    np.testing.assert_array_equal(opened[top : top + 64, left : left + 64], large[0])
    np.testing.assert_array_equal(opened[top : top + 64, left + 68 : left + 132], large[1])
    np.testing.assert_array_equal(opened[top + 68 : top + 132, left : left + 64], large[1])


# --- the command ----------------------------------------------------------------------------------------------------


def written(folder: Path, photos_: list[Photo]) -> Path:
    for photo in photos_:
        path = folder / photo.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(photo.pixels))
    return folder


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torchvision.models import squeezenet1_0

    weights = tmp_path / "squeezenet1_0-random.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(squeezenet1_0(weights=None).state_dict(), weights)
    samples = written(tmp_path / "samples", photos(4, 200))
    (samples / "sheet.png").write_bytes(images.save_png(picture("red", 9)))  # of no class
    (samples / "red" / "bad.png").write_bytes(b"no image")
    train, held_out = written(tmp_path / "train", photos(6, 0)), written(tmp_path / "held", photos(4, 100))
    out = tmp_path / "out"
    command = ["generated", str(samples), "--train", str(train), "--held-out", str(held_out), "-o", str(out)]
    assert main([*command, "--features", str(weights), "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "agreement / A" in said.out
    assert "bad.png" in said.err
    result = json.loads((out / "generated.json").read_text())
    assert result["kind"] == "generated"
    assert {"command", "commit", "versions", "hardware", "protocol_hash", "feature_network"} <= result.keys()
    assert result["protocol"]["name"] == f"folder-{SIDE}"
    assert result["dataset"]["samples"]["n_images"] == len(result["images"]) == 12
    assert len(result["failed"]) == 1
    assert result["by_class"]["red"]["n_samples"] == 4
    picture_ = Image.open(out / "nearest.png")
    assert picture_.width > 8 * 64
    assert result["sets"]["n"] == {"samples": 12, "control": 12, "held_out": 12, "features": 512}
    assert main([*command[:1], str(tmp_path / "none"), *command[2:]]) == 2
    # Of an unconditional generator: one folder that is no class, or none at all.
    for name, folder in (("any", "any"), ("flat", "")):
        drawn = [Photo(f"{folder}/{n}.png".lstrip("/"), "", photo.pixels) for n, photo in enumerate(photos(4, 200))]
        drawn_folder = written(tmp_path / name, drawn)
        words = [str(drawn_folder) if word == str(samples) else word for word in command]
        more = ["--features", str(weights), "--device", "cpu"]
        if folder:
            assert main([*words, *more]) == 2
            assert "--unconditional judges samples without classes" in capsys.readouterr().err
        assert main([*words, *more, "--unconditional"]) == 0
        said = capsys.readouterr().out
        assert "Frechet distance to photographs" in said
        assert "agreement" not in said
        again = json.loads((out / "generated.json").read_text())
        assert (again["n_samples"], again["classes"], again["agreement"]) == (12, None, None)
        assert again["protocol_hash"] != result["protocol_hash"]
        assert again["command"].count("--unconditional") == 1
