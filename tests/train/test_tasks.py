"""Families, starting points and what else a recipe can ask for, each through the real trainer or command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from codec import Codec, images, model_folder
from codec.coding import Settings
from codec.tables import Mode
from tests.train.conftest import log, tiny_trainer
from train.cli import main
from train.export import load_discriminator_state
from train.klt_init import transform

TINY_FAMILY = ["model.family=tiny", "model.block_out_channels=[8,8]", "kl.weight=0"]
GAME = ["adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1", "adversarial.start=0"]


def steps(trainer, n: int) -> list[dict]:
    batches = trainer.feed.batches(0.0, trainer.progress.images)
    return [trainer.step(batches) for _ in range(n)]


@pytest.fixture(scope="module")
def rate_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rate") / "r"
    overrides = ["rate.probability=0.75", "rate.weight=0.3", "run.n_images=1200", "optim.batch_size=8", "optim.lr=4e-3"]
    arguments = [f"data.shards={shards}", f"run.out={out}", *overrides, "run.validate_every=600", "kl.weight=1e-4"]
    assert main(["run", "tiny", *arguments]) == 0
    return out


def test_the_estimated_rate_is_that_of_the_static_mode(rate_run: Path, shards: Path) -> None:
    """Of payloads alone: files have a header of some 40 bytes each, which images of 80 pixels feel."""
    codec, folder = Codec.load(rate_run / "model"), model_folder.read(rate_run / "model")
    last = log(rate_run, "validation")[-1]
    from codec.shards import read_index
    from train.data import split, whole_images

    for quality in (0, 25, 50, 75, 100):
        bits = pixels = 0
        for _, image in whole_images(split(read_index(shards), 2)[1], 256, 2):
            _, indices = codec.indices(codec.encode(image, settings=Settings(quality=quality, effort=0)))
            bits += folder.table_sets[folder.stream_id].bits(indices, quality, Mode.STATIC)
            pixels += image.shape[0] * image.shape[1]
        assert last[f"bpp_q{quality}"] == pytest.approx(bits / pixels, rel=0.06, abs=0.02), quality
    assert last["bpp_q100"] > 4 * last["bpp_q25"]


@pytest.mark.slow
def test_the_price_of_bits_lowers_them_and_steps_and_densities_learn(shards: Path, tmp_path: Path) -> None:
    def trained(weight: float) -> dict:
        out = tmp_path / str(weight)
        made = tiny_trainer(shards, out, "rate.probability=1", f"rate.weight={weight}", "kl.weight=0", "optim.lr=5e-3")
        before = {name: p.detach().clone() for name, p in made.task.module.rate.named_parameters()}
        last = steps(made, 40)[-1]
        for name, p in made.task.module.rate.named_parameters():
            assert not torch.equal(p, before[name]), name
        return last

    assert trained(3.0)["bpp"] < 0.8 * trained(0.01)["bpp"]


def test_coded_images_are_decoded_from_rounded_latents(shards: Path, tmp_path: Path) -> None:
    """And the bits are those of noisy ones; images that are not coded have the posterior's noise."""
    made = tiny_trainer(shards, tmp_path / "r", "rate.probability=0.5", "rate.decoded=rounded")
    module = made.task.module.eval()
    x = next(made.feed.batches(0.0, 0))["image"]
    draws = made.task._draw(x, None, made._where(0))
    coded = torch.arange(len(x)) % 2 == 0
    draws = replace(draws, coded=coded)
    with torch.no_grad():
        outputs = module(x, draws)
        z = outputs.mean + torch.exp(0.5 * outputs.logvar) * draws.posterior
        z[coded] = module.rate.quantised(outputs.mean, draws.quality)[coded]
        noisy = module.rate.noisy(outputs.mean, draws.quality, draws.uniform)
        torch.testing.assert_close(outputs.x_hat, module.network.decode(z).sample)
        torch.testing.assert_close(outputs.bits, module.rate.bits(noisy, draws.quality))


def test_steps_of_a_transforms_coefficients_begin_equal_under_its_inverse(shards: Path, tmp_path: Path) -> None:
    network = ["init=klt", "block_out_channels=[12,48,64]", "latent_channels=8", "norm_num_groups=1"]
    made = tiny_trainer(shards, tmp_path / "r", "rate.probability=1", *(f"model.{each}" for each in network))
    _, deviations = transform([12, 48])
    step = made.task.module.rate.step
    torch.testing.assert_close(step * deviations[:8], (step * deviations[:8])[:1].expand(8))


def test_the_exported_steps_are_the_learned_ones(rate_run: Path) -> None:
    state = torch.load(sorted((rate_run / "checkpoints").glob("images-*.pt"))[-1], weights_only=True)
    learned = state["ema"]["module.rate.log_step"].exp().numpy()
    np.testing.assert_allclose(model_folder.read(rate_run / "model").step, learned, rtol=1e-6)


