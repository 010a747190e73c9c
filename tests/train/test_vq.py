"""The quantisers themselves: gradients, statistics over ranks, revival, usage."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import nn

from codec import fsq
from codec.adapters import CodebookModel
from codec.errors import UsageError
from train.averaging import averaged
from train.config import ModelConfig
from train.loss_config import HealthConfig
from train.module import AutoencoderModule, Draws
from train.networks import build_network
from train.task import Step, Values
from train.vq.config import VQConfig
from train.vq.kmeans import kmeans, nearest
from train.vq.lattice import FSQ, LFQ, corners, whiten
from train.vq.learned import SimVQCodebook
from train.vq.quantiser import Quantiser, rotated_through, straight_through
from train.vq.terms import CodebookTerms, build_quantiser
from train.vq.tokens import Extent, StepTokens
from train.vq.usage import CodeCounts

KINDS = {
    "ema": VQConfig(codebook_size=8, start="0"),
    "ema cosine": VQConfig(codebook_size=8, start="0", cosine=True),
    "gradient": VQConfig(kind="gradient", codebook_size=8, start="0", rotation_trick=True),
    "simvq": VQConfig(kind="simvq", codebook_size=8, start="0"),
    "fsq": VQConfig(kind="fsq", codebook_size=12, fsq_levels=(4, 3)),
    "lfq": VQConfig(kind="lfq", codebook_size=16),
}
WHOLE = Extent(n_images=1, n_tokens=1, rank=0, n_ranks=1)


def tiny(vq: VQConfig, channels: int = 3, seed: int = 0) -> CodebookModel:
    torch.manual_seed(seed)
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return CodebookModel(
        build_network(ModelConfig(family="vq", latent_channels=channels, mid_block_add_attention=False, **shape), vq=vq)
    )


def quantiser_of(vq: VQConfig, model: CodebookModel) -> Quantiser:
    return build_quantiser(vq, model, trained=False, trains=True)


def step_at(number: int, first: int = 0, size: int = 2, images: int | None = None, share: float = 0.5) -> Step:
    start = first if images is None else images
    return Step(
        number=number, images=start, share=share, seed=7, positions=range(first, first + size), autocast=nullcontext
    )


def latents(seed: int, n: int = 2, channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Learner:
    """One rank's quantiser with its vectors, without a network around."""

    def __init__(self, vq: VQConfig, channels: int = 3) -> None:
        self.model = tiny(vq, channels)
        self.quantiser = quantiser_of(vq, self.model)
        self.weight = self.model.codebook
        self.tokens = StepTokens()
        self.lines: list[str] = []

    def see(self, z: torch.Tensor, positions: range) -> None:
        codes = self.quantiser(z, self.weight)
        self.tokens.add(codes.z, codes.indices, positions, codes.frequencies)

    def learn(self, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor] = alone) -> Values:
        values: Values = {}
        self.lines = self.quantiser.update(self.weight, self.tokens, step, reduce, values)
        self.tokens.clear()
        return values

    def state(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach(), **self.quantiser.state_dict()}


def started(vq: VQConfig, channels: int = 3) -> Learner:
    learner = Learner(vq, channels)
    learner.see(latents(0, channels=channels), range(2))
    learner.learn(step_at(0))
    assert bool(learner.quantiser.started)
    return learner


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_image_passes_the_quantiser_to_the_encoder(kind: str) -> None:
    model = tiny(vq := KINDS[kind], channels=4)
    quantiser = quantiser_of(vq, model)
    quantiser.started.fill_(True)
    if isinstance(quantiser, SimVQCodebook):
        model.codebook.data.copy_(quantiser._vectors(model.codebook))
    module = AutoencoderModule(model.network, quantisers=[quantiser])
    out = module(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1, Draws())
    (codes,) = out.codes
    assert torch.equal(codes.z_q, model.codebook[codes.indices].movedim(-1, 1))  # to the bit
    assert torch.allclose(model.decode_indices(codes.indices), out.x_hat, atol=1e-6)
    out.x_hat.square().sum().backward()
    assert float(model.network.encoder.conv_in.weight.grad.abs().sum()) > 0
    vectors = [model.codebook, *quantiser.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in vectors)  # which learn by the codebook's loss alone


