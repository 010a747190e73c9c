"""Scores of a race: distances of sets, their intervals, and differences of paired scores."""

import numpy as np
import pytest

from eval.distribution import Moments, frechet_distance, frechet_of_sets
from eval.feature_networks import FeatureNetwork
from eval.jackknife import beyond, difference, jackknife
from train.race.data import Picture, Pictures
from train.race.score import Judge, score


def drawn(n: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 32)) @ np.diag(np.linspace(0.2, 2, 32)) + shift


@pytest.mark.parametrize(("n", "m"), [(20, 25), (25, 60), (60, 90)])
def test_the_distance_is_that_of_the_evaluation(n: int, m: int) -> None:
    a, b = drawn(n), drawn(m, 0.3, seed=1)
    assert frechet_of_sets(a, b) == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-9)


def test_equal_sets_are_at_zero_and_cover_each_other() -> None:
    found = score(drawn(60), drawn(60))
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["precision"]["value"] == found["recall"]["value"] == 1


def test_a_shifted_set_is_farther_beyond_chance_and_a_fresh_draw_is_not() -> None:
    real = drawn(100)
    same, again, far = (score(real, drawn(100, shift, seed)) for shift, seed in ((0.0, 1), (0.0, 2), (0.6, 3)))
    for key in ("fid", "kid"):
        assert not beyond(difference(same[key], again[key]) or {})
        assert beyond(difference(far[key], same[key]) or {})
    assert far["precision"]["value"] < same["precision"]["value"]


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).standard_normal(200)
    found = jackknife(lambda x: {"mean": float(x.mean())}, [values], n_groups=200)["mean"]
    error = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert found["interval"] == pytest.approx((values.mean() - error, values.mean() + error), rel=1e-9)


def test_what_two_scores_have_in_common_cancels_in_their_difference() -> None:
    common, own = np.random.default_rng(0).standard_normal((2, 200))
    a = jackknife(lambda x: {"m": float(x.mean())}, [common])["m"]
    b = jackknife(lambda x: {"m": float(x.mean())}, [common + 0.05 + 0.01 * own])["m"]
    found = difference(b, a)
    assert found is not None
    assert beyond(found)  # 0.05, where each alone is known to 0.14
    assert difference(a, {**b, "groups": [*b["groups"][:-1], None]}) is None


def test_each_score_of_a_judge_compares_the_sets_that_it_says() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    all_of = [Picture(f"{n}", "ab"[n % 2], f"{n:02d}", pixels[n]) for n in range(60)]
    pictures = Pictures(all_of[20:], all_of[:20], ["a", "b"], [])
    corners = FeatureNetwork("corners", "random", "", lambda images: images[:, :, ::16, ::16].flatten(1).float())
    judge = Judge.of(corners, pictures, 20)
    held_out = [picture.pixels for picture in pictures.held_out]
    control = [pictures.training[n].pixels for n in pictures.control(20)]
    found = judge.scores(held_out, control, [255 - image for image in held_out])
    assert found is not None
    assert found["samples"]["fid"]["value"] == pytest.approx(0, abs=1e-6)  # drawn: the very images
    assert judge.control is not None
    assert found["ceiling"] == judge.control  # an autoencoder that loses nothing
    inverse = judge.scores([255 - image for image in held_out], control, held_out)
    assert inverse is not None
    assert found["own"]["fid"]["value"] == pytest.approx(inverse["samples"]["fid"]["value"])
    assert found["own"]["fid"]["value"] > 10
    assert Judge.of(corners, pictures, 5).network is None  # too few to say anything