def test_tiny_goes_through_the_whole_line(shards: Path, tmp_path: Path, photo_folder: Path) -> None:
    out = tmp_path / "r"
    overrides = [f"data.shards={shards}", f"run.out={out}", *TINY_FAMILY, "rate.probability=1", *GAME]
    assert main(["run", "tiny", *overrides]) == 0
    network = AutoencoderTiny.from_pretrained(out / "model")
    assert network.config.latent_channels == 4
    assert "kl" not in log(out, "step")[0]
    from codec.cli import main as codec_main

    assert codec_main(["encode", str(photo_folder), "-o", str(tmp_path / "c"), "-m", str(out / "model")]) == 0
    assert codec_main(["decode", str(tmp_path / "c"), "-o", str(tmp_path / "d"), "-m", str(out / "model")]) == 0
    assert images.load(tmp_path / "d" / "a.png.png").shape == (96, 80, 3)


def test_a_student_learns_its_teachers_latents(shards: Path, tmp_path: Path, run_folder: Path) -> None:
    teacher = run_folder / "model"
    made = tiny_trainer(
        shards, tmp_path / "r", *TINY_FAMILY, f"model.teacher={teacher}", "optim.lr=5e-3", "run.n_images=4000"
    )
    values = steps(made, 60)
    assert values[-1]["teacher"] < 0.5 * values[0]["teacher"]
    # The encoder learns from the teacher alone: the decoder is given the teacher's latents, not the student's.
    batch = next(made.feed.batches(0.0, 0))
    made.task._latents._config = replace(made.config, model=replace(made.config.model, teacher_weight=0.0))
    made.task.generator_step(made.generator.module, batch, made._where(0)).objective.backward()
    network = made.task.module.network
    assert all(not p.grad.any() for p in network.encoder.parameters())
    assert any(bool(p.grad.any()) for p in network.decoder.parameters())


def test_fine_tuning_leaves_the_encoder_the_scaling_and_the_files_alone(
    shards: Path, tmp_path: Path, run_folder: Path
) -> None:
    base, out = run_folder / "model", tmp_path / "r"
    overrides = [f"data.shards={shards}", f"run.out={out}", f"model.init_from={base}", *GAME, "adversarial.warmup=8"]
    assert main(["run", "tiny", *overrides]) == 0
    before, after = (AutoencoderKL.from_pretrained(folder) for folder in (base, out / "model"))
    for name, tensor in before.state_dict().items():
        same = torch.equal(tensor, after.state_dict()[name])
        assert same == (not name.startswith(("decoder.", "post_quant_conv."))), name
    assert after.config.scaling_factor == before.config.scaling_factor
    assert after.config.shift_factor == before.config.shift_factor
    assert "are of the model whose latents these are" in (out / "model" / "README.md").read_text()
    state = load_discriminator_state(out / "model")
    assert state is not None
    # A later run starts with that discriminator, not a cold one.
    again = tiny_trainer(shards, tmp_path / "2", f"model.init_from={out / 'model'}", *GAME)
    for name, tensor in again.task.critic.state_dict().items():
        assert torch.equal(tensor, state[name])
    trained = {id(p) for group in again.generator.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in again.task.module.network.decoder.parameters()}


def test_a_branch_trains_everything_from_where_another_run_ended(
    shards: Path, tmp_path: Path, run_folder: Path
) -> None:
    made = tiny_trainer(shards, tmp_path / "r", f"model.init_from={run_folder / 'model'}", "model.trainable=all")
    base = AutoencoderKL.from_pretrained(run_folder / "model").state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in made.task.module.network.state_dict().items())
    steps(made, 2)
    after = made.task.module.network.state_dict()
    assert not torch.equal(after["encoder.conv_in.weight"], base["encoder.conv_in.weight"])


def test_noise_reaches_the_decoder_at_its_strength(shards: Path, tmp_path: Path) -> None:
    made = tiny_trainer(shards, tmp_path / "r", "latents.noise=0.5", "run.n_images=4000")
    steps(made, 3)
    batch = next(made.feed.batches(0.0, 0))
    draws = made.task._draw(batch["image"], None, replace(made._where(0), positions=range(200)))
    z = made.task.module._model.encode(batch["image"]).mean
    strength = draws.noise_deviation / made.task._scale.deviation
    assert made.task._scale.deviation == pytest.approx(float(z.detach().std()), rel=0.5)
    assert 0.45 < float(strength.max()) <= 0.5
    assert float(strength.mean()) == pytest.approx(0.25, abs=0.03)  # uniform
    quiet = made.task.module(batch["image"], replace(made.task._draw(batch["image"], None, made._where(0)), noise=None))
    noisy = made.task.module(batch["image"], made.task._draw(batch["image"], None, made._where(0)))
    assert not torch.equal(quiet.x_hat, noisy.x_hat)
    assert torch.equal(quiet.mean, noisy.mean)