def test_straight_through_gives_the_vectors_and_passes_the_gradient_as_it_is() -> None:
    z, z_q = latents(0).requires_grad_(), latents(1)
    out = straight_through(z, z_q)
    assert torch.equal(out, z_q)
    (gradient,) = torch.autograd.grad(out, z, weight := latents(2))
    assert torch.equal(gradient, weight)


def test_the_rotation_trick_turns_the_gradient_as_the_latent_is_turned() -> None:
    z, z_q = latents(0).requires_grad_(), latents(1)
    out = rotated_through(z, z_q)
    assert torch.equal(out, z_q)
    # Fifty et al.: the map from z to z_q has z_q = A z, A a rotation times a length; the gradient is A^T g.
    (along,) = torch.autograd.grad(out, z, z_q, retain_graph=True)
    scale = z_q.norm(dim=1, keepdim=True) / z.detach().norm(dim=1, keepdim=True)
    assert torch.allclose(along, scale**2 * z.detach(), atol=1e-5)
    (gradient,) = torch.autograd.grad(out, z, weight := latents(2))
    assert torch.allclose(gradient.norm(dim=1), (scale * weight).norm(dim=1), atol=1e-4)
    opposed = rotated_through(z, -2 * z.detach())  # no such turn: straight
    assert torch.equal(torch.autograd.grad(opposed, z, weight)[0], weight)


def difference(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, direction: torch.Tensor) -> float:
    """The derivative of a function along a direction, by central differences."""
    return float(loss(at + 1e-3 * direction) - loss(at - 1e-3 * direction)) / 2e-3


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_commitment_moves_latents_and_the_codebook_term_vectors(beta: float) -> None:
    """By finite differences of the two terms, each with its other side held."""
    vq = VQConfig(kind="gradient", codebook_size=8, start="0", beta=beta, weight=3.0)
    learner = started(vq)
    z, weight = latents(3).requires_grad_(), learner.weight
    codes = learner.quantiser(z, weight)
    at_z, at_weight = torch.autograd.grad(codes.terms["vq"], (z, weight))
    chosen, held = weight.detach()[codes.indices].movedim(-1, 1), z.detach()
    direction, direction_w = latents(4), torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))

    def commitment(moved: torch.Tensor) -> torch.Tensor:
        return 3 * beta * F.mse_loss(moved, chosen)

    def codebook(moved: torch.Tensor) -> torch.Tensor:
        return 3 * F.mse_loss(moved[codes.indices].movedim(-1, 1), held)

    assert float((at_z * direction).sum()) == pytest.approx(difference(commitment, held, direction), rel=1e-2)
    expected = difference(codebook, weight.detach(), direction_w)
    assert float((at_weight * direction_w).sum()) == pytest.approx(expected, rel=1e-2)


def test_of_running_means_only_the_commitment_has_a_gradient() -> None:
    learner = started(VQConfig(codebook_size=8, start="0", beta=0.5))
    z = latents(3).requires_grad_()
    codes = learner.quantiser(z, learner.weight)
    assert not learner.weight.requires_grad
    (gradient,) = torch.autograd.grad(codes.terms["commitment"], z)
    assert torch.allclose(gradient, 2 * 0.5 * (z - codes.z_q).detach() / z.numel())


