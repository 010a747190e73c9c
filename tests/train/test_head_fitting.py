"""Priors that are fitted after training recover what the vectors were drawn from."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from codec.head.flows import FlowSize
from train.head.fitting import FlowFitConfig, MixtureConfig, fit_flow, fit_mixture

MEANS = torch.tensor([[-4.0, 0.0], [0.0, 5.0], [4.0, 0.0]])
COVARIANCES = torch.tensor([[[1.0, 0.8], [0.8, 1.0]], [[2.0, 0.0], [0.0, 0.2]], [[0.5, -0.3], [-0.3, 0.7]]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])


def drawn(n: int, weights: torch.Tensor = WEIGHTS, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return known(weights).sample((n,))


def known(weights: torch.Tensor = WEIGHTS) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(MEANS, COVARIANCES))


def test_em_recovers_a_known_mixture_and_its_objective_never_falls() -> None:
    fit = fit_mixture(drawn(6000), MixtureConfig(components=3))
    order = fit.prior.means[:, 0].argsort()
    torch.testing.assert_close(fit.prior.means[order], MEANS, atol=0.12, rtol=0)
    covariances = fit.prior.cholesky @ fit.prior.cholesky.transpose(1, 2)
    torch.testing.assert_close(covariances[order], COVARIANCES, atol=0.12, rtol=0)
    torch.testing.assert_close(fit.prior.log_weights[0, order].exp(), WEIGHTS, atol=0.03, rtol=0)
    held_out = drawn(4000, seed=1)
    assert float((known().log_prob(held_out) - fit.prior.log_prob(held_out)).mean()) < 0.01  # nats, the KL
    (trace,) = fit.traces
    assert 2 <= len(trace) < 200
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(trace))


def test_classes_share_components_and_have_weights_of_their_own() -> None:
    weights = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.1, 0.8]])
    vectors = torch.cat([drawn(3000, weights[0]), drawn(1000, weights[1], seed=1)])
    labels = torch.arange(2).repeat_interleave(torch.tensor([3000, 1000]))
    fit = fit_mixture(vectors, MixtureConfig(components=3), labels, 2)
    order = fit.prior.means[:, 0].argsort()
    found = fit.prior.log_weights[:, order].exp()
    torch.testing.assert_close(found[:2], weights, atol=0.03, rtol=0)
    torch.testing.assert_close(found[2], 0.75 * found[0] + 0.25 * found[1])  # of any class, as often as it occurs


def test_classes_fitted_by_themselves_use_their_own_components_alone() -> None:
    vectors = torch.cat([drawn(400, torch.tensor([1.0, 0, 0])), drawn(400, torch.tensor([0, 0.5, 0.5]), seed=1)])
    labels = torch.arange(2).repeat_interleave(400)
    fit = fit_mixture(vectors, MixtureConfig(components=2, per_class=True), labels, 2)
    assert len(fit.traces) == 2
    weights = fit.prior.log_weights.exp()
    assert [row.nonzero().flatten().tolist() for row in weights[:2]] == [[0, 1], [2, 3]]
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    samples = fit.prior.sample(300, torch.zeros(300, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(0), MEANS[0], atol=0.3, rtol=0)


def test_a_covariance_stays_invertible_with_fewer_vectors_than_numbers() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(20, 50)
    vectors[:, 7] = 3.0  # says nothing
    prior = fit_mixture(vectors, MixtureConfig(components=2)).prior
    assert bool(torch.isfinite(prior.log_prob(vectors)).all())
    assert bool(torch.isfinite(prior.sample(5)).all())
    copies = fit_mixture(torch.ones(10, 3), MixtureConfig(components=4)).prior
    assert bool(torch.isfinite(copies.log_prob(torch.ones(1, 3))).all())


def test_one_component_is_mean_and_covariance_drawn_towards_a_diagonal_one() -> None:
    vectors = drawn(90)
    prior = fit_mixture(vectors, MixtureConfig(components=1, strength=30)).prior
    covariance = vectors.T.cov(correction=0)
    expected = (90 * covariance + 30 * covariance.diagonal().diag()) / 120
    torch.testing.assert_close(prior.means[0], vectors.mean(0))
    torch.testing.assert_close(prior.cholesky[0] @ prior.cholesky[0].T, expected)


def test_what_cannot_be_fitted_is_named() -> None:
    x = torch.randn(6, 2)
    for labels, n_classes, message in (
        (None, 0, "components = 16, allowed: at most one for each of 6 vectors"),
        (torch.zeros(6, dtype=torch.int64), 2, "no vector of class 1"),
        (None, 2, "go together"),
        (torch.full((6,), 5), 2, r"expected \(6,\) in 0 .. 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_mixture(x, MixtureConfig(), labels, n_classes)
    with pytest.raises(ValueError, match="finite"):
        fit_mixture(x / 0, MixtureConfig())
    with pytest.raises(ValueError, match=r"strength = 0, allowed: > 0"):
        MixtureConfig(strength=0)


def bent(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bananas that bend one way in class 0, and the other way in class 1."""
    torch.manual_seed(seed)
    a, b, labels = torch.randn(n), torch.randn(n), torch.arange(n) % 2
    return torch.stack([10 + 3 * a, (2.0 * labels - 1) * (a.square() - 1) + 0.3 * b], dim=1), labels


def test_a_flow_learns_what_a_gaussian_cannot_and_stops_by_itself() -> None:
    (x, y), (held_out, held_y) = bent(2000, 0), bent(500, 1)
    config = FlowFitConfig(size=FlowSize(steps=4, width=32, depth=1), lr=5e-3, steps=600, check_every=50, patience=2)
    fit = fit_flow(x, held_out, config, (y, held_y), 2)
    # The best that can be: the negative entropy of the numbers that the bananas are made of.
    true = math.log(2 * math.pi * math.e) + math.log(3 * 0.3)
    baseline = float(MultivariateNormal(x.mean(0), x.T.cov()).log_prob(held_out).mean())
    assert fit.trace[fit.best] > baseline + 0.7
    assert fit.trace[fit.best] == max(fit.trace)
    assert fit.trace[fit.best] == pytest.approx(-true, abs=0.25)
    assert fit.prior.log_prob(held_out, held_y).mean().item() == pytest.approx(fit.trace[fit.best], abs=1e-4)
    samples = fit.prior.sample(400, torch.ones(400, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    expected = ((samples[:, 0] - 10) / 3).square() - 1
    assert (samples[:, 1] - expected).abs().median().item() < 0.4
    # Of any class it knows both bananas, crossed, from hidden labels; less than with the label, more than a Gaussian.
    assert fit.trace[fit.best] - 0.5 > fit.prior.log_prob(held_out).mean().item() > baseline + 0.2
    again = fit_flow(x, held_out, FlowFitConfig(size=FlowSize(width=8), steps=3, check_every=1), (y, held_y), 2)
    twice = fit_flow(x, held_out, FlowFitConfig(size=FlowSize(width=8), steps=3, check_every=1), (y, held_y), 2)
    assert again.trace == twice.trace
    with pytest.raises(ValueError, match=r"held_out: expected \(M, 2\), M >= 1, got \(5, 3\)"):
        fit_flow(x, torch.zeros(5, 3), config, (y, held_y), 2)
