"""A training in goes: each begins with one small state and ends with the next, on machines that keep nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.train.conftest import log, tiny_trainer
from train import checkpoint, compact
from train.autoencoder import AutoencoderTask
from train.cli import main
from train.schedules import learning_rate_factor
from train.trainer import Trainer

# A discriminator in its phases, rate, noise, two sizes of crops, of which some images are smaller than the larger one.
EVERYTHING = [
    "adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1", "adversarial.start=16",
    "adversarial.warmup=8", "adversarial.ramp=16", "rate.probability=0.5", "latents.noise=0.1", "data.final_crop=80",
    "export.statistics_images=4", "export.formats=[]", "optim.batch_size=4",
]  # fmt: skip


def go(photos: Path, out: Path, *more: str) -> list[str]:
    return ["go", "tiny", "--photos", str(photos), "-o", str(out), *more]


def figures(out: Path, number: int) -> dict:
    found = json.loads((out / f"go-{number:03d}.json").read_text())
    assert found["go"] == number
    return found


def stop_at_step(patch: pytest.MonkeyPatch, number: int, act) -> None:
    """Let something happen before a step of the whole run."""
    step = Trainer.step_on

    def stopped(self, batches):
        if self.progress.step == number:
            act(self)
        return step(self, batches)

    patch.setattr(Trainer, "step_on", stopped)


def quick_export(trainer: Trainer) -> dict:
    """In place of an export, which takes seconds and has tests of its own."""
    (trainer.out / "model").mkdir()
    (trainer.out / "model" / "codec.json").write_text(str(trainer.progress.images))
    return {"folder": "model"}


def out_of_time(trainer: Trainer) -> None:
    trainer.stop_at_s = 0.0


def test_goes_make_one_schedule_of_the_whole_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adam without memory (betas 0) makes goes comparable: they end where one run of all images ends."""
    plain = ["optim.betas=[0,0]", "optim.rewarm_images=0", "run.n_images=48", "rate.probability=0.5"]
    plain += ["latents.noise=0.1", "data.final_crop=80", "export.statistics_images=4", "export.formats=[]"]
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "export", quick_export)
        assert main(["run", "tiny", f"data.shards={shards}", f"run.out={whole}", "run.channels_last=true", *plain]) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at_step(patch, 5, out_of_time)
        assert main(go(shards, out, *plain)) == 0
    first = figures(out, 1)
    assert (first["first_image"], first["images_seen"], first["finished"]) == (0, 24, False)
    assert first["validation"]["images"] == 24
    assert {"psnr", "loss", "raw_psnr"} <= first["validation"].keys()
    assert not (out / "model").exists()
    state = str(out / "state.safetensors")
    told = capsys.readouterr().out
    assert '"finished": false' in told
    assert f"go on with --state {state}" in told
    assert main(go(shards, out, "--state", state, *plain)) == 0
    second = figures(out, 2)
    assert (second["first_image"], second["images_seen"], second["finished"]) == (24, 48, True)
    assert [(each["first"], each["images"]) for each in second["goes"]] == [(0, 24), (24, 48)]
    assert second["images_per_s"] > 0
    assert second["losses"]["loss"] > 0
    assert "continued, 2 goes" in (out / "model" / "README.md").read_text()

    rates = {line["images"]: line["lr"] for line in log(whole)}
    assert {line["images"]: line["lr"] for line in log(out)} == rates
    assert len(rates) == 12
    end = checkpoint.load(whole / "checkpoints" / "images-000000048.pt")
    reached = compact.read(Path(state))
    assert reached["task"] == json.loads(json.dumps(end["task"]))
    for name, tensor in end["module"].items():  # the rate model's among them
        assert torch.equal(reached["module"][name], tensor), name
    for name, tensor in end["ema"].items():
        assert torch.allclose(reached["ema"][name].float(), tensor.float(), rtol=0, atol=1e-6), name
    assert sorted(path.name for path in out.iterdir()) == [
        "go-001.json", "go-002.json", "log.jsonl", "model", "state.safetensors",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary run with everything, at 24 of 48 images; do not change it."""
    out = tmp_path_factory.mktemp("run") / "r"
    with pytest.MonkeyPatch.context() as patch:
        stop_at_step(patch, 5, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["run", "tiny", f"data.shards={shards}", f"run.out={out}", "run.n_images=48", *EVERYTHING]) == 0
    return out


def test_a_checkpoint_becomes_a_state_that_keeps_all_but_the_optimizers(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "images-000000024.pt"
    before = checkpoint.load(path)
    del before["goes"]  # as earlier versions wrote them
    older = tmp_path / "older.pt"
    torch.save(before, older)
    state = tmp_path / "s.safetensors"
    assert main(["compact", str(older), "-o", str(state)]) == 0
    assert "24 of 48 images seen, go 1" in capsys.readouterr().out
    assert state.stat().st_size < 0.6 * path.stat().st_size
    trainer = tiny_trainer(shards, tmp_path / "r", "run.n_images=48", f"run.continue_from={state}", *EVERYTHING)
    assert trainer.progress.images == 24
    assert [go["first"] for go in trainer.goes] == [0, 24]
    assert json.loads(json.dumps(trainer.task.state_dict())) == json.loads(json.dumps(before["task"]))
    for name, tensor in trainer.task.module.state_dict().items():
        assert torch.equal(tensor, before["module"][name]), name
    steps = [name for name in before["ema"] if ".rate." in name]
    assert len(steps) == 5
    for name, tensor in trainer.ema.state_dict().items():
        tolerance = 0.0 if name in steps or tensor.ndim != 4 else 1e-6
        assert torch.allclose(tensor.float(), before["ema"][name].float(), rtol=0, atol=tolerance), name
    assert trainer.task.critic is not None
    moved = 0
    for name, tensor in trainer.task.critic.state_dict().items():
        assert torch.allclose(tensor, before["critic_module"][name], rtol=1e-3, atol=1e-7), name
        moved += int(not torch.equal(before["critic_module"][name], torch.zeros_like(tensor)))
    assert moved
    assert not trainer.generator.optimizer.state  # begins anew


def test_the_rate_is_warmed_up_again_in_each_further_go(shards: Path, run: Path, tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    more = [f"run.continue_from={state}", "run.n_images=48", "optim.rewarm_images=8", *EVERYTHING]
    trainer = tiny_trainer(shards, tmp_path / "r", *more)
    made = trainer.feed.batches(0.5, 24)
    rates = [trainer.step(made)["lr"] for _ in range(4)]
    config = trainer.config.optim
    whole = [learning_rate_factor("cosine", 0.01, config.warmup_images, n, n / 48) for n in (24, 28, 32, 36)]
    expected = [config.lr * factor * warm for factor, warm in zip(whole, (0, 0.5, 1, 1), strict=True)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_a_killed_go_leaves_its_last_state_and_a_fresh_process_goes_on(shards: Path, run: Path, tmp_path: Path) -> None:
    state, out = tmp_path / "s.safetensors", tmp_path / "out"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    endless = ["run.n_images=100000", "run.checkpoint_every=8", "data.n_validation=2", *EVERYTHING]
    command = [sys.executable, "-m", "train", *go(shards, out, "--state", str(state), *endless)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    written = out / "state.safetensors"
    while not written.exists() or compact.read(written)["progress"]["images"] == 24:
        assert process.poll() is None, "the go ended by itself"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = compact.read(written)
    assert reached["progress"]["images"] % 8 == 0
    assert [go["first"] for go in reached["goes"]] == [0, 24]
    assert main(go(shards, out, "--state", str(written), "--minutes", "0", *endless)) == 0
    assert figures(out, 3)["images_seen"] == reached["progress"]["images"]


def test_a_polite_signal_saves_and_export_writes_the_model_before_the_end(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    more = ["run.n_images=48", *EVERYTHING]
    monkeypatch.setattr(Trainer, "export", quick_export)
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert main(go(shards, out, "--export", *more)) == 0
    assert figures(out, 1)["images_seen"] == 16
    assert not (out / "model").exists()
    state = out / "state.safetensors"
    assert main(go(shards, out, "--state", str(state), "--minutes", "0", "--export", *more)) == 0
    assert figures(out, 2)["validation"]["images"] == 16
    assert (out / "model" / "codec.json").read_text() == "16"


def test_a_state_is_replaced_whole_or_not_at_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "s.safetensors"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    before = state.read_bytes()

    def killed(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    assert main(["compact", str(run), "-o", str(state)]) == 130
    assert state.read_bytes() == before
    assert list(tmp_path.iterdir()) == [state]


def test_what_does_not_fit_is_one_line(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, out = tmp_path / "s.safetensors", tmp_path / "out"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    damaged, cut = tmp_path / "damaged.safetensors", tmp_path / "cut.safetensors"
    data = bytearray(state.read_bytes())
    cut.write_bytes(data[:-100])
    data[-100] ^= 1
    damaged.write_bytes(data)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"weight": torch.zeros(3)}, weights)
    capsys.readouterr()

    def refused(path: Path, message: str, *more: str) -> None:
        assert main(go(shards, out, "--state", str(path), "run.n_images=48", *EVERYTHING, *more)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1]
        assert all("continued with a changed recipe: run.channels_last" in line for line in lines[:-1])
        assert not (out / "state.safetensors").exists()

    refused(damaged, f"{damaged}: not a sound state")
    refused(cut, f"{cut}: not a sound state")
    refused(weights, f"{weights}: no compact state of a run")
    refused(tmp_path / "none.safetensors", "no such state")
    refused(state, "changed model: model.latent_channels 4 -> 6", "model.latent_channels=6")
    refused(state, "changed model: adversarial.weight 0.5 -> 0.0", "adversarial.weight=0")
    refused(state, "run.time_limit_min = 3.0, allowed: 0 with run.continue_from", "run.time_limit_min=3")
    refused(state, "a go sets run.out by itself", "run.out=x")
    refused(state, "data.memory = 'device', allowed: none with", "data.random_resize=2")
    monkeypatch.setattr(compact, "LIMIT_MIB", 0.01)
    assert main(["compact", str(run), "-o", str(state)]) == 2
    assert "MiB, more than 0.01" in capsys.readouterr().err
    refused(state, "MiB, more than 0.01")
    assert main(["run", "small-head", f"run.continue_from={state}"]) == 2
    assert "run.continue_from" in capsys.readouterr().err


def test_a_new_run_does_not_write_over_a_state(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"of another run")
    assert main(go(shards, tmp_path)) == 2
    assert "a state already" in capsys.readouterr().err
    assert (tmp_path / "state.safetensors").read_bytes() == b"of another run"


def test_a_state_is_not_replaced_by_one_of_fewer_images(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, older = tmp_path / "out", tmp_path / "older.safetensors"
    state = out / "state.safetensors"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    before = state.read_bytes()
    earlier = checkpoint.load(run / "checkpoints" / "images-000000024.pt")
    earlier["progress"]["images"] = 8
    compact.write(older, earlier)
    more = ["run.n_images=48", *EVERYTHING]
    again = [f"data.shards={shards}", f"run.out={tmp_path / 'r'}", f"run.state={state}"]
    for command, first in (
        (["run", "tiny", *again, *more], 0),
        (["run", "tiny", *again, f"run.continue_from={older}", *more], 8),
        (go(shards, out, "--state", str(older), *more), 8),
    ):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{state}: a state of 24 images already, this run begins after {first}" in error
        assert state.read_bytes() == before


def test_a_state_is_not_replaced_by_weights_that_may_be_broken(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = AutoencoderTask.generator_step

    def step(self, module, batch, where):
        terms = original(self, module, batch, where)
        return replace(terms, objective=terms.objective * (float("nan") if where.number == 5 else 1.0))

    monkeypatch.setattr(AutoencoderTask, "generator_step", step)
    stop_at_step(monkeypatch, 5, out_of_time)
    assert main(go(shards, tmp_path, "run.checkpoint_every=8", "run.n_images=48")) == 0
    assert compact.read(tmp_path / "state.safetensors")["progress"]["images"] == 16
    assert figures(tmp_path, 1)["images_seen"] == 16
    assert "left as it is, the last 1 step(s) were not finite" in capsys.readouterr().err.replace("\n", " ")


def test_photographs_packed_anew_are_no_change(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, photos = tmp_path / "out \N{FRAME WITH PICTURE}", shards.parent / "photos"
    state = out / "state.safetensors"
    assert main(go(photos, out, "--minutes", "0")) == 0
    assert b"latent-codec-go-" not in state.read_bytes()  # the temporary folder
    assert main(go(photos, out, "--minutes", "0", "--state", str(state))) == 0
    error = capsys.readouterr().err
    assert "changed recipe" not in error
    assert "other training images" not in error


def test_only_goes_that_trained_are_counted(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = []

    def export(self, module, out, record, device):
        out.mkdir()
        records.append(record)
        return {"folder": "model"}

    monkeypatch.setattr(AutoencoderTask, "export", export)
    state, out = tmp_path / "s.safetensors", tmp_path / "out"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    more = ["run.n_images=48", *EVERYTHING]
    assert main(go(shards, out, "--state", str(state), "--minutes", "0", "--export", *more)) == 0
    assert main(go(shards, out, "--state", str(out / "state.safetensors"), *more)) == 0
    assert figures(out, 3)["finished"]
    assert [record.get("goes") for record in records] == [None, 2]


def test_other_photographs_and_another_schedule_are_said(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "s.safetensors"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    more = [f"run.continue_from={state}", *EVERYTHING]
    tiny_trainer(shards, tmp_path / "same", "run.n_images=48", *more)
    assert "other training images" not in capsys.readouterr().err
    tiny_trainer(shards, tmp_path / "other", "run.n_images=96", "data.n_validation=3", *more)
    error = capsys.readouterr().err
    assert "other training images than before" in error
    assert "run.n_images 48 -> 96, and the schedule with it" in error


@pytest.mark.gpu
def test_goes_on_a_gpu(shards: Path, run: Path, tmp_path: Path) -> None:
    """From a CPU's checkpoint to a GPU's two goes in bf16, and an export on the GPU."""
    state, out = tmp_path / "s.safetensors", tmp_path / "out"
    assert main(["compact", str(run), "-o", str(state)]) == 0
    more = ["run.n_images=96", "run.precision=bf16", *EVERYTHING]
    assert main(go(shards, out, "--state", str(state), "--minutes", "0", *more)) == 0
    held = figures(out, 2)
    assert held["hardware"]["gpu"] is not None
    assert np.isfinite(held["validation"]["psnr"])
    assert main(go(shards, out, "--state", str(out / "state.safetensors"), *more)) == 0
    assert figures(out, 3)["finished"]
    assert np.isfinite(figures(out, 3)["validation"]["psnr"])
    assert (out / "model" / "codec.json").exists()