def test_the_entropy_loss_wants_sure_latents_and_all_corners() -> None:
    quantiser = LFQ(VQConfig(kind="lfq", codebook_size=8, beta=0.0, entropy_weight=1.0), 8, trains=True)
    z = latents(0, channels=3).requires_grad_()
    batch, unsure = quantiser._soft(z)
    flat = z.detach().movedim(1, -1).reshape(-1, 3)
    p = torch.softmax(2 * flat @ corners(3).T, dim=1)  # the definition, over all corners at once
    assert torch.allclose(batch, p.mean(0), atol=1e-6)
    assert float(unsure.detach()) == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    (gradient,) = torch.autograd.grad(unsure, z)
    assert torch.equal(torch.sign(gradient), -torch.sign(z.detach()))  # going down, each latent leaves 0
    # Once one corner is frequent, going down leads away from it.
    crowd = torch.full((1, 3, 4, 4), 0.3).requires_grad_()
    quantiser.frequencies.copy_(quantiser._soft(crowd)[0].detach())
    codes = quantiser(crowd, corners(3))
    (spread,) = torch.autograd.grad(codes.terms["entropy"] - quantiser._soft(crowd)[1], crowd)
    assert bool((spread > 0).all())


def test_fsq_draws_back_latents_that_its_squashing_has_no_gradient_for() -> None:
    vq = KINDS["fsq"]
    quantiser = FSQ(vq, vq.fsq_levels, vq.codebook_size, trains=True)
    z = torch.tensor([-9.0, -0.3, 0.3, 9.0]).reshape(1, 1, 2, 2).repeat(1, 2, 1, 1).requires_grad_()
    codes = quantiser(z, fsq.codebook(vq.fsq_levels))
    (through,) = torch.autograd.grad(codes.z_q.sum(), z, retain_graph=True)
    (back,) = torch.autograd.grad(codes.terms["commitment"], z)
    far = z.detach().abs() > 1
    assert bool((through[far] < 1e-6).all())
    assert bool((through[~far] > 0.1).all())
    assert torch.equal(back.sign(), torch.where(far, z.detach().sign(), 0.0))
    assert not FSQ(vq, vq.fsq_levels, vq.codebook_size, trains=False)(z, fsq.codebook(vq.fsq_levels)).terms


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_the_spread_loss_of_fsq_wants_independent_latents_of_variance_1(size: float) -> None:
    """Through the batch's own moments, weighted by the distance of the running ones."""
    vq = replace(KINDS["fsq"], spread_weight=0.5)
    learner = Learner(vq, 4)
    z = size * latents(0, channels=2)
    z[:, 1] = 0.8 * z[:, 0] + 0.2 * z[:, 1]
    for number in range(200):
        learner.see(z, range(2))
        learner.learn(step_at(number))
    flat = torch.cat([fsq.centred(z, vq.fsq_levels).movedim(1, -1).reshape(-1, 2), torch.ones(z[:, 0].numel(), 1)], 1)
    moments = flat.T @ flat / len(flat)
    torch.testing.assert_close(learner.quantiser.moments, moments, rtol=1e-4, atol=1e-4)
    z = z.requires_grad_()
    term = learner.quantiser(z, learner.weight).terms["spread"]
    assert term.item() == pytest.approx(0.5 * 0.5 * float((moments - torch.eye(3)).square().sum()) / 2, rel=1e-3)
    (gradient,) = torch.autograd.grad(term, z)
    after = (z - 0.1 * len(flat) * gradient).detach()
    off = [float((torch.cov(each.movedim(1, 0).flatten(1)) - torch.eye(2)).norm()) for each in (z.detach(), after)]
    assert off[1] < off[0]
    grows = (gradient * fsq.centred(z, vq.fsq_levels)).sum() < 0
    assert bool(grows) == (size < 1)


def test_an_fsq_run_from_before_there_were_moments_is_loaded() -> None:
    vq = KINDS["fsq"]
    quantiser = FSQ(vq, vq.fsq_levels, vq.codebook_size, trains=True)
    state = quantiser.state_dict()
    del state["moments"]
    quantiser.load_state_dict(state)
    assert torch.equal(quantiser.moments, torch.eye(3))


def test_latents_that_are_not_finite_reach_the_loss_and_not_an_index() -> None:
    vq = KINDS["fsq"]
    z = latents(0, channels=2)
    z[0, 0, 0, 0] = float("nan")
    codes = FSQ(vq, vq.fsq_levels, vq.codebook_size, trains=True)(z, fsq.codebook(vq.fsq_levels))
    assert 0 <= int(codes.indices.min()) <= int(codes.indices.max()) < vq.codebook_size
    assert codes.z_q.isnan().sum() == 1
    assert codes.terms["commitment"].isnan()


