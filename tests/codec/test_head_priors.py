"""Priors of the head's units: densities against direct computation, draws against densities, save and load."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from codec.errors import ModelError
from codec.head.flows import FlowSize
from codec.head.gaussian import Gaussian
from codec.head.priors import ConditionalGaussian, FlowPrior, Prior, StandardNormal, VampPrior
from codec.head.second_stage import FittedPrior, GaussianMixture, VectorFlow, restore


def stirred(prior: Any, seed: int = 0, scale: float = 0.2) -> Any:
    """A prior that is not at its start any more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += scale * torch.randn_like(parameter)
    return prior


class Encoder(nn.Module):
    """q(u|z, c) of latents (n, 2, 1, 1): u has two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None) -> Gaussian:
        return Gaussian.of(self.linear(z.flatten(1) + (0 if c is None else c)))


def mixture(n_classes: int = 2) -> GaussianMixture:
    torch.manual_seed(0)
    prior = GaussianMixture(2, 3, n_classes)
    prior.means.copy_(3 * torch.randn(3, 2))
    prior.cholesky.copy_(torch.tensor([[0.8, 0.0], [2.0, 1.0]]))
    prior.log_weights.copy_(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8], [0.25, 0.35, 0.4]])[: n_classes + 1].log())
    return prior


def priors() -> dict[str, tuple[Prior, torch.Tensor | None]]:
    """Every prior of two units, with the condition of one draw."""
    torch.manual_seed(0)
    c, encoder = torch.randn(1, 2), Encoder()
    fitted = VectorFlow(2, 2, FlowSize(width=8))
    fitted.mean.copy_(torch.tensor([1.0, -1.0]))
    fitted.deviation.copy_(torch.tensor([2.0, 1.5]))
    return {
        "standard": (StandardNormal(2), None),
        "conditional": (stirred(ConditionalGaussian(2, 2, 8)), c),
        "flow": (stirred(FlowPrior(2, 2, FlowSize(width=8))), c),
        "vamp": (VampPrior(2, torch.randn(3, 2, 1, 1), encoder), None),
        "conditional vamp": (VampPrior(2, torch.randn(3, 2, 1, 1), encoder, conditional=True), c),
        "mixture": (mixture(), torch.tensor([1])),
        "fitted flow": (stirred(fitted), torch.tensor([0])),
    }


@pytest.mark.parametrize("name", list(priors()))
@torch.no_grad()
def test_a_density_sums_to_one_and_is_that_of_the_draws(name: str) -> None:
    prior, c = priors()[name]
    side = torch.linspace(-20, 20, 401)
    grid = torch.cartesian_prod(side, side)
    log_p = torch.cat(
        [prior.log_prob(u, None if c is None else c.expand(len(u), *c.shape[1:])) for u in grid.split(16384)]
    )
    mass = log_p.double().exp() * 0.1**2
    assert float(mass.sum()) == pytest.approx(1, abs=2e-3)
    n = 40_000
    u = prior.sample(n, None if c is None else c.expand(n, *c.shape[1:]), generator=torch.Generator().manual_seed(0))
    mean = (mass[:, None] * grid).sum(0)
    covariance = (mass[:, None] * (grid - mean)).T @ (grid - mean).double()
    scale = float(covariance.diagonal().sqrt().max())
    torch.testing.assert_close(u.double().mean(0), mean, atol=0.03 * scale, rtol=0)
    torch.testing.assert_close(u.double().T.cov(), covariance, atol=0.05 * scale**2, rtol=0)


@pytest.mark.parametrize("name", list(priors()))
@torch.no_grad()
def test_a_draw_depends_on_its_own_numbers_alone(name: str) -> None:
    prior, c = priors()[name]
    noise, choice = torch.randn(5, 2), torch.rand(5)
    of_all = prior.draw(noise, choice, None if c is None else c.expand(5, *c.shape[1:]))
    torch.testing.assert_close(of_all[3:4], prior.draw(noise[3:4], choice[3:4], c))
    cold = prior.draw(noise, torch.full((5,), 0.5), None if c is None else c.expand(5, *c.shape[1:]), temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand(5, 2))


def test_priors_begin_as_the_standard_normal() -> None:
    u, c = torch.randn(4, 3), torch.randn(4, 2)
    expected = StandardNormal(3).log_prob(u)
    torch.testing.assert_close(expected, Normal(0.0, 1.0).log_prob(u).sum(1))
    torch.testing.assert_close(ConditionalGaussian(3, 2).log_prob(u, c), expected)
    torch.testing.assert_close(FlowPrior(3, 2, FlowSize(width=8)).log_prob(u, c), expected)


def test_the_conditional_gaussian_gives_a_kl_whose_gradient_reaches_the_condition() -> None:
    prior = stirred(ConditionalGaussian(3, 2, 8))
    c = torch.randn(4, 2, requires_grad=True)
    Gaussian.standard(torch.zeros(4, 3)).kl(prior.gaussian(c)).sum().backward()
    assert c.grad is not None
    assert float(c.grad.abs().min()) > 0


@pytest.mark.parametrize("conditional", [False, True])
def test_a_vamp_prior_is_the_mean_of_the_posteriors_of_its_latents(conditional: bool) -> None:
    torch.manual_seed(0)
    encoder, start = Encoder(), torch.randn(3, 2, 1, 1)
    prior = VampPrior(2, start, encoder, conditional=conditional)
    u, c = torch.randn(4, 2), torch.randn(4, 2)
    for row in range(4):
        q = encoder(start, c[row : row + 1].expand(3, 2) if conditional else None)
        by_torch = Independent(Normal(q.mean, torch.exp(0.5 * q.logvar)), 1)
        expected = MixtureSameFamily(Categorical(torch.ones(3)), by_torch).log_prob(u[row])
        torch.testing.assert_close(prior.log_prob(u, c)[row], expected)
    prior.log_prob(u, c).sum().backward()
    assert prior.pseudo.grad is not None
    assert float(prior.pseudo.grad.abs().min()) > 0
    assert encoder.linear.weight.grad is not None  # it reaches the encoder, which stays another's
    assert list(prior.state_dict()) == ["pseudo"]


def test_a_mixture_is_that_of_torch_with_the_weights_of_the_class() -> None:
    prior, u = mixture(), 3 * torch.randn(5, 2)
    for label, used in ((0, [0, 1]), (1, [1, 2]), (2, [0, 1, 2])):  # torch takes a weight of 0 for a small one
        components = MultivariateNormal(prior.means[used], scale_tril=prior.cholesky[used])
        expected = MixtureSameFamily(Categorical(prior.log_weights[label, used].exp()), components).log_prob(u)
        torch.testing.assert_close(prior.log_prob(u, torch.full((5,), label)), expected)
    torch.testing.assert_close(prior.log_prob(u), prior.log_prob(u, torch.full((5,), 2)))
    drawn = prior.draw(torch.zeros(4, 2), torch.tensor([0.0, 0.49, 0.51, 0.999999]), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(drawn, prior.means[[0, 0, 1, 1]])  # the third has the weight 0 in class 0
    with pytest.raises(ValueError, match=r"labels: expected \(5,\) in 0 .. 2, got \(5,\) \[3, 3, 3, 3\]"):
        prior.log_prob(u, torch.full((5,), 3))


@pytest.mark.parametrize("name", ["mixture", "fitted flow"])
def test_a_fitted_prior_comes_back_from_tensors_and_plain_values(name: str) -> None:
    prior, c = priors()[name]
    assert isinstance(prior, FittedPrior)
    config, tensors = json.loads(json.dumps(prior.config())), prior.state_dict()
    again, u = restore(config, tensors), torch.randn(3, 2)
    assert c is not None
    assert torch.equal(again.log_prob(u, c.expand(3)), prior.log_prob(u, c.expand(3)))
    for damage in ({"kind": "forest"}, {"n_units": 3}, {"surplus": 1}):
        with pytest.raises(ModelError, match=r"\Aruns/x: [^\n]+\Z"):
            restore(config | damage, tensors, "runs/x")
    with pytest.raises(ModelError, match=r"runs/x: config and tensors are no fitted prior"):
        restore(config, {"mean": torch.zeros(2)}, "runs/x")


def test_samples_come_from_the_generator_alone() -> None:
    prior = mixture()
    first, second = (prior.sample(8, generator=torch.Generator().manual_seed(3), temperature=0.5) for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"n = 2, expected one condition for each, got 1"):
        prior.sample(2, torch.tensor([0]))
    log_p = float(StandardNormal(2).log_prob(StandardNormal(2).sample(1, temperature=0.0)))
    assert log_p == pytest.approx(-math.log(2 * math.pi))
