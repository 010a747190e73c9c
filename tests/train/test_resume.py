"""A run that is killed and resumed ends, bit for bit, where the uninterrupted one ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train import checkpoint
from train.checkpoint import Checkpoints
from train.cli import main
from train.trainer import Trainer

# Every part that remembers something: a discriminator in all its phases, LeCAM, R1, EMA, noise, rate, accumulation.
EVERYTHING = [
    "run.n_images=144", "run.checkpoint_every=24", "run.validate_every=80", "optim.accumulate=2", "optim.batch_size=2",
    "adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1", "adversarial.start=40",
    "adversarial.warmup=32", "adversarial.ramp=40", "adversarial.lecam_weight=0.1", "adversarial.r1_weight=0.1",
    "adversarial.r1_every=3", "latents.noise=0.1", "latents.equivariance=0.3", "rate.probability=0.5",
    "kl.schedule=linear", "loss.learned_scale=true", "export.statistics_images=4", "data.crops=[64,72]",
]  # fmt: skip


def command(shards: Path, out: Path, *more: str) -> list[str]:
    return ["run", "tiny", f"data.shards={shards}", f"run.out={out}", *EVERYTHING, *more]


def state_of(out: Path) -> dict:
    found = Checkpoints(out / "checkpoints", 1).newest()
    assert found is not None
    return found[1]


def assert_same_end(a: dict, b: dict) -> None:
    assert a["progress"]["images"] == b["progress"]["images"] == 144
    for part in ("module", "ema", "generator", "critic_module", "critic", "task", "ranks", "nonfinite"):
        _assert_equal(a[part], b[part], part)
    _assert_equal(a["validation"], b["validation"], "validation")


def _assert_equal(a: object, b: object, name: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            _assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_equal(x, y, f"{name}.{n}")
    else:
        assert a == b, name


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("whole") / "r"
    assert main(command(shards, out)) == 0
    state = state_of(out)
    assert state["task"]["adversary"]["ratio"] is not None
    assert state["task"]["adversary"]["anchors"] != (0.0, 0.0)
    return state


def test_killed_at_a_random_step_and_resumed_with_other_workers(
    shards: Path, uninterrupted: dict, tmp_path: Path
) -> None:
    out = tmp_path / "r"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *command(shards, out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    while not list((out / "checkpoints").glob("images-*.pt")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    time.sleep(random.random() * 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = state_of(out)["progress"]["images"]
    assert main(command(shards, out, "run.resume=auto", "data.workers=2")) == 0
    assert_same_end(state_of(out), uninterrupted)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (
        reached == 144
        or {"event": "resume", "images": reached}.items()
        <= next(line for line in lines if line["event"] == "resume").items()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_polite_signal_saves_after_the_step_and_exits_0(
    number: signal.Signals, shards: Path, uninterrupted: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, step = tmp_path / "r", Trainer.step_on

    def signalled(self, batches):
        if self.progress.step == 25:
            os.kill(os.getpid(), number)
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step_on", signalled)
        assert main(command(shards, out)) == 0
    assert "run.resume=auto" in capsys.readouterr().err
    assert state_of(out)["progress"]["step"] == 26
    assert not (out / "model").exists()
    assert main(command(shards, out, "run.resume=auto")) == 0
    assert_same_end(state_of(out), uninterrupted)
    assert (out / "model" / "codec.json").exists()


def test_resume_auto_starts_anew_where_there_is_nothing(shards: Path, tmp_path: Path) -> None:
    assert (
        main(["run", "tiny", f"data.shards={shards}", f"run.out={tmp_path / 'r'}", "run.resume=auto", "run.n_images=8"])
        == 0
    )
    assert state_of(tmp_path / "r")["progress"]["images"] == 8


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    base = ["run", "tiny", f"data.shards={shards}", f"run.out={out}", "run.checkpoint_every=8", "run.n_images=16"]
    assert main(base) == 0
    newest = Checkpoints(out / "checkpoints", 1).all()[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    assert main([*base, "run.resume=auto"]) == 0
    error = capsys.readouterr().err.replace("\n", " ")
    assert f"{newest}: not a sound checkpoint" in error
    assert "8 images: resumed" in error


def test_the_last_and_the_best_are_kept(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    validate = Trainer.validate

    def scripted(self, bar=None):
        metrics = validate(self, bar)
        self._last_validation = metrics | {"loss": next(losses)}
        return self._last_validation

    monkeypatch.setattr(Trainer, "validate", scripted)
    out = tmp_path / "r"
    overrides = ["run.n_images=40", "run.checkpoint_every=8", "run.validate_every=8", "run.keep_last=2"]
    assert main(["run", "tiny", f"data.shards={shards}", f"run.out={out}", *overrides]) == 0
    found = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert found == ["best.pt", "images-000000032.pt", "images-000000040.pt"]
    assert checkpoint.load(out / "checkpoints" / "best.pt")["progress"]["images"] == 16


def test_a_full_disk_or_a_kill_in_a_save_leaves_the_checkpoint_before_whole(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    save = torch.save

    def full(state, file):
        if state["progress"]["images"] == 16:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    base = ["run", "tiny", f"data.shards={shards}", f"run.out={out}", "run.checkpoint_every=8", "run.n_images=24"]
    assert main(base) == 2
    error = capsys.readouterr().err
    assert "cannot write the checkpoint: [Errno 28] No space left on device" in error
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name != "best.pt"] == ["images-000000008.pt"]
    monkeypatch.setattr(torch, "save", save)
    (out / "checkpoints" / ".images-000000016.pt.99.tmp").write_bytes(b"left by a kill")
    assert main([*base, "run.resume=auto"]) == 0
    assert state_of(out)["progress"]["images"] == 24


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.latent_channels=8", "model.latent_channels 4 -> 8"),
        ("adversarial.weight=0.5", "adversarial.weight 0.0 -> 0.5"),
        ("rate.probability=1", "rate.probability 0.0 -> 1.0"),
        ("loss.learned_scale=true", "loss.learned_scale False -> True"),
    ],
)
def test_a_changed_model_cannot_be_resumed(
    override: str, message: str, run_folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "tiny", f"data.shards={shards}", f"run.out={run_folder}", "run.resume=auto"]
    assert main([*base, override]) == 2
    error = capsys.readouterr().err
    assert "cannot be resumed with a changed model" in error
    assert message in error


def test_what_else_changed_is_said(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["run", "tiny", f"data.shards={shards}", f"run.out={tmp_path / 'r'}", "run.resume=auto"]
    assert main([*base, "run.n_images=8"]) == 0
    assert "resumed" not in capsys.readouterr().err
    assert main([*base, "run.n_images=16", "optim.lr=1e-3", "data.workers=1"]) == 0
    error = capsys.readouterr().err.replace("\n", " ")
    assert "resumed with a changed recipe: optim.lr 0.002 -> 0.001" in error
    assert "workers" not in error.split("resumed with")[1].split("network:")[0]


def test_a_checkpoint_can_be_exported(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, step = tmp_path / "r", Trainer.step_on

    def signalled(self, batches):
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step_on", signalled)
        assert main(["run", "tiny", f"data.shards={shards}", f"run.out={out}"]) == 0
    assert main(["export", str(out)]) == 0
    assert "stream_id" in json.loads(capsys.readouterr().out)
    assert "24 images seen in 6 steps" in (out / "model" / "README.md").read_text()
    assert main(["export", str(tmp_path)]) == 2
    assert "no checkpoint here" in capsys.readouterr().err


def test_a_branch_from_an_older_checkpoint_sets_the_newer_ones_aside(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    base = ["run", "tiny", f"data.shards={shards}", f"run.out={out}", "run.checkpoint_every=8", "run.keep_last=3"]
    assert main([*base, "run.n_images=32"]) == 0
    older = out / "checkpoints" / "images-000000016.pt"
    assert main([*base, "run.n_images=24", f"run.resume={older}"]) == 0
    names = sorted(path.name for path in (out / "checkpoints").glob("*images*"))
    assert names == [
        "aside-images-000000024.pt", "aside-images-000000032.pt", "images-000000016.pt", "images-000000024.pt",
    ]  # fmt: skip
    best = out / "checkpoints" / "best.pt"
    assert not best.exists() or checkpoint.load(best)["progress"]["images"] <= 24  # never of the branch that was left
    assert "set aside" in capsys.readouterr().err


def test_when_no_checkpoint_is_sound_the_run_does_not_start_over(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    base = ["run", "tiny", f"data.shards={shards}", f"run.out={out}", "run.n_images=8"]
    assert main(base) == 0
    for path in Checkpoints(out / "checkpoints", 1).all():
        path.write_bytes(b"no")
    assert main([*base, "run.resume=auto"]) == 2
    assert "none of the 1 checkpoints is sound" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_reaches_no_reading_process(shards: Path, tmp_path: Path) -> None:
    """As a terminal's Ctrl-C, `timeout`, or a cluster's scheduler send it."""
    out = tmp_path / "r"
    arguments = [f"data.shards={shards}", f"run.out={out}", "data.workers=2", "run.n_images=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "run", "tiny", *arguments, "run.log_every=1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()
    assert state_of(out)["progress"]["step"] >= 5


def test_a_moved_run_is_exported_where_it_lies(run_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (moved / "checkpoints").mkdir(parents=True)
    newest = Checkpoints(run_folder / "checkpoints", 1).all()[-1]
    (moved / "checkpoints" / newest.name).write_bytes(newest.read_bytes())
    before = (run_folder / "model" / "codec.json").stat().st_mtime_ns
    assert main(["export", str(moved)]) == 0
    assert (moved / "model" / "codec.json").exists()
    assert (run_folder / "model" / "codec.json").stat().st_mtime_ns == before