def test_lfq_splits_many_bits_into_groups() -> None:
    quantiser = LFQ(VQConfig(kind="lfq", codebook_size=1 << 13), 1 << 13, trains=True)
    batch, unsure = quantiser._soft(latents(0, channels=13))
    assert quantiser.frequencies.shape == batch.shape == (2**7 + 2**6,)
    assert float(batch.sum()) == pytest.approx(2, rel=1e-5)
    assert 0 < float(unsure) < 13 * np.log(2)


# --- indices: what diffusers makes of them --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_indices_are_those_of_the_adapter_and_but_for_fsq_those_of_diffusers(kind: str) -> None:
    model = tiny(vq := KINDS[kind], channels=4)
    learner = Learner(vq, 4)
    learner.see(z := 0.7 * latents(0, channels=model.channels), range(2))
    learner.learn(step_at(0))
    codes = learner.quantiser(z, learner.weight)
    assert torch.equal(codes.indices, learner.model.quantise(z))
    assert torch.equal(codes.z_q, learner.weight[codes.indices].movedim(-1, 1))
    _, _, (_, _, theirs) = learner.model.network.quantize(z)
    assert torch.equal(theirs.reshape(codes.indices.shape), codes.indices) == (kind != "fsq")
    assert len(codes.indices.unique()) > 3


def test_latents_of_another_width_are_refused() -> None:
    learner = Learner(VQConfig(codebook_size=8))
    with pytest.raises(ValueError, match=r"\(2, 5, 8, 8\), expected \(B, 3, h, w\)"):
        learner.quantiser(latents(0, channels=5), learner.weight)


# --- k-means --------------------------------------------------------------------------------------------------------


