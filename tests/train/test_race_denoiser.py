"""The denoiser of a race and its task: the maths of the flow, equal weights, a feed by position, and that it learns."""

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from codec.rectified_flow import bound_times, density_bound, guided, mix, sample, training_times
from train.config import OptimConfig, RunConfig
from train.denoiser import DenoiserConfig, DenoiserModule, DenoiserRun, DenoiserTask, build_network, measure
from train.denoiser_feed import LatentFeed, LatentSet
from train.denoiser_flow import marginal_velocity, measured_times
from train.trainer import Trainer

TINY = DenoiserConfig(width=32, depth=1)


def latents_of(n: int, *, flat: bool, seed: int = 0, std: float | None = None) -> LatentSet:
    """Latents (3, 4, 4) of deviation 1: white noise, or the same number all over a channel."""
    rng = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, 2, 3, 4, 4, generator=rng)
    if flat:
        mean = mean[..., :1, :1].expand_as(mean).clone()
    return LatentSet(
        keys=[f"{seed}-{k}" for k in range(n)],
        labels=torch.arange(n) % 2,
        mean=mean,
        std=None if std is None else torch.full_like(mean, std),
    )


# --- the flow -------------------------------------------------------------------------------------------------------


def test_the_velocity_leads_from_noise_to_latents() -> None:
    z, noise = torch.randn(2, 5, 3, 4, 4)
    z_t, velocity = mix(z, noise, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(z_t[0], z[0])
    torch.testing.assert_close(z_t[4], noise[4])
    torch.testing.assert_close(z_t[1] - 0.25 * velocity[1], z[1])


def test_samples_of_the_exact_velocity_have_the_distribution_of_the_latents() -> None:
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 1.5])
    z = sample(lambda z, t: marginal_velocity(z, t, mean, std), torch.randn(400, 2, 4, 4), 100)
    torch.testing.assert_close(z.mean((0, 2, 3)), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), std, atol=0.05, rtol=0)


def test_heun_needs_fewer_steps_than_euler() -> None:
    mean, std = torch.tensor([1.0]), torch.tensor([0.3])
    noise = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def wrong(n_steps: int, heun: bool) -> float:
        z = sample(lambda z, t: marginal_velocity(z, t, mean, std), noise, n_steps, heun=heun)
        return float((z - (mean + std * noise)).abs().max())  # where the exact flow leads

    assert wrong(20, True) < 0.3 * wrong(40, False)


@pytest.mark.parametrize("std", [0.3, 1.0, 2.5])
def test_the_best_velocity_meets_the_bound_of_the_density(std: float) -> None:
    rng = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([0.7]), torch.tensor([std])
    z = mean + deviation * torch.randn(4000, 1, 16, 16, generator=rng)
    t = bound_times((torch.arange(4000) + torch.rand(4000, generator=rng)) / 4000)
    z_t, velocity = mix(z, torch.randn(z.shape, generator=rng), t)
    found = [
        float(density_bound((predicted - velocity).square().mean((1, 2, 3)), t).mean())
        for predicted in (marginal_velocity(z_t, t, mean, deviation), marginal_velocity(z_t, t, mean, 1.2 * deviation))
    ]
    entropy = math.log(std) + 0.5 * math.log(2 * math.pi * math.e)
    assert found[0] == pytest.approx(entropy, abs=0.025)
    assert found[1] > found[0] + 0.01


def test_nothing_linear_in_single_elements_predicts_better_than_the_marginal_velocity() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([0.7]), torch.tensor([1.6])
    z = mean + std * torch.randn(20000, 1, 1, 1, generator=rng)
    for at in (0.05, 0.5, 0.95):
        t = torch.full((len(z),), at)
        z_t, velocity = mix(z, torch.randn(z.shape, generator=rng), t)
        best = marginal_velocity(z_t, t, mean, std)
        design = torch.cat([z_t.flatten(1), torch.ones(len(z), 1)], dim=1)
        fitted = design @ torch.linalg.lstsq(design, velocity.flatten(1)).solution
        loss, least = ((best - velocity).square().mean(), (fitted - velocity.flatten(1)).square().mean())
        torch.testing.assert_close(loss, least, rtol=2e-3, atol=0)


