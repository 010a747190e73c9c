from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from codec.latent_model import Posterior, latent_model
from tests.train.conftest import tiny_trainer
from train.cli import main
from train.config import ModelConfig
from train.latent_losses import LatentAnchor
from train.networks import build_network

KL = ModelConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, init="diffusers"
)


def base(path: Path, seed: int = 1, **settings: float) -> Path:
    torch.manual_seed(seed)
    network: AutoencoderKL = build_network(KL)
    network.register_to_config(**settings)
    network.save_pretrained(path)
    return path


def steps(trainer, n: int) -> list[dict]:
    batches = trainer.feed.batches(0.0, trainer.progress.images)
    return [trainer.step(batches) for _ in range(n)]


def test_the_error_is_in_the_bases_normalized_units(tmp_path: Path) -> None:
    folder = base(tmp_path, scaling_factor=0.5, shift_factor=3.0)
    model = latent_model(AutoencoderKL.from_pretrained(folder))
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    target = Posterior(mean + 0.2, logvar)
    assert float(LatentAnchor(model)(mean, logvar, target)) == pytest.approx((0.5 * 0.2) ** 2, rel=1e-4)
    moved = LatentAnchor(model, deviation=True)(mean, logvar + 0.3, target)
    change = 0.5 * (torch.exp(0.5 * (logvar + 0.3)) - torch.exp(0.5 * logvar))
    assert float(moved) == pytest.approx(0.01 + float(change.square().mean()), rel=1e-4)


def test_the_anchor_reaches_the_encoder_alone(shards: Path, tmp_path: Path) -> None:
    folder, other = base(tmp_path / "base"), base(tmp_path / "other", seed=2)
    anchored = [f"model.init_from={folder}", "model.trainable=all", "latents.anchor_deviation=true", "kl.weight=0"]
    anchored += ["latents.anchor_weight=1", f"latents.anchor={other}"]
    made = tiny_trainer(shards, tmp_path / "r", *anchored, "loss.pixel_weight=0", "loss.ms_ssim_weight=0")
    made.task.loss.ms_ssim_weight = 0.0  # the anchor is all that is left
    batch = next(made.feed.batches(0.0, 0))
    terms = made.task.generator_step(made.generator.module, batch, made._where(0))
    assert float(terms.values["anchor"]) > 0
    terms.objective.backward()
    for name, parameter in made.task.module.network.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (not name.startswith(("decoder.", "post_quant_conv."))), name
    frozen: nn.Module = made.task._latents.anchor.model.network
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any("anchor" in name for name in made.task.module.state_dict())


def test_it_starts_at_zero_and_holds_the_latents_while_all_is_trained(shards: Path, tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    moved = {}
    for weight in (0.0, 30.0):
        overrides = [f"model.init_from={folder}", "model.trainable=all", f"latents.anchor_weight={weight}"]
        overrides += ["optim.lr=5e-3", "optim.warmup_images=0", "run.n_images=4000", "data.crop=32"]
        made = tiny_trainer(shards, tmp_path / str(weight), *overrides, "loss.perceptual=none")
        values = steps(made, 15)
        if weight:
            assert values[0]["anchor"] == pytest.approx(0.0, abs=1e-9)
            assert values[-1]["anchor"] > 0
        else:
            assert "anchor" not in values[0]
        x = next(made.feed.batches(0.0, 0))["image"]
        with torch.no_grad():
            ours, theirs = (
                latent_model(network).encode(x).mean
                for network in (made.task.module.network, AutoencoderKL.from_pretrained(folder))
            )
        moved[weight] = float((ours - theirs).square().mean())
    assert 0 < moved[30.0] < 0.2 * moved[0.0]


def test_an_anchored_model_keeps_the_normalisation_of_its_anchor(shards: Path, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", scaling_factor=0.25, shift_factor=0.5)
    for name, start in (("own", [f"model.init_from={folder}", "model.trainable=all"]), ("other", [])):
        out = tmp_path / name
        held = ["latents.anchor_weight=1", f"latents.anchor={folder}"]
        arguments = [f"data.shards={shards}", f"run.out={out}", "run.n_images=8", "export.statistics_images=4"]
        assert main(["run", "tiny", *arguments, *start, *held, "model.latent_channels=4"]) == 0
        config = AutoencoderKL.from_pretrained(out / "model").config
        assert (config.scaling_factor, config.shift_factor) == (0.25, 0.5)
        assert "are of the model whose latents these are" in (out / "model" / "README.md").read_text()


def test_an_anchor_with_nothing_to_hold_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = base(tmp_path / "base")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    wide = KL.__class__(**{**vars(KL), "latent_channels": 7})
    build_network(wide).save_pretrained(tmp_path / "wide")
    weight, all_of_it = "latents.anchor_weight=1", "model.trainable=all"
    for overrides, message in (
        ([weight], "latents.anchor_weight = 1: held to what? Set model.init_from or latents.anchor=FOLDER"),
        ([weight, f"model.init_from={folder}"], "latents.anchor_weight = 1.0, allowed: 0: the encoder stays as it is"),
        ([weight, all_of_it, f"latents.anchor={tmp_path / 'no'}"], "no: no such folder"),
        ([weight, all_of_it, f"latents.anchor={tmp_path / 'wide'}"], "latents.anchor: f 2, 7 latent channels"),
        ([weight, f"latents.anchor={tmp_path / 'tiny'}", "latents.anchor_deviation=true"], "have a variance"),
    ):
        assert main(["run", "tiny", f"data.shards={shards}", f"run.out={tmp_path / 'r'}", *overrides]) in (2, 3)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