def test_kmeans_finds_clusters() -> None:
    rng = np.random.default_rng(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    pool = (middles[:, None] + 0.1 * torch.randn(3, 50, 2)).reshape(-1, 2)
    best = min(
        float((pool - (centres := kmeans(pool, 4, 20, rng, WHOLE, alone)[0])[nearest(pool, centres)]).square().mean())
        for _ in range(8)
    )
    assert best < 0.02
    unit, _ = kmeans(F.normalize(pool + 1, dim=1), 4, 5, rng, WHOLE, alone, unit=True)
    assert torch.allclose(unit.norm(dim=1), torch.ones(4))


def test_a_codebook_larger_than_the_latents_seen_is_filled_and_said() -> None:
    learner = Learner(VQConfig(codebook_size=300, start="0"))
    learner.see(latents(0), range(2))  # 128 latents
    learner.learn(step_at(0))
    (line,) = learner.lines
    assert "300 vectors by k-means of 128 latents, of which only " in line
    assert "a smaller vq.codebook_size" in line
    assert len(learner.weight.unique(dim=0)) > 290
    assert torch.isfinite(learner.weight).all()


def test_until_the_start_latents_pass_and_the_newest_are_kept() -> None:
    learner = Learner(VQConfig(codebook_size=8, kmeans_tokens=20, start="6"))
    before = learner.weight.clone()
    for n in range(3):
        z = latents(n)
        codes = learner.quantiser(z, learner.weight)
        assert codes.indices is None
        assert torch.equal(codes.z_q, z)
        learner.see(z, range(2 * n, 2 * n + 2))
        learner.learn(step_at(n, 2 * n, share=0.0))
        assert learner.lines == []
        assert torch.equal(learner.weight, before)
    assert learner.quantiser.pool.shape == (160, 3)  # of 3 x 128
    newest = latents(2).movedim(1, -1).reshape(-1, 3)
    assert all(bool((newest == row).all(1).any()) for row in learner.quantiser.pool[-128:])
    learner.see(latents(3), range(6, 8))
    learner.learn(step_at(3, 6, share=0.0))
    (line,) = learner.lines
    assert line == "codebook: 8 vectors by k-means of 160 latents"
    assert bool(learner.quantiser.started)
    assert learner.quantiser.pool.shape == (0, 3)


def test_simvq_begins_with_mean_and_covariance_of_the_latents() -> None:
    learner = Learner(VQConfig(kind="simvq", codebook_size=4096, start="0"))
    z = latents(0, 64) * torch.tensor([1.0, 3.0, 0.2])[:, None, None] + torch.tensor([5.0, 0.0, -1.0])[:, None, None]
    learner.see(z, range(64))
    learner.learn(step_at(0, size=64))
    weight = learner.weight.detach()
    assert torch.allclose(weight.mean(0), torch.tensor([5.0, 0.0, -1.0]), atol=0.2)
    assert torch.allclose(weight.std(0), torch.tensor([1.0, 3.0, 0.2]), rtol=0.1)
    base = learner.quantiser.base.clone()
    codes = learner.quantiser(z, learner.weight)
    grads = torch.autograd.grad(codes.terms["vq"], list(learner.quantiser.parameters()))
    assert all(float(g.abs().sum()) > 0 for g in grads)
    assert torch.equal(learner.quantiser.base, base)


# --- running means, revival -----------------------------------------------------------------------------------------


def test_a_vector_is_the_running_mean_of_the_latents_that_chose_it() -> None:
    learner = started(VQConfig(codebook_size=8, start="0", decay=0.9, revive_below=0.0))
    share, total = torch.full((8,), 1 / 8), learner.weight / 8
    for n in range(1, 4):
        z = latents(n)
        codes = learner.quantiser(z, learner.weight)
        flat, indices = z.movedim(1, -1).reshape(-1, 3), codes.indices.flatten()
        one_hot = F.one_hot(indices, 8).float()
        share = 0.9 * share + 0.1 * one_hot.mean(0)
        total = 0.9 * total + 0.1 * one_hot.T @ flat / len(flat)
        learner.see(z, range(2 * n, 2 * n + 2))
        learner.learn(step_at(n, 2 * n))
        assert torch.allclose(learner.quantiser.share, share, atol=1e-6)
        assert torch.allclose(learner.weight, total / share[:, None], atol=1e-5)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_revival_brings_a_dead_vector_back_and_resets_its_statistics(kind: str) -> None:
    learner = started(VQConfig(kind=kind, codebook_size=8, start="0", decay=0.5, revive_below=0.3))
    with torch.no_grad():
        learner.weight[5] = 100.0  # where no latent ever comes
    if kind == "ema":
        learner.quantiser.total[5] = 100.0 / 8
    revived = []
    for n in range(1, 4):
        learner.see(latents(n), range(2 * n, 2 * n + 2))
        revived.append(learner.learn(step_at(n, 2 * n))["codebook_revived"])
        if revived[-1]:
            break
        assert float(learner.weight[5].detach()[0]) == pytest.approx(100.0)
    assert revived == [0.0, 1.0]  # after two steps its share is a quarter of 1 / K
    assert learner.quantiser.replaced.tolist() == [n == 5 for n in range(8)]
    seen = latents(2).movedim(1, -1).reshape(-1, 3)
    assert bool((seen == learner.weight[5].detach()).all(1).any())
    assert float(learner.quantiser.share[5]) == pytest.approx(1 / 8)
    if kind == "ema":
        assert torch.allclose(learner.quantiser.total[5] * 8, learner.weight[5])
    codes = learner.quantiser(latents(2), learner.weight)
    assert 5 in codes.indices
    learner.see(latents(9), range(20, 22))
    learner.learn(step_at(9, 20))
    assert not learner.quantiser.replaced.any()
    assert float(learner.quantiser.share[5]) > 0.3 / 8


def test_without_revival_a_dead_vector_stays_where_it_is() -> None:
    learner = started(VQConfig(codebook_size=8, start="0", decay=0.0, revive_below=0.0))
    with torch.no_grad():
        learner.weight[5] = 100.0
    learner.see(latents(1), range(2, 4))
    learner.learn(step_at(1, 2))
    assert float(learner.quantiser.share[5]) == 0.0
    assert learner.weight[5].tolist() == [100.0] * 3
    assert torch.isfinite(learner.weight).all()


def test_averages_copy_vectors_that_jump_and_keep_unit_vectors_units() -> None:
    model = tiny(vq := VQConfig(codebook_size=4, start="0", cosine=True))
    module = AutoencoderModule(model.network, quantisers=[quantiser_of(vq, model)])
    module.quantiser.started.fill_(True)
    average = averaged(module, 0.999)
    for _ in range(100):  # the first few averages forget fast
        average.update_parameters(module)
    old = model.codebook.clone()
    with torch.no_grad():
        model.codebook.copy_(F.normalize(-old + 0.1, dim=1))
    module.quantiser.replaced[2] = True
    average.update_parameters(module)
    now = average.module.network.quantize.embedding.weight
    assert torch.allclose(now[2], model.codebook[2], atol=1e-6)
    assert not torch.allclose(now[1], model.codebook[1], atol=1e-2)
    assert torch.allclose(now.norm(dim=1), torch.ones(4))
    assert bool(average.module.quantiser.replaced[2])  # bools are copied


# --- ranks and accumulation -----------------------------------------------------------------------------------------


class Exchange:
    """Averages over threads that stand for ranks."""

    def __init__(self, n: int) -> None:
        self._slots: list[torch.Tensor | None] = [None] * n
        self._barrier = threading.Barrier(n, timeout=5)

    def reduce(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self._slots[rank] = tensor
        self._barrier.wait()
        mean = torch.stack([slot for slot in self._slots if slot is not None]).mean(0)
        self._barrier.wait()
        return mean


LEARNING = ["ema", "ema cosine", "gradient", "simvq", "lfq"]


@pytest.mark.parametrize("kind", LEARNING)
def test_ranks_stay_equal_to_the_bit_through_kmeans_means_and_revival(kind: str) -> None:
    """Two ranks of one batch each, one process of both at once, and one that accumulates them."""
    vq = replace(KINDS[kind], decay=0.5, revive_below=0.9) if kind != "lfq" else KINDS[kind]
    width = 4 if kind == "lfq" else 3
    ranks, whole, accumulating = [Learner(vq), Learner(vq)], Learner(vq), Learner(vq)
    exchange = Exchange(2)
    revived = 0.0
    for n in range(6):
        batches = [0.5 * latents(10 * n + half, channels=width) for half in (0, 1)]
        first = 4 * n
        told: list[Values] = [{}, {}]

        def run(rank: int, first: int = first, batches=batches, n: int = n, told=told) -> None:
            learner = ranks[rank]
            learner.see(batches[rank], range(first + 2 * rank, first + 2 * rank + 2))
            step = step_at(n, first + 2 * rank, images=first)
            told[rank] = learner.learn(step, partial(exchange.reduce, rank))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole.see(torch.cat(batches), range(first, first + 4))
        expected = whole.learn(step_at(n, first, size=4))
        for half in (0, 1):
            accumulating.see(batches[half], range(first + 2 * half, first + 2 * half + 2))
        accumulating.learn(step_at(n, first))
        states = [learner.state() for learner in (*ranks, whole, accumulating)]
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), (name, n)
            for other in states[2:]:
                assert torch.allclose(tensor.float(), other[name].float(), atol=1e-4), (name, n)
        assert told[0] == told[1]
        assert told[0] == pytest.approx(expected)
        revived += expected.get("codebook_revived", 0.0)
    assert (revived > 0) == (kind in ("ema", "ema cosine", "gradient"))


def test_three_ranks_know_how_many_they_are() -> None:
    exchange, found = Exchange(3), [WHOLE] * 3

    def run(rank: int) -> None:
        tokens = StepTokens()
        for micro in (0, 1):  # two accumulated batches of 2 images of 4 x (rank + 1) latents
            first = 100 + (micro * 3 + rank) * 2
            tokens.add(torch.zeros(2, 1, 4, rank + 1), None, range(first, first + 2))
        found[rank] = tokens.extent(step_at(0, 100 + 2 * rank, images=100), lambda t: exchange.reduce(rank, t))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Extent(n_images=12, n_tokens=4 * (4 + 8 + 12), rank=rank, n_ranks=3) for rank in range(3)]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    tokens = StepTokens()
    tokens.add(z := latents(0, 4), None, range(8, 12))
    step = step_at(0, 8, size=4)
    extent = tokens.extent(step, alone)
    drawn = tokens.draw(6, 1, step, extent, alone)
    assert torch.equal(drawn, tokens.draw(6, 1, step, extent, alone))
    assert not torch.equal(drawn, tokens.draw(6, 2, step, extent, alone))
    assert not torch.equal(drawn, tokens.draw(6, 1, replace(step, seed=8), extent, alone))
    per_image = [sum(bool((rows == row).all(1).any()) for row in drawn) for rows in z.flatten(2).movedim(1, -1)]
    assert sorted(per_image) == [1, 1, 2, 2]  # evenly from the images