def test_times_of_a_measurement_stand_one_in_each_tenth() -> None:
    t = measured_times(torch.rand(50, 10))
    assert (t * 10).floor().tolist() == [list(range(10))] * 50
    assert measured_times(torch.zeros(10))[0] > 0
    drawn = training_times(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    assert abs(float(drawn.mean()) - 0.5) < 0.02
    assert float(((drawn > 0.25) & (drawn < 0.75)).float().mean()) > 0.7  # uniform times: 0.5


def test_guidance_moves_away_from_the_unconditional_velocity() -> None:
    both = guided(lambda z, t: z + 1, lambda z, t: z, 3.0)
    torch.testing.assert_close(both(torch.zeros(2), torch.ones(2)), torch.full((2,), 3.0))


# --- the network ----------------------------------------------------------------------------------------------------


def test_networks_for_other_latents_start_with_the_same_blocks() -> None:
    a = build_network(TINY, (3, 4, 4), 2, seed=1).state_dict()
    b = build_network(DenoiserConfig(width=32, depth=1, patch=2), (8, 8, 8), 2, seed=1).state_dict()
    other = build_network(TINY, (3, 4, 4), 2, seed=2).state_dict()
    ends = ("pos_embed.proj.weight", "proj_out_2.weight", "proj_out_2.bias")
    same = {name for name in a if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}
    assert set(a) - same == set(ends)
    assert not torch.equal(a["transformer_blocks.0.attn1.to_q.weight"], other["transformer_blocks.0.attn1.to_q.weight"])


def test_a_denoiser_never_hides_labels_by_itself() -> None:
    module = DenoiserModule(build_network(TINY, (3, 4, 4), 2, seed=0))
    torch.nn.init.normal_(module.network.proj_out_2.weight)
    arguments = (torch.randn(64, 3, 4, 4), torch.rand(64), torch.arange(64) % 2)
    module.train()
    assert torch.equal(module(*arguments), module(*arguments))


# --- the feed -------------------------------------------------------------------------------------------------------


def test_the_feed_is_a_function_of_the_position(tmp_path: Path) -> None:
    latents = latents_of(10, flat=False, std=0.1)

    def first(n: int, start: int, size: int, rank: int, n_ranks: int) -> list[tuple[str, torch.Tensor]]:
        feed = LatentFeed(latents, tmp_path, batch_size=size, seed=3, rank=rank, n_ranks=n_ranks)
        found = list(islice(feed.batches(0.0, start), n))
        return [(key, z) for batch in found for key, z in zip(batch["key"], batch["latents"], strict=True)]

    whole = first(5, 0, 4, 0, 1)
    assert sorted(key for key, _ in whole[:10]) == sorted(latents.keys)  # every image once an epoch
    even, odd, later = first(5, 0, 2, 0, 2), first(5, 0, 2, 1, 2), first(3, 8, 4, 0, 1)
    joined = [pair for n in range(0, 10, 2) for pair in (*even[n : n + 2], *odd[n : n + 2])]
    for other, mine in ((joined, whole), (later, whole[8:])):
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(other, mine, strict=True))


def test_the_feed_draws_the_mirror_image_half_the_time_and_the_posterior_each_time(tmp_path: Path) -> None:
    latents = latents_of(10, flat=False, std=0.01)
    feed = LatentFeed(latents, tmp_path, batch_size=200, seed=0)
    batch = next(feed.batches(0.0, 0))
    index = torch.tensor([latents.keys.index(key) for key in batch["key"]])
    from_mean = (batch["latents"][:, None] - latents.mean[index]).square().mean((2, 3, 4)).sqrt()  # (200, 2)
    assert torch.equal(batch["label"], latents.labels[index])
    assert 70 < int((from_mean[:, 1] < from_mean[:, 0]).sum()) < 130
    assert float(from_mean.min(1).values.mean()) == pytest.approx(0.01, rel=0.1)


def test_moments_count_the_posteriors_noise_and_scaling_takes_them_away() -> None:
    latents = latents_of(200, flat=False, std=0.5)
    mean, std = latents.moments()
    torch.testing.assert_close(std, torch.full((3,), (1 + 0.25) ** 0.5), atol=0.05, rtol=0)
    found = latents.scaled(mean, std).moments()
    torch.testing.assert_close(found[0], torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], torch.ones(3))


# --- the task -------------------------------------------------------------------------------------------------------


def trained(out: Path, *, flat: bool, n_images: int) -> Trainer:
    training, held_out = latents_of(64, flat=flat), latents_of(16, flat=flat, seed=1)
    task = DenoiserTask(TINY, ["a", "b"], held_out, training.moments())
    run = DenoiserRun(
        denoiser=TINY,
        optim=OptimConfig(lr=3e-3, batch_size=32, warmup_images=320, ema_decay=0.98),
        run=RunConfig(out=str(out), n_images=n_images, precision="no"),
    )
    trainer = Trainer(run, task, LatentFeed(training, out, batch_size=32, seed=0), Accelerator(cpu=True))
    trainer.run()
    return trainer


def unexplained(trainer: Trainer) -> float:
    rows, _ = trainer.task.evaluate(trainer.ema.module, torch.device("cpu"), 0, 1)
    return sum(row["loss"] for row in rows) / sum(row["marginal"] for row in rows)


@pytest.mark.slow
def test_a_denoiser_explains_structure_and_finds_none_in_noise(tmp_path: Path) -> None:
    of_flat = unexplained(trained(tmp_path / "flat", flat=True, n_images=6400))
    of_noise = unexplained(trained(tmp_path / "noise", flat=False, n_images=6400))
    assert of_flat < 0.6  # sixteen looks at one number
    assert 0.95 < of_noise < 1.3


def test_every_parameter_learns_and_the_export_is_a_diffusers_folder(tmp_path: Path) -> None:
    trainer = trained(tmp_path, flat=True, n_images=320)  # blocks start closed: ten steps reach all of them
    start = build_network(TINY, (3, 4, 4), 2, seed=0).state_dict()
    still = [
        name for name, value in trainer.task.module.network.state_dict().items() if torch.equal(value, start[name])
    ]
    assert still == []
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel.from_pretrained(tmp_path / "model")
    arguments = (torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    assert torch.equal(DenoiserModule(network)(*arguments), trainer.ema.module(*arguments))


def test_a_measurement_depends_on_seed_and_key_alone() -> None:
    module = DenoiserModule(build_network(TINY, (3, 4, 4), 2, seed=0))
    latents, device = latents_of(9, flat=False, std=0.2), torch.device("cpu")
    whole = measure(module, latents, range(9), latents.moments(), 0, device)
    parts = [measure(module, latents, [n], latents.moments(), 0, device)[0] for n in range(9)]
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert measure(module, latents, [0], latents.moments(), 1, device)[0]["marginal"] != parts[0]["marginal"]
