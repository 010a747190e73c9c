"""The adversarial game: which loss reaches what, what leaks, when each phase comes; through the real trainer."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.conftest import tiny_trainer
from train.adversary import Adversary
from train.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    r1_penalty,
)
from train.loss_config import AdversarialConfig
from train.task import Step
from train.trainer import Trainer

ADVERSARIAL = ["adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1"]
AT_ONCE = [*ADVERSARIAL, "adversarial.start=0", "adversarial.warmup=0", "adversarial.ramp=0"]


def where(number: int = 3, images: int = 12, share: float = 0.1) -> Step:
    return Step(number=number, images=images, share=share, seed=0, positions=range(4), autocast=nullcontext)


def made(shards: Path, tmp_path: Path, *overrides: str) -> Trainer:
    # torch's own initialisation: the linear one starts residual branches at zero, where half of them has no gradient
    return tiny_trainer(shards, tmp_path / "r", "model.init=diffusers", *overrides)


def batch_of(trainer: Trainer) -> dict:
    return next(trainer.feed.batches(0.0, 0))


def reached(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


def encoder_of(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters() if name.startswith("network.encoder.")}


OFF = {
    "l1": "loss.pixel_weight=0",
    "perceptual": "loss.perceptual_weight=0",
    "ms_ssim": "loss.ms_ssim_weight=0",
    "kl": "kl.weight=0",
}


@pytest.mark.parametrize("term", [*OFF, "adversarial"])
def test_each_loss_reaches_the_parameters_that_it_should_and_no_others(
    term: str, shards: Path, tmp_path: Path, backbone: Path
) -> None:
    on = ["loss.perceptual=sqz10", f"loss.features={backbone}", "loss.ms_ssim_weight=0.5", "adversarial.adaptive=false"]
    game = AT_ONCE if term == "adversarial" else ADVERSARIAL  # then still in the phase of reconstruction alone
    trainer = made(shards, tmp_path, *game, *on, *(text for name, text in OFF.items() if name != term))
    terms = trainer.task.generator_step(trainer.generator.module, batch_of(trainer), where())
    terms.objective.backward()
    found, encoder = reached(trainer.task.module), encoder_of(trainer.task.module)
    everything = {name for name, _ in trainer.task.module.named_parameters()}
    largest = max(float(p.grad.abs().max()) for p in trainer.task.module.parameters() if p.grad is not None)
    assert largest > 1e-7
    if term == "kl":  # the decoder's gradients are zeros
        assert found == encoder
    else:  # the last layer's bias of the posterior's log-variance is reached through the sample
        assert found == everything
    assert reached(trainer.task.critic) == set()
    assert all(p.grad is None for p in trainer.task.loss.parameters())


def test_the_perceptual_term_alone_moves_the_reconstruction_towards_the_image(
    shards: Path, tmp_path: Path, backbone: Path
) -> None:
    overrides = ["loss.perceptual=sqz10", f"loss.features={backbone}", OFF["l1"], OFF["kl"], "optim.warmup_images=0"]
    trainer = made(shards, tmp_path, *overrides, "run.n_images=4000")
    batch = batch_of(trainer)
    values = [trainer.step(iter([dict(batch)]))["perceptual"] for _ in range(20)]
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("rounded", ["true", "false"], ids=lambda value: f"rounded={value}")  # rounding stops leaks too
def test_neither_step_leaves_a_gradient_in_the_others_network(rounded: str, shards: Path, tmp_path: Path) -> None:
    penalties = ["adversarial.lecam_weight=0.1", "adversarial.r1_weight=1.0"]
    trainer = made(shards, tmp_path, *AT_ONCE, *penalties, f"adversarial.round_fakes={rounded}")
    task, batch = trainer.task, batch_of(trainer)
    terms = task.generator_step(trainer.generator.module, batch, where())
    terms.objective.backward(retain_graph=True)  # else a leak would be an error of torch, not a gradient
    assert all(p.grad is None for p in task.critic.parameters())
    assert all(p.requires_grad for p in task.critic.parameters())
    assert task.critic.training
    before = {name: p.grad.clone() for name, p in task.module.named_parameters()}
    critic = task.critic_step(trainer.critic.module, batch, terms.carry, where())
    critic.objective.backward()
    assert reached(task.critic) == {name for name, _ in task.critic.named_parameters()}
    for name, p in task.module.named_parameters():
        assert torch.equal(p.grad, before[name]), name


def test_the_objective_has_the_gradient_of_the_sum_of_the_weighted_losses(shards: Path, tmp_path: Path) -> None:
    trainer = made(shards, tmp_path, *AT_ONCE, "adversarial.adaptive=false", "loss.learned_scale=true")
    task, batch = trainer.task, batch_of(trainer)
    task.module.log_scale.data.fill_(0.3)
    task.generator_step(trainer.generator.module, batch, where()).objective.backward()
    surrogate = {name: p.grad.clone() for name, p in task.module.named_parameters()}
    task.module.zero_grad()
    outputs = task.module(batch["image"], task._draw(batch["image"], None, where()))
    s = task.module.log_scale
    plain = sum(task.loss(batch["image"], outputs.x_hat).values()) * torch.exp(-s) + s
    plain = plain + 0.5 * -task.critic(outputs.x_hat).mean()
    nats = 0.5 * (outputs.mean**2 + outputs.logvar.exp() - 1 - outputs.logvar)
    plain = plain + 1e-3 * nats.sum((1, 2, 3)).mean() / 64**2
    plain.backward()
    for name, p in task.module.named_parameters():
        torch.testing.assert_close(surrogate[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_learned_scale_is_learned(shards: Path, tmp_path: Path) -> None:
    fast = ["optim.warmup_images=0", "optim.lr=0.05", "run.n_images=4000"]
    trainer = made(shards, tmp_path, "loss.learned_scale=true", *fast)
    batches = trainer.feed.batches(0.0, 0)
    values = [trainer.step(batches) for _ in range(30)]
    assert values[0]["log_scale"] == 0
    # The minimum over s of r exp(-s) + s is at s = log r.
    minimum = math.log(sum(v["l1"] + v["ms_ssim"] for v in values[-10:]) / 10)
    assert minimum < -0.4  # far from the start, compared with the tolerance
    assert values[-1]["log_scale"] == pytest.approx(minimum, abs=0.2)


def test_steps_move_every_parameter_of_both_networks(shards: Path, tmp_path: Path) -> None:
    more = ["loss.learned_scale=true", "rate.probability=0.5", "model.use_quant_conv=true", "optim.warmup_images=0"]
    trainer = made(shards, tmp_path, *AT_ONCE, *more)
    both = nn.ModuleDict({"module": trainer.task.module, "critic": trainer.task.critic})
    before = {name: p.detach().clone() for name, p in both.named_parameters()}
    batches = trainer.feed.batches(0.0, 0)
    for _ in range(2):
        trainer.step(batches)
    assert [name for name, p in both.named_parameters() if torch.equal(p, before[name])] == []
    assert {"module.log_scale", "module.network.quant_conv.weight", "module.rate.log_step"} <= before.keys()


def test_both_networks_train_on_every_batch_and_a_step_counts_once(shards: Path, tmp_path: Path) -> None:
    trainer = made(shards, tmp_path, *AT_ONCE, "optim.warmup_images=0")
    batches = trainer.feed.batches(0.0, 0)
    for n in range(4):
        before = [p.detach().clone() for p in (trainer.task.module.network.decoder.conv_out.weight, *_first(trainer))]
        trainer.step(batches)
        after = [p.detach().clone() for p in (trainer.task.module.network.decoder.conv_out.weight, *_first(trainer))]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert (trainer.progress.step, trainer.progress.images) == (n + 1, 4 * (n + 1))


def _first(trainer: Trainer) -> list[torch.Tensor]:
    return [next(iter(trainer.task.critic.parameters()))]


def test_the_phases_come_when_the_recipe_says_and_the_discriminator_is_warm_before_it_counts(
    shards: Path, tmp_path: Path
) -> None:
    moments = ["adversarial.start=16", "adversarial.warmup=24", "adversarial.ramp=16", "adversarial.adaptive=false"]
    trainer = made(shards, tmp_path, *ADVERSARIAL, *moments, "run.n_images=400")
    calls = []
    trainer.task.critic.register_forward_hook(lambda *_: calls.append(trainer.progress.images))
    batches = trainer.feed.batches(0.0, 0)
    start = _first(trainer)[0].detach().clone()
    log = []
    for _ in range(20):
        images = trainer.progress.images
        weight = _first(trainer)[0].detach().clone()
        log.append((images, trainer.step(batches)))
        trained = not torch.equal(weight, _first(trainer)[0])
        assert trained == (images >= 16)
    phases = [values["phase"] for _, values in log]
    assert phases == ["reconstruction"] * 4 + ["warmup"] * 6 + ["ramp"] * 4 + ["adversarial"] * 6
    assert min(calls) == 16  # not even run before: no wasted work
    weights = [values["adversarial_weight"] for _, values in log]
    assert weights[:10] == [0.0] * 10
    assert weights[10:15] == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    assert all("adversarial" not in values for _, values in log[:10])
    assert not torch.equal(start, _first(trainer)[0])


def test_a_share_of_the_run_is_a_moment_too() -> None:
    config = AdversarialConfig(weight=1.0, start="25%", warmup="12.5%", ramp="12.5%", adaptive=False)
    adversary = Adversary(config, PatchDiscriminator(8, 1))
    seen = []
    for n in range(16):
        step = where(n, 100 * n, n / 16)
        adversary.begin(step)
        seen.append((adversary.phase(step), adversary.weight(step)))
        adversary.after_step({}, step, lambda tensor: tensor)
    assert [phase for phase, _ in seen] == ["reconstruction"] * 4 + ["warmup"] * 2 + ["ramp"] * 2 + ["adversarial"] * 8
    assert seen[7][1] == pytest.approx(0.5)


@pytest.mark.parametrize(("warmup", "ramp"), [("12.5%", "200"), ("200", "12.5%")])
def test_images_and_shares_may_be_mixed(warmup: str, ramp: str) -> None:
    config = AdversarialConfig(weight=1.0, start="25%", warmup=warmup, ramp=ramp, adaptive=False)
    adversary = Adversary(config, PatchDiscriminator(8, 1))
    phases = []
    for n in range(10):  # 100 images are a share of 1/16
        step = where(n, 100 * n, n / 16)
        adversary.begin(step)
        phases.append(adversary.phase(step))
    assert phases == ["reconstruction"] * 4 + ["warmup"] * 2 + ["ramp"] * 2 + ["adversarial"] * 2


def test_auto_starts_when_the_validations_loss_has_flattened() -> None:
    config = AdversarialConfig(weight=1.0, start="auto", auto_tolerance=0.02, auto_patience=2)
    adversary = Adversary(config, PatchDiscriminator(8, 1))
    for n, loss in enumerate([1.0, 0.9, 0.895, 0.8, 0.79]):
        assert adversary.after_validation(loss, where(images=n)) == []
        assert adversary.phase(where()) == "reconstruction"
    lines = adversary.after_validation(0.789, where(images=5))
    assert "flattened at 0.8000" in lines[0]
    assert adversary.started == (5, 0.1)
    resumed = Adversary(config, PatchDiscriminator(8, 1))
    resumed.load_state_dict(adversary.state_dict())
    assert resumed.phase(where(images=6)) == adversary.phase(where(images=6)) == "warmup"


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer_capped(
    shards: Path, tmp_path: Path
) -> None:
    trainer = made(shards, tmp_path, *AT_ONCE, "adversarial.adaptive_cap=0.001", "run.n_images=4000")
    task, batch = trainer.task, batch_of(trainer)
    weight = task.module.network.decoder.conv_out.weight
    position = trainer._where(0)
    outputs = task.module(batch["image"], task._draw(batch["image"], None, position))
    norms = [
        float(torch.autograd.grad(loss, weight, retain_graph=True)[0].norm())
        for loss in (sum(task.loss(batch["image"], outputs.x_hat).values()), -task.critic(outputs.x_hat).mean())
    ]
    first = trainer.step(iter([dict(batch)]))
    assert "adaptive" not in first  # measured now, used from the next step on
    second = trainer.step(iter([dict(batch)]))
    assert second["adaptive_raw"] == pytest.approx(norms[0] / norms[1], rel=1e-3)
    assert second["adaptive"] == 0.001
    assert second["adversarial_weight"] == pytest.approx(0.5 * 0.001)


def test_the_losses_of_the_game_are_those_of_the_papers() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 2.0) / 2))
    bce = nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (bce(real, torch.ones(2)) + bce(fake, torch.zeros(2)))
    for kind in ("vanilla", "non-saturating"):
        assert float(discriminator_loss(real, fake, kind)) == pytest.approx(float(expected))
    assert float(generator_loss(fake, "hinge")) == float(generator_loss(fake, "vanilla")) == 1.0
    assert float(generator_loss(fake, "non-saturating")) == pytest.approx(float(bce(fake, torch.ones(2))))
    assert float(lecam_loss(real, fake, 0.7, 0.2)) == pytest.approx((1.8**2 + 0.3**2) / 2 + 3.7**2 / 2)


def test_r1_is_the_squared_gradient_at_real_images() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.w * x).sum((1, 2, 3))[:, None, None, None]

    torch.manual_seed(0)
    critic = Linear()
    penalty = r1_penalty(critic, torch.randn(2, 3, 8, 8))
    assert float(penalty.detach()) == pytest.approx(float(critic.w.detach().square().sum()), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(critic.w.grad, 2 * critic.w.detach())


@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_the_discriminator_judges_each_image_by_itself_and_learns_to_tell_them_apart(norm: str) -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(8, 2, norm)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    fake = nn.functional.avg_pool2d(x, 3, 1, 1)
    critic.eval()
    torch.testing.assert_close(critic(x)[:1], critic(x[:1]), atol=1e-5, rtol=1e-4)
    assert not any("running" in name for name, _ in critic.named_buffers())  # no statistics over the batch
    critic.train()
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(60):
        real_logits, fake_logits = critic(torch.cat([x, fake])).chunk(2)
        optimizer.zero_grad()
        discriminator_loss(real_logits, fake_logits, "hinge").backward()
        optimizer.step()
    assert real_logits.mean().item() > fake_logits.mean().item() + 0.5
    assert critic(torch.zeros(1, 3, critic.min_side, critic.min_side)).shape[-1] >= 1


def test_the_discriminator_sees_rounded_reconstructions(shards: Path, tmp_path: Path) -> None:
    trainer = made(shards, tmp_path, *AT_ONCE)
    seen = []
    trainer.task.critic.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    trainer.step(trainer.feed.batches(0.0, 0))
    in_generator, in_critic = seen
    levels = (in_critic + 1) * 127.5
    assert in_critic.shape[0] == 2 * in_generator.shape[0]  # real and fake together
    assert float((levels - levels.round()).abs().max()) < 1e-3
    assert float((in_critic[4:] - in_generator.clamp(-1, 1)).abs().max()) <= 0.51 / 127.5


def test_a_collapsed_discriminator_is_told_and_warms_up_again(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*ADVERSARIAL, "adversarial.start=0", "adversarial.warmup=8", "adversarial.ramp=4"]
    trainer = made(
        shards, tmp_path, *overrides, "health.window=3", "health.logit_gap=100", "adversarial.adaptive_cap=1e-9"
    )
    batches = trainer.feed.batches(0.0, 0)
    phases = [trainer.step(batches)["phase"] for _ in range(9)]
    assert phases == ["warmup"] * 2 + ["ramp"] + ["adversarial"] * 2 + ["warmup", "ramp"] + ["adversarial"] * 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert "collapsed discriminator: its mean logits differ by" in error
    assert "the discriminator warms up again" in error
    assert "exploding adaptive weight" in error
    assert "the cap holds" in error


def test_posterior_collapse_is_told_and_lowers_the_weight_of_the_kl(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    symptoms = ["health.window=2", "health.active_nats=1e9", "kl.weight=0.5"]
    trainer = made(shards, tmp_path, *symptoms)
    batches = trainer.feed.batches(0.0, 0)
    values = [trainer.step(batches) for _ in range(4)]
    ratios = [v["kl"] / v["kl_nats_per_pixel"] for v in values]
    assert ratios == pytest.approx([0.5, 0.5, 0.25, 0.25], rel=1e-4)
    assert "posterior collapse: 0 of 4 channels carry anything" in capsys.readouterr().err
    told = made(shards, tmp_path / "2", *symptoms, "health.act=false")
    batches = told.feed.batches(0.0, 0)
    values = [told.step(batches) for _ in range(4)]
    assert values[3]["kl"] / values[3]["kl_nats_per_pixel"] == pytest.approx(0.5, rel=1e-4)
    assert "nothing is done about it" in capsys.readouterr().err
