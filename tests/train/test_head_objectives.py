"""The terms of a head's objective against hand computation and brute force."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from codec.head.gaussian import Gaussian, standard_log_prob
from train.head.objectives import (
    TotalCorrelationCritic,
    critic_loss,
    decompose,
    log_sample_weights,
    permute_dims,
    total_correlation,
    unit_report,
    weighted_kl,
)
from train.schedules import Moment, kl_factor


def posterior(n: int, n_units: int = 2, seed: int = 0) -> Gaussian:
    torch.manual_seed(seed)
    return Gaussian(torch.randn(n, n_units), torch.randn(n, n_units) - 1)


def test_free_bits_by_hand_and_no_gradient_below_them() -> None:
    kl = torch.tensor([[0.1, 2.0, 0.0], [0.3, 4.0, 0.6]], requires_grad=True)  # means 0.2, 3, 0.3
    assert weighted_kl(kl).item() == pytest.approx(3.5)
    found = weighted_kl(kl, beta=0.5, free_nats=0.25)
    assert found.item() == pytest.approx(0.5 * (0.25 + 3 + 0.3))
    found.backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == [[0, 0.25, 0.25]] * 2
    assert weighted_kl(torch.tensor([[-0.2], [0.1]])).item() == pytest.approx(-0.05)  # a draw's KL may be negative
    assert weighted_kl(torch.ones(2, 3, 4, 4)).item() == 48  # units at positions


def test_beta_anneals_cyclically() -> None:
    # Fu et al. 2019, figure 1: two cycles, half of each growing.
    kl = torch.ones(1, 1)
    found = [
        weighted_kl(kl, beta=4 * kl_factor("cyclical", Moment(), 2, 0.5, 0, share)).item()
        for share in (0, 1 / 8, 0.25, 3 / 8, 0.5, 5 / 8, 1)
    ]
    assert found == pytest.approx([0, 2, 4, 4, 0, 2, 4])


@pytest.mark.parametrize("sampling", ["stratified", "weighted"])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_three_terms_sum_to_the_kl_of_the_draw(sampling: str, conditional: bool) -> None:
    q, prior = posterior(6), posterior(6, seed=1) if conditional else None
    u = q.at(torch.randn(6, 2))
    parts = decompose(u, q, 100, sampling=sampling, prior=prior)  # type: ignore[arg-type]
    log_p = standard_log_prob(u) if prior is None else prior.log_prob(u)
    expected = (q.log_prob(u) - log_p).sum(1).mean()
    torch.testing.assert_close(parts.weighted(), expected)
    weighted = parts.weighted(alpha=0.5, beta=3.0, gamma=2.0)
    by_hand = 0.5 * parts.index_code_mi + 3 * parts.total_correlation + 2 * parts.dimension_kl
    torch.testing.assert_close(weighted, by_hand)


def test_weighted_terms_are_those_of_loops_over_the_batch() -> None:
    n, n_data = 4, 50
    q = posterior(n, 3)
    u = q.at(torch.randn(n, 3))
    density = Normal(q.mean, torch.exp(0.5 * q.logvar))
    mi = tc = dimension = 0.0
    for i in range(n):
        joint = sum(math.exp(float(density.log_prob(u[i])[j].sum())) for j in range(n)) / (n * n_data)
        product = math.prod(
            sum(math.exp(float(density.log_prob(u[i])[j, d])) for j in range(n)) / (n * n_data) for d in range(3)
        )
        mi += (float(density.log_prob(u[i])[i].sum()) - math.log(joint)) / n
        tc += (math.log(joint) - math.log(product)) / n
        dimension += (math.log(product) - float(Normal(0.0, 1.0).log_prob(u[i]).sum())) / n
    parts = decompose(u, q, n_data, sampling="weighted")
    found = [parts.index_code_mi.item(), parts.total_correlation.item(), parts.dimension_kl.item()]
    assert found == pytest.approx([mi, tc, dimension], abs=1e-4)


def test_the_stratified_density_is_without_bias_over_all_batches() -> None:
    n_data, n_batch = 5, 3
    q = posterior(n_data)
    u = q.at(torch.randn(n_data, 2))[0]
    densities = q.log_prob(u).sum(1).double().exp()  # of u_0 under every sample of the data
    weights = log_sample_weights(n_batch, n_data, "stratified").double().exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(n_batch, dtype=torch.float64))
    for place in range(n_batch):  # where in the batch sample 0 stands
        estimates = []
        for others in itertools.permutations(range(1, n_data), n_batch - 1):
            batch = [*others[:place], 0, *others[place:]]
            estimates.append((weights[place] * densities[batch]).sum())
        torch.testing.assert_close(torch.stack(estimates).mean(), densities.mean())
    # Of all samples at once it is no estimate: the order does not matter, and q(u) is the mean over the data.
    exact = log_sample_weights(n_data, n_data, "stratified").double().exp()
    torch.testing.assert_close(exact, torch.full((n_data, n_data), 1 / n_data, dtype=torch.float64))


def test_units_that_say_the_same_have_total_correlation_and_independent_ones_none() -> None:
    torch.manual_seed(0)
    n, sharp = 256, math.log(0.05)
    apart = torch.randn(n, 2)
    for means, expected in ((apart, 0.0), (apart[:, :1].expand(n, 2), -0.5 * math.log(1 - (1 / 1.05) ** 2))):
        q = Gaussian(means, torch.full((n, 2), sharp))
        found = decompose(q.at(torch.randn(n, 2)), q, n).total_correlation.item()
        # n samples in two dimensions take themselves for a little dependent; the closed form is of infinitely many
        assert found == pytest.approx(expected, abs=0.35)


def test_the_number_of_data_must_hold_a_batch() -> None:
    with pytest.raises(ValueError, match=r"n_data = 3, allowed: >= samples of a batch, 4"):
        decompose(torch.zeros(4, 2), posterior(4), 3)
    with pytest.raises(ValueError, match=r"sampling = 'exact'"):
        log_sample_weights(4, 8, "exact")


def test_permuted_units_keep_what_each_holds_and_lose_what_they_share() -> None:
    torch.manual_seed(0)
    u = torch.randn(2000, 1).expand(2000, 3) + 0.01 * torch.randn(2000, 3)
    permuted = permute_dims(u, torch.rand(2000, 3))
    assert torch.equal(permuted.sort(0).values, u.sort(0).values)
    correlation = torch.corrcoef(permuted.T) - torch.eye(3)
    assert float(torch.corrcoef(u.T).min()) > 0.99
    assert float(correlation.abs().max()) < 0.08


def test_a_critic_learns_the_total_correlation() -> None:
    torch.manual_seed(0)
    critic = TotalCorrelationCritic(2, width=32, depth=2)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    rho = 0.9
    mix = torch.linalg.cholesky(torch.tensor([[1, rho], [rho, 1]]))

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        first, second = torch.randn(2, 512, 2) @ mix.T
        together = critic(first)
        return critic_loss(together, critic(permute_dims(second, torch.rand(512, 2)))), total_correlation(together)

    for _ in range(250):
        optimizer.zero_grad()
        losses()[0].backward()
        optimizer.step()
    with torch.no_grad():
        loss, found = (torch.stack(part).mean().item() for part in zip(*(losses() for _ in range(20)), strict=True))
    assert loss < math.log(2) - 0.1
    assert found == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.15)
    assert critic_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))
    u = torch.randn(8, 2, requires_grad=True)
    total_correlation(critic(u)).backward()
    assert u.grad is not None
    assert float(u.grad.abs().max()) > 0


def test_a_collapsed_unit_is_called_collapsed_and_an_active_one_is_not() -> None:
    torch.manual_seed(0)
    n = 500
    mean = torch.stack([torch.randn(n), 0.001 * torch.randn(n), torch.full((n,), 2.0), torch.randn(n)], dim=1)
    logvar = torch.tensor([-3.0, 0.0, -1.0, -3.0]).expand(n, 4)
    q = Gaussian(mean, logvar)
    prior = Gaussian(
        torch.stack([torch.zeros(n)] * 3 + [mean[:, 3]], dim=1), torch.tensor([0, 0, 0, -3.0]).expand(n, 4)
    )
    report = unit_report(q.mean, q.kl(prior))
    assert report.active.tolist() == [True, False, False, True]
    # The third differs from the prior, but in the same way for all; the fourth says what its condition says.
    assert report.collapsed.tolist() == [False, True, True, True]
    assert not report.posterior_collapse
    assert report.variance[0].item() == pytest.approx(mean[:, 0].var(correction=0).item())
    assert report.kl[2].item() == pytest.approx(0.5 * (4 + math.exp(-1)), abs=1e-5)
    assert unit_report(mean[:, 1:], q.kl(prior)[:, 1:]).posterior_collapse
    with pytest.raises(ValueError, match=r"got \(500, 4\) and \(500, 3\)"):
        unit_report(mean, mean[:, :3])
