"""ELBO and IWAE bound on a linear Gaussian model, whose likelihood is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from codec.head.flows import AutoregressiveFlow, FlowSize
from codec.head.gaussian import Gaussian, standard_log_prob
from train.head.bounds import Bounds, bounds, draws_of, per_row

W = torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, -1.0]])
SIGMA = 0.6


def model(n: int) -> tuple[torch.Tensor, torch.Tensor, Gaussian]:
    """z of u ~ N(0, I), z|u ~ N(W u, SIGMA^2 I); their exact log-likelihood; a posterior that is a little wrong."""
    torch.manual_seed(0)
    z = torch.randn(n, 2) @ W.T + SIGMA * torch.randn(n, 3)
    exact = MultivariateNormal(torch.zeros(3), W @ W.T + SIGMA**2 * torch.eye(3)).log_prob(z)
    precision = torch.eye(2) + W.T @ W / SIGMA**2
    mean = z @ W @ torch.linalg.inv(precision).T / SIGMA**2
    return z, exact, Gaussian(mean + 0.2, torch.full((n, 2), math.log(0.5)))


def log_likelihood(u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return Normal(u @ W.T, SIGMA).log_prob(z).sum(-1)


def log_prior(u: torch.Tensor) -> torch.Tensor:
    return standard_log_prob(u).sum(-1)


def measured(k: int, chunk: int = 64, n: int = 2000) -> tuple[Bounds, torch.Tensor]:
    z, exact, q = model(n)
    torch.manual_seed(1)
    return bounds(draws_of(q), per_row(log_likelihood, z), log_prior, k, chunk), exact


def test_elbo_is_below_iwae_which_grows_with_k_up_to_the_likelihood() -> None:
    found = {k: measured(k)[0] for k in (1, 4, 16, 256)}
    exact = measured(1)[1].mean().item()
    iwae = [found[k].iwae.mean().item() for k in found]
    assert all(later - earlier > 0.01 for earlier, later in pairwise(iwae))
    assert iwae[-1] == pytest.approx(exact, abs=0.02)
    assert iwae[0] == found[1].elbo.mean().item()
    _, _, q = model(2000)
    precision = torch.eye(2) + W.T @ W / SIGMA**2
    true = MultivariateNormal(q.mean - 0.2, precision_matrix=precision)
    guess = MultivariateNormal(q.mean, scale_tril=torch.exp(0.5 * q.logvar).diag_embed())
    gap = torch.distributions.kl_divergence(guess, true).mean().item()  # what the ELBO lacks, exactly
    assert found[256].elbo.mean().item() == pytest.approx(exact - gap, abs=0.02)
    assert bool((found[16].elbo <= found[16].iwae).all())


def test_the_true_posterior_needs_one_draw() -> None:
    z = torch.tensor([[0.5], [-1.0]])  # z|u ~ N(u, 1): the posterior is N(z / 2, 1/2)
    q = Gaussian(z / 2, torch.full((2, 1), math.log(0.5)))
    u = q.at(torch.randn(3, 2, 1))
    found = bounds(
        lambda n: (u, q.log_prob(u).sum(-1)),
        per_row(lambda u, z: Normal(u, 1.0).log_prob(z).sum(-1), z),
        log_prior,
        3,
    )
    expected = Normal(0.0, math.sqrt(2)).log_prob(z[:, 0]).tolist()
    assert found.elbo.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.iwae.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.effective.tolist() == pytest.approx([3, 3], abs=1e-4)


def test_chunks_change_nothing_but_the_memory() -> None:
    torch.manual_seed(2)
    kept = draws_of(model(5)[2])(10)
    z, at = model(5)[0], 0

    def draws(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal at
        at += n
        return kept[0][at - n : at], kept[1][at - n : at]

    whole = bounds(draws, per_row(log_likelihood, z), log_prior, 10, 10)
    at = 0
    parts = bounds(draws, per_row(log_likelihood, z), log_prior, 10, 3)
    torch.testing.assert_close(whole.iwae, parts.iwae)
    assert at == 10
    assert bool(((parts.effective >= 1) & (parts.effective <= 10)).all())


def test_a_density_that_is_not_summed_is_named() -> None:
    z, _, q = model(5)
    with pytest.raises(ValueError, match=r"expected u \(2, B, ...\) and log-densities \(2, B\), got"):
        bounds(draws_of(q), per_row(log_likelihood, z), standard_log_prob, 2)
    with pytest.raises(ValueError, match=r"k = 0"):
        bounds(draws_of(q), per_row(log_likelihood, z), log_prior, 0)


def test_a_flow_behind_the_posterior_counts() -> None:
    z, exact, q = model(400)
    flow = AutoregressiveFlow(2, 3, FlowSize(steps=2, width=8))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    generator = torch.Generator().manual_seed(0)
    found = bounds(draws_of(q, flow, z, generator), per_row(log_likelihood, z), log_prior, 256)
    assert found.iwae.mean().item() == pytest.approx(exact.mean().item(), abs=0.1)
    again = draws_of(q, flow, z, torch.Generator().manual_seed(0))(3)
    assert torch.equal(again[0], draws_of(q, flow, z, torch.Generator().manual_seed(0))(3)[0])
    back, log_det = flow.inverse(again[0][2], z)
    torch.testing.assert_close(again[1][2], q.log_prob(back).sum(1) + log_det)