def test_no_latent_is_drawn_twice_before_all_are() -> None:
    tokens = StepTokens()
    tokens.add(latents(0, 2), None, range(8, 10))
    tokens.add(latents(1, 2), None, range(10, 12))
    step = step_at(0, 8)
    drawn = tokens.draw(4 * 64, 1, step, tokens.extent(step, alone), alone)
    assert len(drawn.unique(dim=0)) == 4 * 64
    assert not torch.equal(drawn[:64], drawn.unique(dim=0)[:64])


# --- usage ----------------------------------------------------------------------------------------------------------


def test_usage_perplexity_and_lengths() -> None:
    counts = CodeCounts.of(torch.tensor([0, 0, 1, 2] * 16), 4)
    figures = counts.figures()
    assert figures["tokens_per_code"] == 16
    assert figures["usage"] == 0.75
    assert figures["perplexity"] == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 0.25 * 2))
    assert counts.bits_under(counts) == pytest.approx(1.5, abs=0.02)
    assert counts.bits_under(CodeCounts(np.array([0, 0, 0, 1000]))) > 9
    few = CodeCounts.of(torch.tensor([0, 3]), 4)
    assert few.figures() == {"tokens_per_code": 0.5, "usage_at_least": 0.5, "perplexity_at_least": 2.0}
    assert (few + counts).n_tokens == 66


