"""MIG, DCI, SAP and holes of codes and draws whose answer is known."""

import math

import numpy as np
import pytest
import torch

from eval.disentanglement import dci, disentanglement, mig, sap
from eval.forest import Forest, ForestConfig
from eval.holes import hole_share

N = 2000
CLASSES = (4, 3)


def factors() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(n, size=N) for n in CLASSES], axis=1)


def noise(n_units: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, n_units))


def perfect() -> np.ndarray:
    """Each factor in a code of its own, not in order, beside two codes of noise."""
    place = np.array([2.0, -1.0, 0.5, 4.0])
    return np.concatenate([place[factors()], noise(2)], axis=1) + 0.01 * noise(4, 2)


def test_perfect_codes_reach_the_limit_of_every_score() -> None:
    found = disentanglement(perfect(), factors())
    assert found["mig"]["score"] > 0.97
    assert found["dci"]["disentanglement"] > 0.97
    assert found["dci"]["completeness"] > 0.97
    assert found["dci"]["informativeness"] > 0.98
    assert found["sap"]["limit"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert found["sap"]["score"] == pytest.approx(found["sap"]["limit"], abs=0.05)
    assert np.argmax(found["mig"]["information"], axis=1).tolist() == [0, 1]
    assert np.argmax(found["dci"]["importances"], axis=0).tolist() == [0, 1]


def test_random_codes_reach_nothing() -> None:
    found = disentanglement(noise(6), factors())
    assert found["mig"]["score"] < 0.02
    assert found["dci"]["disentanglement"] < 0.1
    assert found["dci"]["completeness"] < 0.1
    assert found["dci"]["informativeness"] == pytest.approx(found["dci"]["chance"], abs=0.05)
    assert found["dci"]["chance"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert found["sap"]["score"] < 0.05


def test_a_turn_of_the_codes_is_seen_by_all_though_they_know_as_much() -> None:
    turn = np.array([[1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
    turned = (factors() + 0.01 * noise(2)) @ turn
    found = disentanglement(turned, factors())
    assert found["dci"]["informativeness"] > 0.97
    assert found["mig"]["score"] < 0.3
    assert found["dci"]["disentanglement"] < 0.5
    assert found["sap"]["score"] < 0.3


def test_a_factor_in_two_codes_is_not_complete_and_a_code_of_two_factors_not_disentangled() -> None:
    both = np.concatenate([factors()[:, :1] + 0.3 * noise(2, seed) for seed in (1, 2)], axis=1)[:, [0, 2]]
    found = dci(np.concatenate([both, factors()[:, 1:] + 0.01 * noise(1, 3)], axis=1), factors())
    assert found["per_factor"][0]["completeness"] < 0.6 < 0.97 < found["per_factor"][1]["completeness"]
    assert found["disentanglement"] > 0.9
    assert mig(both, factors())["per_factor"][0] < 0.05
    one = factors() @ np.array([[3.0], [1.0]]) + 0.01 * noise(1)
    found = dci(np.concatenate([one, noise(1)], axis=1), factors())
    assert found["per_code"][0] < 0.1
    importances = np.array(found["importances"])
    assert found["disentanglement"] == pytest.approx(np.average(found["per_code"], weights=importances.sum(1)))
    assert found["informativeness"] > 0.97


def test_information_and_gap_by_hand() -> None:
    factor = np.array([0, 0, 1, 1] * 10)[:, None]
    codes = np.concatenate([factor, np.array([0, 1, 1, 1] * 10)[:, None]], axis=1).astype(float)
    found = mig(codes, factor)
    second = math.log(2) - 0.75 * (-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3))
    assert found["information"] == [pytest.approx([math.log(2), second])]
    assert found["score"] == pytest.approx(1 - second / math.log(2))
    assert mig(codes[:, :1], factor)["score"] == pytest.approx(1)
    gap = sap(codes, factor)
    assert gap["accuracy"] == [pytest.approx([1.0, 0.75], abs=0.1)]
    assert gap["score"] == pytest.approx(0.25, abs=0.1)


def test_the_forest_learns_what_needs_two_numbers() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 3))
    labels = ((x[:, 0] > 0.5) & (x[:, 2] > 0)).astype(np.int64)
    forest = Forest.grow(x[:1500], labels[:1500], ForestConfig())
    assert (forest.predict(x[1500:]) == labels[1500:]).mean() > 0.97
    assert forest.importances.sum() == pytest.approx(1)
    assert forest.importances[1] < 0.05 < 0.2 < min(forest.importances[[0, 2]])
    again = Forest.grow(x[:1500], labels[:1500], ForestConfig())
    assert np.array_equal(again.importances, forest.importances)
    rare = (rng.random(1500) < 0.1).astype(np.int64)  # told apart by little: classes of equal weight are found alike
    found = Forest.grow(rare[:, None] + rng.standard_normal((1500, 1)), rare, ForestConfig(depth=1))
    assert found.predict(np.linspace(-3, 4, 71)[:, None]).mean() == pytest.approx(3.5 / 7, abs=0.1)
    same = Forest.grow(np.zeros((20, 2)), labels[:20], ForestConfig())  # nothing to split by
    assert same.importances.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("codes", "labels", "message"),
    [
        (np.zeros((4, 2)), np.zeros((5, 1), int), r"expected \(N, U\) and \(N, F\), got \(4, 2\) and \(5, 1\)"),
        (np.zeros((4, 2)), np.zeros((4, 1)), "integer factors, got factors float64"),
        (np.full((4, 2), np.nan), np.zeros((4, 1), int), "finite codes"),
        (np.zeros((4, 2)), np.ones((4, 1), int), "factor 0 is constant"),
        (np.zeros((5, 2)), np.array([[0], [0], [0], [0], [1]]), "factor 0 has values too rare"),
    ],
)
def test_what_cannot_be_scored_is_named(codes: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        disentanglement(codes, labels)


def test_equal_draws_leave_five_in_a_hundred_in_holes_and_displaced_ones_all() -> None:
    torch.manual_seed(0)
    posterior = torch.randn(4000, 2, 1)
    same = hole_share(torch.randn(4000, 2, 1), posterior)
    assert same.share == pytest.approx(0.05, abs=0.02)
    assert same.distance == pytest.approx(1, abs=0.1)
    assert (same.n_reference, same.n_held_out, same.n_prior) == (2000, 2000, 4000)
    away = hole_share(torch.randn(1000, 2, 1) + 20, posterior)
    assert away.share == 1
    assert away.distance > 100
    # Two clusters, and a prior that also fills what is between them: a third of it is in the hole.
    apart = torch.randn(3000, 2) * 0.3 + torch.tensor([[-5.0, 0.0], [5.0, 0.0]]).repeat(1500, 1)
    covering = torch.randn(3000, 2) * 0.3 + torch.tensor([[-5.0, 0.0], [0.0, 0.0], [5.0, 0.0]]).repeat(1000, 1)
    assert hole_share(covering, apart).share == pytest.approx(1 / 3 + 0.05 * 2 / 3, abs=0.03)
    assert hole_share(apart, covering).share < 0.1  # a part of it has no holes
    assert hole_share(apart, covering, seed=1) != hole_share(apart, covering, seed=2)
    with pytest.raises(ValueError, match=r"expected draws \(M, d\) and \(N >= 40, d\), got \(3000, 2\) and \(5, 2\)"):
        hole_share(apart, apart[:5])