def test_equivariance_turns_the_target_with_the_latents(shards: Path, tmp_path: Path) -> None:
    made = tiny_trainer(shards, tmp_path / "r", "latents.equivariance=1", "loss.perceptual=none")
    batch = next(made.feed.batches(0.0, 0))
    position = made._where(0)
    draws = made.task._draw(batch["image"], None, position)
    terms = made.task.generator_step(made.generator.module, batch, position)
    target, x_hat = terms.carry
    assert target.shape == x_hat.shape
    assert torch.equal(target, draws.transform.image(batch["image"], 2))
    assert not torch.equal(target, batch["image"])
    off = tiny_trainer(shards, tmp_path / "2", "latents.equivariance=0.5")
    drawn = [off.task._draw(batch["image"], None, replace(position, positions=range(k, k + 4))) for k in range(60)]
    assert 15 < sum(d.transform is not None for d in drawn) < 45


@pytest.mark.slow
def test_latents_are_pulled_towards_a_vision_networks_features(shards: Path, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=64, patch_size=16
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    overrides = [
        f"latents.alignment={tmp_path / 'vit'}",
        "latents.alignment_weight=1",
        "latents.alignment_margins=[0,0]",
    ]
    made = tiny_trainer(shards, tmp_path / "r", *overrides, "optim.lr=5e-3", "run.n_images=4000")
    projection = made.task.module.projection.weight.detach().clone()
    values = steps(made, 40)
    assert values[-1]["alignment"] < 0.9 * values[0]["alignment"]
    assert not torch.equal(projection, made.task.module.projection.weight)
    assert not any("vit" in name.lower() for name in made.task.module.state_dict())


def test_gradient_checkpointing_gives_the_same_gradients(shards: Path, tmp_path: Path) -> None:
    def gradients(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        made = tiny_trainer(shards, tmp_path / name, *GAME, "adversarial.warmup=0", *overrides)
        batch = next(made.feed.batches(0.0, 0))
        made.task.generator_step(made.generator.module, batch, made._where(0)).objective.backward()
        return {name: p.grad for name, p in made.task.module.named_parameters()}

    plain, checkpointed = gradients("a"), gradients("b", "run.gradient_checkpointing=true")
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_channels_last_changes_rounding_only(shards: Path, tmp_path: Path) -> None:
    a = steps(tiny_trainer(shards, tmp_path / "a"), 3)[-1]["loss"]
    b = steps(tiny_trainer(shards, tmp_path / "b", "run.channels_last=true"), 3)[-1]["loss"]
    assert a == pytest.approx(b, rel=1e-4)


def test_streaming_trains_and_measures_on_local_shards(shards: Path, tmp_path: Path) -> None:
    urls = f"pipe:cat {shards}/shard-000000.tar"
    out = tmp_path / "r"
    overrides = ["data.mode=streaming", f"data.shards={urls}", f"data.local_shards={shards}", f"run.out={out}"]
    assert main(["run", "tiny", *overrides, "run.n_images=32", "run.checkpoint_every=16"]) == 0
    assert len(log(out, "step")) == 8
    assert (out / "model" / "codec.json").exists()
    assert main(["run", "tiny", *overrides, "run.n_images=48", "run.resume=auto"]) == 0
    assert len(log(out, "step")) == 12


def test_tensorboard_gets_scalars_and_pictures(shards: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "r"
    arguments = [f"data.shards={shards}", f"run.out={out}", 'run.trackers=["tensorboard"]', "run.n_images=16"]
    assert main(["run", "tiny", *arguments]) == 0
    events = next(out.rglob("events.out.*"))
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert len(found.Scalars("step/loss")) == 4
    assert found.Scalars("validation/psnr")[0].step == 16
    assert found.Images("reconstructions")


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_plain_state_dicts(shards: Path, tmp_path: Path) -> None:
    game = [*GAME, "adversarial.warmup=4", "adversarial.ramp=4", "adversarial.r1_weight=0.1"]
    eager = steps(tiny_trainer(shards, tmp_path / "a", *game), 4)
    made = tiny_trainer(shards, tmp_path / "b", *game, "run.compile=true")
    compiled = steps(made, 4)
    for a, b in zip(eager, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)
    assert not any("_orig_mod" in name for name in made.task.module.state_dict())
    made.validate()
    made.checkpoint()