def test_low_usage_and_too_few_tokens_are_said() -> None:
    model = tiny(vq := VQConfig(codebook_size=10))
    terms = CodebookTerms(quantiser_of(vq, model), model, HealthConfig(min_usage=0.3))
    assert terms.after_validation({"tokens_per_code": 20, "usage": 0.3, "perplexity": 3}) == []
    (line,) = terms.after_validation({"tokens_per_code": 20, "usage": 0.2, "perplexity": 2})
    assert "low codebook usage: 20.0% of 10 vectors, perplexity 2, on 20 held-out tokens per vector" in line
    (line,) = terms.after_validation({"tokens_per_code": 3, "usage_at_least": 0.2, "perplexity_at_least": 2})
    assert "usage n/a, on 3 held-out tokens per vector at least 20.0%; 16 are needed" in line
    assert terms.after_validation({"psnr": 3.0}) == []


# --- what a recipe may ask for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook_size": 1}, "vq.codebook_size = 1, allowed: >= 2"),
        ({"codebook_size": (1 << 20) + 1}, "allowed: <= 1048576, what the file format can hold"),
        ({"kind": "fsq", "codebook_size": 8, "fsq_levels": (2, 4)}, ">= 3 each"),
        ({"kind": "fsq", "codebook_size": 60, "fsq_levels": (5, 4)}, "60, allowed: 20, the product of vq.fsq_levels"),
        ({"kind": "fsq"}, "a level for each channel"),
        ({"kind": "fsq", "codebook_size": 5, "fsq_levels": (5, 1)}, ">= 3 each"),
        ({"kind": "fsq", "codebook_size": 20, "fsq_levels": (5, 4), "codebook_dim": 8}, "0 or 2, the number of"),
        ({"fsq_levels": (5, 4)}, "empty with vq.kind ema"),
        ({"kind": "lfq", "codebook_size": 1000}, "a power of two"),
        ({"kind": "lfq", "codebook_size": 1 << 20}, "<= 65536"),
        ({"kind": "lfq", "codebook_dim": 8}, "0 or 10, log2"),
        ({"kind": "lfq", "cosine": True}, "vq.cosine = True, allowed: false with vq.kind lfq"),
        ({"kind": "lfq", "rotation_trick": True}, "whose rounding is no turn"),
        ({"kind": "simvq", "cosine": True}, "false with vq.kind simvq"),
        ({"decay": 1.0}, "vq.decay = 1.0"),
        ({"start": "95%"}, "at most 90%"),
        ({"start": "soon"}, "vq.start"),
    ],
)
def test_each_mistake_is_named(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.").replace("(", r"\(")):
        VQConfig(**settings)


def test_vectors_of_a_folder_go_on_only_as_what_they_are() -> None:
    def build(vq: VQConfig, model: CodebookModel) -> Quantiser:
        return build_quantiser(vq, model, trained=True, trains=True)

    plain, lattice = tiny(VQConfig(codebook_size=16), channels=4), tiny(KINDS["fsq"])
    unit = tiny(VQConfig(codebook_size=16, cosine=True), channels=4)
    for kind, words in (("lfq", "not the corners"), ("fsq", "no fsq_levels")):
        with pytest.raises(UsageError, match=words):
            build(replace(KINDS[kind], codebook_size=KINDS[kind].codebook_size), plain)
    with pytest.raises(UsageError, match="cosine false"):
        build(VQConfig(cosine=True), plain)
    with pytest.raises(UsageError, match=r"is of fsq, \[4, 3\]"):
        build(VQConfig(kind="ema"), lattice)
    assert build(VQConfig(cosine=True), unit).started
    assert build(VQConfig(), plain).size == 16  # the folder's, not the recipe's
    assert build(KINDS["lfq"], tiny(KINDS["lfq"])).dim == 4
    assert build(replace(KINDS["fsq"]), lattice).levels == (4, 3)
    one = VQModel(block_out_channels=(32,), num_vq_embeddings=1)
    with pytest.raises(UsageError, match="one vector"):
        build(VQConfig(), CodebookModel(one))


def test_simvq_goes_on_from_vectors_as_they_are() -> None:
    model = tiny(VQConfig(codebook_size=16), channels=4)
    before = model.codebook.detach().clone()
    quantiser = build_quantiser(VQConfig(kind="simvq"), model, trained=True, trains=True)
    assert torch.equal(quantiser._vectors(model.codebook), before)


@pytest.mark.parametrize("kind", ["fsq", "lfq"])
def test_a_lattice_begins_with_white_latents_that_the_decoder_sees_as_before(kind: str) -> None:
    model = tiny(KINDS[kind], channels=4)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        h = model.network.encoder(x)
        z = model.network.quant_conv(h)
        seen = model.network.post_quant_conv(z)
        whiten(model.network, z.movedim(1, 0).flatten(1))
        white = model.network.quant_conv(h)
        again = model.network.post_quant_conv(white)
    flat = white.movedim(1, 0).flatten(1)
    assert torch.allclose(torch.cov(flat, correction=0), torch.eye(model.channels), atol=1e-2)
    assert torch.allclose(flat.mean(1), torch.zeros(model.channels), atol=1e-3)
    assert torch.allclose(seen, again, atol=1e-3)


def test_the_lattice_is_that_of_the_codec() -> None:
    model = tiny(KINDS["fsq"])
    assert model.fsq_levels == (4, 3)
    assert torch.equal(model.codebook.detach(), fsq.codebook((4, 3)))
    assert isinstance(model.codebook, nn.Parameter)
    quantiser_of(KINDS["fsq"], model)
    assert not model.codebook.requires_grad
