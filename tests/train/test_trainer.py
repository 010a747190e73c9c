"""The training loop through the command `codec-train run`, on the tiny recipe."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from codec import Codec, images, model_folder
from codec.coding import Settings
from codec.pixels import to_float
from codec.shards import read_index
from codec.tables import Mode
from eval.metrics import psnr
from tests.train.conftest import log, tiny_trainer
from train.autoencoder import AutoencoderTask
from train.averaging import averaged, lag
from train.checkpoint import Checkpoints
from train.cli import main
from train.data import split, whole_images
from train.schedules import learning_rate_factor
from train.trainer import Progress, Trainer


def last_checkpoint(run: Path) -> dict:
    found = Checkpoints(run / "checkpoints", 1).newest()
    assert found is not None
    return found[1]


def test_a_run_leaves_what_it_promises(run_folder: Path) -> None:
    steps = log(run_folder)
    assert [line["images"] for line in steps] == list(range(4, 65, 4))
    assert {"loss", "l1", "ms_ssim", "kl", "lr", "gradient_norm", "time_s"} <= set(steps[0])
    assert all(line["loss"] == pytest.approx(line["l1"] + line["ms_ssim"] + line["kl"], rel=1e-5) for line in steps)
    assert [line["images"] for line in log(run_folder, "validation")] == [32, 64]
    assert log(run_folder, "validation")[-1]["psnr"] > 5
    grid = images.load(run_folder / "validation" / "images-000000064.png")
    assert grid.shape[0] > 100  # originals above reconstructions
    assert json.loads((run_folder / "config.json").read_text())["optim"]["lr"] == 2e-3
    assert json.loads((run_folder / "environment.json").read_text())["versions"]["torch"] == version("torch")
    checkpoint = last_checkpoint(run_folder)
    assert checkpoint["progress"]["images"] == 64
    assert {"module", "ema", "generator", "task", "ranks"} <= set(checkpoint)


def test_a_run_changes_to_its_final_crops_and_reads_on_from_where_it_stands(shards: Path, tmp_path: Path) -> None:
    made = tiny_trainer(shards, tmp_path / "r", "data.final_crop=96", "data.final_part=0.25", "run.n_images=32")
    seen = []
    step = made.task.generator_step
    made.task.generator_step = lambda module, batch, where: (
        seen.append((batch["image"].shape[-1], batch["key"])) or step(module, batch, where)
    )
    made.run()
    assert [side for side, _ in seen] == [64] * 6 + [96] * 2
    keys = [key for _, batch in seen for key in batch]
    assert keys == [made.feed._sequence[position]["key"] for position in range(32)]


def test_training_lowers_the_loss(shards: Path, tmp_path: Path) -> None:
    made = tiny_trainer(shards, tmp_path / "r", "run.n_images=400", "optim.batch_size=8")
    batches = made.feed.batches(0.0, 0)
    losses = [made.step(batches)["loss"] for _ in range(50)]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def test_bf16_computes_in_bf16_and_keeps_float32_weights_and_averages(shards: Path, tmp_path: Path) -> None:
    made = tiny_trainer(shards, tmp_path / "r", "run.precision=bf16")
    seen = []
    convolution = made.task._network.decoder.conv_out
    convolution.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    made.step(made.feed.batches(0.0, 0))
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in made.task.module.parameters()} == {torch.float32}
    assert {p.dtype for p in made.ema.parameters()} == {torch.float32}
    averaged_seen = []
    made.ema.module.network.decoder.conv_out.register_forward_hook(
        lambda module, inputs, output: averaged_seen.append(output.dtype)
    )
    made.task.evaluate(made.ema.module, made.device, 0, 1)
    assert set(averaged_seen) == {torch.float32}


@pytest.mark.slow
def test_from_pretrained_in_a_fresh_process_gives_the_trainers_own_reconstruction(run_folder: Path) -> None:
    script = (
        "import sys, torch; from diffusers import AutoencoderKL; from safetensors.torch import load_file\n"
        "vae = AutoencoderKL.from_pretrained(sys.argv[1]).eval(); f = load_file(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    z = vae.encode(f['x']).latent_dist.mode(); x_hat = vae.decode(z).sample\n"
        "print(float((z - f['z']).abs().max()), float((x_hat - f['x_hat']).abs().max()), float(f['x_hat'].std()))\n"
    )
    command = [sys.executable, "-c", script, str(run_folder / "model"), str(run_folder / "fixture.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    z_error, x_error, spread = map(float, done.stdout.split())
    assert z_error <= 1e-5
    assert x_error <= 1e-5
    assert spread > 1e-3


def test_the_fixture_and_the_model_are_the_averaged_weights(run_folder: Path) -> None:
    checkpoint = last_checkpoint(run_folder)
    exported = AutoencoderKL.from_pretrained(run_folder / "model").state_dict()
    same_as_average = [
        torch.equal(exported[k.removeprefix("module.network.")], v)
        for k, v in checkpoint["ema"].items()
        if "network" in k
    ]
    same_as_last = [torch.equal(exported[k.removeprefix("network.")], v) for k, v in checkpoint["module"].items()]
    assert same_as_average
    assert all(same_as_average)
    assert not any(same_as_last)


def test_the_config_is_measured_and_the_folder_is_a_codec(run_folder: Path, shards: Path) -> None:
    model = run_folder / "model"
    config_json = json.loads((model / "config.json").read_text())
    folder = model_folder.read(model)
    assert config_json["scaling_factor"] != pytest.approx(0.18215)
    assert config_json["shift_factor"] == pytest.approx(folder.mean.mean(), rel=1e-4)
    assert config_json["sample_size"] == 64
    assert config_json["force_upcast"] is False
    # Recomputed independently, in one piece, from the same ten images.
    vae = AutoencoderKL.from_pretrained(model).eval()
    training, _ = split(read_index(shards), 2)
    with torch.no_grad():
        z = torch.cat(
            [
                vae.encode(to_float(x)[None]).latent_dist.mode()[0].flatten(1)
                for _, x in whole_images(training, 1024, 2)
            ],
            1,
        ).double()
    assert 1 / config_json["scaling_factor"] == pytest.approx(float(z.std(correction=0)), rel=1e-6)
    np.testing.assert_allclose(folder.mean, z.mean(1), rtol=1e-5)
    np.testing.assert_allclose(folder.info["statistics"]["std"], z.std(1, correction=0), rtol=1e-6)
    assert len({path.stat().st_mode for path in model.iterdir()}) == 1
    codec = Codec.load(model)
    image = images.load(run_folder / "validation" / "images-000000064.png")
    assert codec.decode(codec.encode(image)).shape == image.shape
    card = (model / "README.md").read_text()
    assert folder.stream_id in card
    assert "64 images seen in 16 steps" in card
    assert "data: 10 images of the shard set shards, 2 more held out; licence: not stated" in card


def test_the_finest_quality_is_as_good_as_the_autoencoder_itself(run_folder: Path, shards: Path) -> None:
    codec = Codec.load(run_folder / "model")
    for _, image in whole_images(split(read_index(shards), 2)[1], 1024, 2):
        finest, ceiling = codec.decode(codec.encode(image, 100)), codec.reconstruct(image)
        assert abs(psnr(image, finest) - psnr(image, ceiling)) < 0.1


def test_a_broken_sample_costs_a_run_neither_its_validation_nor_its_model(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(shards, broken)
    training, validation = split(read_index(broken), 2)
    data = bytearray(training[0].shard.read_bytes())
    for ref in (training[3], validation[0]):
        data[ref.offset : ref.offset + 40] = bytes(40)
    training[0].shard.write_bytes(data)
    assert main(["run", "tiny", f"data.shards={broken}", f"run.out={tmp_path / 'r'}", "run.n_images=8"]) == 0
    error = capsys.readouterr().err
    assert f"sample {training[3].key}: " in error
    assert f"sample {validation[0].key}: " in error
    assert model_folder.read(tmp_path / "r" / "model").info["statistics"]["n_images"] == 9


def test_the_coarsest_quality_is_at_its_rate_on_the_training_images(run_folder: Path, shards: Path) -> None:
    codec = Codec.load(run_folder / "model")
    training, _ = split(read_index(shards), 2)
    bits = pixels = 0.0
    for _, image in whole_images(training, 1024, 2):
        _, indices = codec.indices(codec.encode(image, settings=Settings(quality=0, effort=0)))
        bits += codec.coder.folder.table_sets[codec.stream_id].bits(indices, 0, Mode.STATIC)
        pixels += image.shape[0] * image.shape[1]
    assert bits / pixels == pytest.approx(0.08, rel=0.05)


def test_accumulating_four_batches_gives_the_gradient_of_a_batch_four_times_larger(
    shards: Path, tmp_path: Path
) -> None:
    def gradients(n: int, *overrides: str) -> dict[str, torch.Tensor]:
        made = tiny_trainer(shards, tmp_path / str(n), "model.init=diffusers", *overrides)
        found: dict[str, torch.Tensor] = {}
        parameters = dict(made.task.module.named_parameters())
        made.generator.optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in parameters.items()})
        made.step(made.feed.batches(0.0, 0))
        assert made.progress.images == 8
        return found

    large, accumulated = gradients(1, "optim.batch_size=8"), gradients(2, "optim.batch_size=2", "optim.accumulate=4")
    largest = max(float(gradient.abs().max()) for gradient in large.values())
    assert largest > 1e-3
    for name, gradient in large.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_the_learning_rate_warms_up_and_follows_half_a_cosine() -> None:
    cosine = partial(learning_rate_factor, "cosine", 0.1, 100)
    assert cosine(0, 0.0) == 0
    assert cosine(50, 0.0) == pytest.approx(0.5)
    assert cosine(100, 0.0) == pytest.approx(1.0)
    assert cosine(1000, 0.5) == pytest.approx(0.55)
    assert cosine(1000, 1.0) == pytest.approx(0.1)
    assert learning_rate_factor("constant", 0.1, 0, 10, 0.9) == 1.0


def test_progress_is_of_images_or_time_whichever_is_further() -> None:
    assert Progress(images=50, time_s=10).fraction(100, 0) == 0.5
    assert Progress(images=50, time_s=60).fraction(100, 80) == 0.75
    assert Progress(images=500, time_s=0).fraction(100, 80) == 1.0


def test_the_average_follows_the_weights_of_every_step(shards: Path, tmp_path: Path) -> None:
    made = tiny_trainer(shards, tmp_path / "r", "optim.warmup_images=0")
    batches = made.feed.batches(0.0, 0)
    weight, expected = made.task._network.decoder.conv_out.weight, None
    for t in range(4):
        made.step(batches)
        rate = 1 - min(0.999, (1 + t) / (10 + t))
        now = weight.detach().clone()
        expected = now if expected is None else expected + rate * (now - expected)
    torch.testing.assert_close(made.ema.module.network.decoder.conv_out.weight, expected)
    assert not torch.equal(expected, weight)


def test_the_average_warms_up() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average = averaged(module, decay=0.5)
    expected = None
    for t, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]):
        module.weight.data.fill_(value)
        average.update_parameters(module)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert float(average.module.weight) == pytest.approx(expected)


def test_averages_that_are_behind_the_last_weights_are_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lag({"loss": 0.5, "raw_loss": 0.495}) is None
    assert lag({"loss": 0.4, "raw_loss": 0.5}) is None
    assert lag({}) is None
    behind = {"loss": 0.5, "raw_loss": 0.4}
    monkeypatch.setattr(Trainer, "validate", lambda self, bar=None: behind)
    arguments = [f"data.shards={shards}", f"run.out={tmp_path / 'r'}", "run.n_images=4", "export.statistics_images=1"]
    assert main(["run", "tiny", *arguments]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "4 images: the averaged weights, which are exported, are behind" in error
    assert "0.5000 against 0.4000; a smaller optim.ema_decay" in error


def test_a_step_that_is_not_finite_is_left_out_and_named_and_too_many_stop_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = AutoencoderTask.generator_step
    keys: list[list[str]] = []
    poisoned = {2, 3, *range(6, 99)}

    def step(self, module, batch, where):
        terms = original(self, module, batch, where)
        keys.append(batch["key"])
        factor = float("nan") if where.number in poisoned else 1.0
        return replace(
            terms, objective=terms.objective * factor, values=terms.values | {"l1": terms.values["l1"] * factor}
        )

    monkeypatch.setattr(AutoencoderTask, "generator_step", step)
    out = tmp_path / "r"
    overrides = [f"data.shards={shards}", f"run.out={out}", "run.checkpoint_every=16", "run.max_nonfinite=3"]
    assert main(["run", "tiny", *overrides, "run.n_images=400"]) == 1
    error = capsys.readouterr().err.replace("\n", " ")
    assert "step 2: not finite: " in error
    assert "l1 = nan" in error
    assert all(key in error for key in keys[2])
    assert "back to the weights of images-000000020.pt" in error  # due after 16, in the middle of the first trouble
    assert "in a row, and no checkpoint helps" in error
    assert not (out / "model").exists()
    lines = [line["step"] for line in log(out, "nonfinite")]
    assert lines == [2, 3, *range(6, 6 + 4 * 3)]  # three times back, then the end
    state = last_checkpoint(out)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["module"].values())


def test_after_going_back_a_run_goes_on_with_other_samples(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AutoencoderTask.generator_step
    before: dict[int, torch.Tensor] = {}

    def step(self, module, batch, where):
        before[where.number] = module.network.decoder.conv_out.weight.detach().clone()
        terms = original(self, module, batch, where)
        return replace(terms, objective=terms.objective * (float("nan") if where.number in (5, 6) else 1.0))

    monkeypatch.setattr(AutoencoderTask, "generator_step", step)
    out = tmp_path / "r"
    overrides = [f"data.shards={shards}", f"run.out={out}", "run.checkpoint_every=8", "run.max_nonfinite=2"]
    assert main(["run", "tiny", *overrides, "run.n_images=40"]) == 0
    assert torch.equal(before[7], before[4])  # the checkpoint after 16 images: after steps 0 to 3
    assert not torch.equal(before[7], before[5])
    assert not torch.equal(before[8], before[7])
    assert [line["images"] for line in log(out)] == list(range(4, 41, 4))


def test_an_infinite_image_spoils_its_own_step_only(shards: Path, tmp_path: Path) -> None:
    game = ["adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1", "adversarial.start=0"]
    more = ["adversarial.warmup=4", "adversarial.ramp=4", "adversarial.lecam_weight=0.1", "latents.noise=0.1"]
    made = tiny_trainer(shards, tmp_path / "r", *game, *more, "loss.perceptual=none", "loss.ms_ssim_weight=0")
    batches = made.feed.batches(0.0, 0)
    for n in range(8):
        batch = next(batches)
        if n in (1, 4):
            batch["image"] = batch["image"].clone().fill_(float("inf"))
        before = made.task.state_dict()
        out = made.step_on([batch])
        assert math.isfinite(out["gradient_norm"]) == (n not in (1, 4))
        if n in (1, 4):  # (the warm-up's end is a moment, not a value)
            after = made.task.state_dict()
            assert after["adversary"] | {"warm": None} == before["adversary"] | {"warm": None}
            assert (after["scale"], after["monitor"]) == (before["scale"], before["monitor"])
        assert "nan" not in json.dumps(made.task.state_dict()).lower()
    assert made.task.adversary.phase(made._where(0)) == "adversarial"


def test_broken_samples_are_counted_and_listed(shards: Path, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(shards, broken)
    ref = next(ref for ref in split(read_index(broken), 2)[0])
    data = bytearray(ref.shard.read_bytes())
    data[ref.offset : ref.offset + 40] = bytes(40)
    ref.shard.write_bytes(data)
    made = tiny_trainer(broken, tmp_path / "r")
    batches = made.feed.batches(0.0, 0)
    for _ in range(5):
        made.step(batches)
    lines = [json.loads(line) for line in (tmp_path / "r" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(line["key"], line["kind"]) for line in lines] == [(ref.key, "not an image")]
    assert made.feed.bad.counts == {"not an image": 2}  # twice in 20 positions of 10 samples


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.out={out}"], "Set data.shards"),
        (["data.shards={shards}", "run.out={out}", "data.crop=32"], "need at least 33 pixels"),
        (["data.shards={tmp}/nowhere", "run.out={out}"], "no such folder"),
        (["data.shards={shards}"], "Set run.out"),
        (["data.shards={shards}", "run.out={shards}"], "not empty"),
        (["data.shards={shards}", "run.out=/proc/x"], "cannot write here"),
        (["data.shards={shards}", "run.out={out}", "data.n_validation=12"], "12 images in the shards"),
        (["data.shards={shards}", "run.out={out}", "loss.perceptual=lpips-vgg"], "vgg16"),
    ],
)
def test_mistakes_are_found_before_training(
    overrides: list[str],
    message: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    places = {"out": tmp_path / "r", "tmp": tmp_path, "shards": shards}
    assert main(["run", "tiny", *(override.format(**places) for override in overrides)]) == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_keeps_a_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step_on

    def interrupted(self, batches):
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step, which is finished first
        return step(self, batches)

    monkeypatch.setattr(Trainer, "step_on", interrupted)
    out = tmp_path / "r"
    assert main(["run", "tiny", f"data.shards={shards}", f"run.out={out}"]) == 130
    assert last_checkpoint(out)["progress"]["step"] == 3
    assert not list((out / "checkpoints").glob(".*"))
    assert "interrupted" in capsys.readouterr().err


def test_the_fixture_holds_a_picture_not_noise(run_folder: Path) -> None:
    fixture = load_file(run_folder / "fixture.safetensors")
    assert fixture["x"].shape == fixture["x_hat"].shape == (1, 3, 64, 64)
    assert fixture["x"].abs().max() <= 1


def test_too_many_broken_samples_stop_the_run_after_a_checkpoint(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "shards", tmp_path / "r"
    shutil.copytree(shards, broken)
    ref = split(read_index(broken), 2)[0][0]
    data = bytearray(ref.shard.read_bytes())
    data[ref.offset : ref.offset + 40] = bytes(40)
    ref.shard.write_bytes(data)
    arguments = [f"data.shards={broken}", f"run.out={out}", "run.n_images=400"]
    assert main(["run", "tiny", *arguments]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert "11 of " in error
    assert "samples could not be used (of this rank: 11 not an image), more than data.max_bad_share = 0.01" in error
    assert last_checkpoint(out)["progress"]["images"] == pytest.approx(110, abs=20)
    assert main(["run", "tiny", *arguments, "run.resume=auto", "data.max_bad_share=0.5"]) == 0  # nothing is lost
    assert last_checkpoint(out)["progress"]["images"] == 400
