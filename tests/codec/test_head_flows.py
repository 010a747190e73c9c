"""Gaussians and flows of the head's units, against Monte Carlo and autograd."""

import pytest
import torch
from torch.func import jacrev

from codec.head.flows import LOG_SCALE, AutoregressiveFlow, CouplingFlow, Flow, FlowSize, draw
from codec.head.gaussian import LEAST_LOGVAR, Gaussian, total

N_UNITS, N_CONTEXT = 5, 3
KINDS = [AutoregressiveFlow, CouplingFlow]


def made(kind: type[AutoregressiveFlow] | type[CouplingFlow], scale: float = 0.5) -> Flow:
    """A flow in float64 that is far from the identity."""
    torch.manual_seed(0)
    flow = kind(N_UNITS, N_CONTEXT, FlowSize(steps=4, width=16)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += scale * torch.randn_like(parameter)
    return flow


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, N_UNITS, dtype=torch.float64), torch.randn(n, N_CONTEXT, dtype=torch.float64)


def test_kl_and_density_are_those_of_torch_and_of_monte_carlo() -> None:
    torch.manual_seed(0)
    q, p = (Gaussian(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)) for _ in range(2))
    of_torch = [torch.distributions.Normal(each.mean, torch.exp(0.5 * each.logvar)) for each in (q, p)]
    standard = torch.distributions.Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    torch.testing.assert_close(q.kl(p), torch.distributions.kl_divergence(*of_torch))
    torch.testing.assert_close(q.kl(), torch.distributions.kl_divergence(of_torch[0], standard))
    torch.testing.assert_close(q.kl(Gaussian.standard(q.mean)), q.kl())
    u = q.at(torch.randn(200_000, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(p.log_prob(u), of_torch[1].log_prob(u))
    torch.testing.assert_close((q.log_prob(u) - p.log_prob(u)).mean(0), q.kl(p), rtol=0.02, atol=0.02)
    assert total(q.kl(p)).shape == (2,)


def test_a_draw_is_differentiable_and_its_temperature_scales_the_noise_alone() -> None:
    q = Gaussian(torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 2.0]], requires_grad=True))
    noise = torch.tensor([[3.0, -1.0]])
    assert q.at(noise, 0.5).tolist() == [[2.5, pytest.approx(2 - 0.5 * 2.718281828)]]
    assert q.at(noise, 0.0).tolist() == q.at(None).tolist() == [[1.0, 2.0]]
    q.at(noise).sum().backward()
    assert q.mean.grad is not None
    assert q.mean.grad.tolist() == [[1, 1]]
    assert q.logvar.grad is not None
    assert q.logvar.grad.tolist() == [[1.5, pytest.approx(-0.5 * 2.718281828)]]


def test_what_a_network_says_is_clamped_and_computed_in_float32() -> None:
    q = Gaussian.of(torch.tensor([[1.0, -500.0]], dtype=torch.bfloat16))
    assert (q.mean.dtype, q.logvar.item()) == (torch.float32, LEAST_LOGVAR)
    assert bool(torch.isfinite(q.kl()).all())


@pytest.mark.parametrize("kind", KINDS)
def test_log_det_is_that_of_autograds_jacobian(kind: type) -> None:
    flow, (u, context) = made(kind), batch()
    _, log_det = flow(u, context)
    for row in range(len(u)):
        jacobian = jacrev(lambda v, c=context[row : row + 1]: flow(v[None], c)[0][0])(u[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian)[1])
    assert log_det.std() > 0.1  # it depends on u


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_inverse_undoes_the_flow_and_its_log_det(kind: type) -> None:
    flow, (u, context) = made(kind), batch()
    there, log_det = flow(u, context)
    back, log_det_back = flow.inverse(there, context)
    assert float((there - u).abs().max()) > 0.5
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(log_det_back, -log_det)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_context", [0, 2])
def test_a_new_flow_is_the_identity_and_can_leave_it(kind: type, n_context: int) -> None:
    flow = kind(N_UNITS, n_context, FlowSize(width=8))
    u, context = torch.randn(3, N_UNITS), torch.randn(3, n_context) if n_context else None
    found, log_det = flow(u, context)
    assert torch.equal(found, u)
    assert log_det.tolist() == [0, 0, 0]
    (found.square().sum() + log_det.sum()).backward()
    assert all(float(step_last.grad.abs().max()) > 0 for name, step_last in flow.named_parameters() if "last" in name)


def test_a_step_of_an_iaf_sees_the_units_before_and_the_next_step_those_after() -> None:
    flow, (u, context) = made(AutoregressiveFlow), batch(1)
    for number, step in enumerate(flow.steps):
        jacobian = jacrev(lambda v, step=step: step(v[None], context)[0][0])(u[0])
        other_side = torch.triu(jacobian, 1) if number % 2 == 0 else torch.tril(jacobian, -1)
        assert not bool(other_side.any())
        assert int((jacobian != 0).sum()) == N_UNITS * (N_UNITS + 1) // 2  # and everything that it may
        of_context = jacrev(lambda c, step=step: step(u, c[None])[0][0])(context[0])
        assert bool((of_context != 0).all())


def test_couplings_change_every_unit_and_part_any_two() -> None:
    flow = CouplingFlow(6, 0, FlowSize(steps=6, width=4))
    changed = torch.stack([step.changed for step in flow.steps])  # type: ignore[union-attr]
    assert bool((changed[0] + changed[1] == 1).all())
    apart = (changed[:, :, None] != changed[:, None]).any(0)
    assert bool((apart | torch.eye(6, dtype=torch.bool)).all())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scales_stay_bounded_whatever_comes_in(kind: type) -> None:
    flow = made(kind, scale=100.0).float()
    u, context = (1e3 * part.float() for part in batch())
    _, log_det = flow(u, context)
    assert bool(torch.isfinite(log_det).all())
    assert float(log_det.abs().max()) <= 4 * N_UNITS * LOG_SCALE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_autocast_does_not_reach_the_flow(kind: type) -> None:
    flow = made(kind).float()
    u, context = (part.float() for part in batch())
    expected = flow(u, context)
    with torch.autocast("cpu", torch.bfloat16):
        found = flow(u, context)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert flow(u.bfloat16(), context.bfloat16())[0].dtype == torch.float32


def test_the_density_of_a_flow_posterior_is_that_of_its_draws() -> None:
    flow, (_, context) = made(AutoregressiveFlow), batch()
    q = Gaussian(*torch.randn(2, 4, N_UNITS, dtype=torch.float64).unbind())
    noise = torch.randn(4, N_UNITS, dtype=torch.float64)
    u, log_q = draw(q, noise, flow, context)
    before, log_det = flow.inverse(u, context)
    torch.testing.assert_close(log_q, total(q.log_prob(before)) + log_det)
    u, log_q = draw(q, noise)
    torch.testing.assert_close(log_q, total(q.log_prob(u)))


def test_sizes_that_do_not_fit_are_named() -> None:
    flow = CouplingFlow(4, 2, FlowSize(width=8))
    with pytest.raises(ValueError, match=r"u \(B, 4\) and 2 numbers of context, got \(3, 5\) and 0"):
        flow(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"n_units = 1, allowed: >= 2"):
        CouplingFlow(1, 0, FlowSize())
    with pytest.raises(ValueError, match=r"steps = 0, allowed: >= 1"):
        FlowSize(steps=0)
    single = AutoregressiveFlow(1, 2, FlowSize(width=8))  # of one unit, what is left is an affine map of the context
    assert single(torch.ones(3, 1), torch.ones(3, 2))[0].tolist() == [[1]] * 3
