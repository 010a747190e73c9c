"""Several gloo processes, started as a user starts them: bit-equal ranks that match one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import log
from train.checkpoint import Checkpoints
from train.cli import main

STEPS = 20
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# The global batch is 4 images in each case; a discriminator in all its phases with everything that is averaged.
GAME = [
    f"run.n_images={4 * STEPS}", "run.checkpoint_every=4", "run.validate_every=40", "optim.warmup_images=8",
    "adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1", "adversarial.start=16",
    "adversarial.warmup=16", "adversarial.ramp=16", "adversarial.lecam_weight=0.1", "adversarial.r1_weight=0.1",
    "latents.noise=0.1", "rate.probability=0.5", "export.statistics_images=4", "run.keep_last=1", "run.seed=3",
]  # fmt: skip
# Of a parameter after 20 steps, relative to the largest of its tensor: sums are taken in another order, and Adam's
# first steps are as large for a tiny gradient as for a large one.
TOLERANCE = 5e-3


def launch(n: int, arguments: list[str], launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = launcher or [*TORCHRUN, str(n)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def command(shards: Path, out: Path, batch_size: int, *more: str) -> list[str]:
    return ["run", "tiny", f"data.shards={shards}", f"run.out={out}", f"optim.batch_size={batch_size}", *GAME, *more]


def state_of(out: Path) -> dict:
    found = Checkpoints(out / "checkpoints", 1).newest()
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "r"
    done = launch(2, command(shards, out, 2))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def one_process(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "r"
    assert main(command(shards, out, 4)) == 0
    return out


def test_two_ranks_stay_equal_to_the_bit_in_all_phases(two_ranks: Path) -> None:
    saved = log(two_ranks, "checkpoint")
    assert [line["step"] for line in saved] == list(range(1, STEPS + 1))
    for line in saved:  # weights, averages, discriminator, adaptive weight, anchors
        assert len(line["parameters"]) == 2
        assert len(set(line["parameters"])) == 1
    assert len({line["parameters"][0] for line in saved}) == STEPS
    phases = [line["phase"] for line in log(two_ranks, "step")]
    assert phases == ["reconstruction"] * 4 + ["warmup"] * 4 + ["ramp"] * 4 + ["adversarial"] * 8


def assert_near(a: dict, b: dict) -> None:
    for part in ("module", "critic_module", "ema"):
        for name, tensor in a[part].items():
            if not tensor.is_floating_point():
                continue
            scale = max(float(b[part][name].abs().max()), 1e-2)
            worst = float((tensor - b[part][name]).abs().max()) / scale
            assert worst < TOLERANCE, (part, name, worst)


def test_two_ranks_match_one_process_with_the_same_global_batch(two_ranks: Path, one_process: Path) -> None:
    assert_near(state_of(two_ranks), state_of(one_process))
    for name in ("loss", "adversarial_weight", "d_loss", "bpp", "kl_bits_per_pixel", "gradient_norm"):
        a, b = ([line.get(name, 0.0) for line in log(out, "step")] for out in (two_ranks, one_process))
        assert a == pytest.approx(b, rel=5e-3, abs=1e-5), name  # values are averages over all ranks
        assert a[:2] == pytest.approx(b[:2], rel=1e-5), name


@pytest.mark.slow
def test_accumulation_matches_one_batch_through_twenty_steps(shards: Path, tmp_path: Path, one_process: Path) -> None:
    out = tmp_path / "r"
    assert main(command(shards, out, 1, "optim.accumulate=4")) == 0
    assert_near(state_of(out), state_of(one_process))


def test_every_held_out_sample_counts_once_over_ranks(two_ranks: Path, one_process: Path) -> None:
    for out in (two_ranks, one_process):
        assert [line["n_validated"] for line in log(out, "validation")] == [2.0, 2.0]
    a, b = (log(out, "validation")[-1] for out in (two_ranks, one_process))
    assert a["psnr"] == pytest.approx(b["psnr"], abs=0.05)
    assert {"raw_psnr", "psnr", "loss", "bpp_q50"} <= a.keys()


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_of_them_after_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    script = (
        "import os, signal, sys\n"
        "from train.trainer import Trainer\n"
        "from train.cli import main\n"
        "step = Trainer.step_on\n"
        "def signalled(self, batches):\n"
        "    if self.progress.step == 2 and self.accelerator.process_index == 1: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return step(self, batches)\n"
        "Trainer.step_on = signalled\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    path = tmp_path / "signalled.py"
    path.write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, *TORCHRUN, "2", str(path)]
    done = subprocess.run(
        [*launcher, *command(shards, out, 2)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert state_of(out)["progress"]["step"] == 3
    assert not (out / "model").exists()


@pytest.mark.slow
def test_two_machines_through_accelerate_launch_equal_two_ranks_on_one(
    shards: Path, two_ranks: Path, tmp_path: Path
) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "r"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    machines = []
    for rank in (0, 1):
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
        launcher += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        arguments = [sys.executable, *launcher, "-m", "train", *command(shards, out, 2)]
        machines.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL))
    assert [machine.wait(timeout=240) for machine in machines] == [0, 0]
    ends = [log(folder, "checkpoint")[-1]["parameters"] for folder in (out, two_ranks)]
    assert len(set(ends[0])) == 1
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_rank_whose_data_fail_stops_all_after_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "r", tmp_path / "failing.py"
    path.write_text(
        "import sys\n"
        "from codec.errors import UsageError\n"
        "from train.trainer import Trainer\n"
        "from train.cli import main\n"
        "fetch = Trainer._fetch\n"
        "def failing(self, batches):\n"
        "    if self.progress.step == 2 and self.ranks.index == 1: raise UsageError('the disk has gone')\n"
        "    return fetch(self, batches)\n"
        "Trainer._fetch = failing\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, *TORCHRUN, "2", str(path)]
    done = subprocess.run(
        [*launcher, *command(shards, out, 2)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    assert "error: the disk has gone" in done.stderr
    assert "error: rank 0: another rank could not read its data" in done.stderr
    assert state_of(out)["progress"]["step"] == 2
