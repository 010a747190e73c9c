"""`codec-train bench`: both sides compute the same; what the command writes. Speeds are not tested."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codec.errors import UsageError
from codec.pixels import to_float
from codec.shards import read_index
from tests.conftest import photo
from train.bench import Bench, Effort, alternate, build, comparable, flops_per_image, random_batches, until_memory_ends
from train.bench_loader import compare_loaders, webdataset_batches
from train.bench_plain import PlainLoop
from train.cli import main
from train.config import Config
from train.draws import POSTERIOR, normal
from train.recipe import load_recipe
from train.trainer import Trainer

GAME = ["adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1"]


def config_of(shards: Path, *overrides: str, recipe: str = "tiny") -> Config:
    # torch's own initialisation: the linear one starts residual branches at zero, where half of them has no gradient
    return comparable(load_recipe(recipe, ["model.init=diffusers", *GAME, *overrides]), str(shards))[0]


def images_of(n: int = 4, side: int = 64) -> torch.Tensor:
    return torch.stack([to_float(photo(side, side, seed=seed)) for seed in range(n)])


def noise_of(trainer: Trainer, n: int = 4, side: int = 64) -> torch.Tensor:
    """What the trainer draws in its first step."""
    task: Any = trainer.task
    return normal(trainer.config.run.seed, POSTERIOR, range(n), (task._channels, side // task.f, side // task.f))


def step_of(trainer: Trainer, x: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One step of ours: its values, and the clipped gradients that the optimizers have used."""
    gradients = {}
    assert trainer.critic is not None
    for prefix, side in (("g.", trainer.generator), ("d.", trainer.critic)):

        def note(*_: Any, prefix: str = prefix, module: torch.nn.Module = side.module) -> None:
            gradients.update({prefix + name: p.grad.clone() for name, p in module.named_parameters()})

        side.optimizer.register_step_pre_hook(note)
    values = trainer.step(iter([{"image": x, "key": ["a"] * len(x), "bad": []}]))
    return values, gradients


@pytest.mark.parametrize(
    "overrides",
    [
        ["adversarial.adaptive=false", "kl.reduction=image", "kl.weight=1e-5"],
        ["loss.pixel=l2", "adversarial.loss=non-saturating", "adversarial.adaptive_cap=1e6"],
        ["adversarial.loss=vanilla", "adversarial.round_fakes=false", "adversarial.adaptive_cap=0.01"],
        ["model.family=tiny", "model.block_out_channels=[8, 8]", "kl.weight=0.0"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_both_sides_take_the_same_step(overrides: list[str], shards: Path, tmp_path: Path, backbone: Path) -> None:
    losses = ["loss.perceptual=sqz10", f"loss.features={backbone}", "loss.ms_ssim_weight=0.5"]
    config = config_of(shards, *losses, *overrides)
    trainer = build(config, tmp_path)
    plain = PlainLoop(config, trainer)
    task: Any = trainer.task
    weights = {name: p.detach().clone() for name, p in task.module.network.named_parameters()}
    x = images_of()
    theirs = {name: float(loss) for name, loss in plain.step(x, noise_of(trainer)).items()}
    if config.adversarial.adaptive:  # ours measures the ratio and uses it from the next step on
        assert plain.ratio is not None
        task.adversary.ratio = float(plain.ratio)
    ours, gradients = step_of(trainer, x)
    assert set(theirs) == {"loss", config.loss.pixel, "perceptual", "ms_ssim", "adversarial", "d_loss"} | (
        {"kl"} if config.kl.weight > 0 else set()
    )
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-3)
    if config.adversarial.adaptive:
        assert plain.ratio is not None
        assert min(task.adversary.ratio, config.adversarial.adaptive_cap) == pytest.approx(float(plain.ratio), rel=1e-3)
    expected = {f"g.network.{name}": p.grad for name, p in plain.network.named_parameters()}
    expected |= {f"d.{name}": p.grad for name, p in plain.discriminator.named_parameters()}
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        assert scale > 0 or name.startswith("d.")  # a hinge's bias: real and fake cancel out
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-3 * scale + 1e-7, msg=name)
    moved = same = n = 0
    updated = dict(plain.network.named_parameters())
    for name, weight in task.module.network.named_parameters():
        moved += int((weight != weights[name]).sum())
        same += int(((weight - updated[name]).abs() < 1e-2 * config.optim.lr).sum())
        n += weight.numel()
    assert moved > 0.5 * n  # by the learning rate at first: AdamW divides a gradient by its size
    assert same > 0.98 * n


def test_the_plain_loop_learns_goes_on_averaging_and_follows_its_own_ratio(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards)
    plain = PlainLoop(config, build(config, tmp_path))
    before = [average.clone() for average in plain._averages]
    x = images_of()
    losses = [plain.step(x) for _ in range(12)]
    assert float(losses[-1]["l1"]) < 0.9 * float(losses[0]["l1"])
    assert float(losses[-1]["d_loss"]) != float(losses[0]["d_loss"])
    for average, start, weight in zip(plain._averages, before, plain._weights, strict=True):
        assert not torch.equal(average, start)
        assert float((average - start).norm()) < 0.1 * float((weight.detach() - start).norm())  # decay 0.999


def test_recipes_are_brought_to_what_both_sides_can_compute() -> None:
    config, changed = comparable(load_recipe("f8c4"), "folder")
    assert changed == {"latents.equivariance": 0.0, "optim.accumulate": 1}
    assert (config.data.shards, config.adversarial.weight, config.run.out) == ("folder", 0.5, "")
    assert comparable(load_recipe("tiny-f8c8"), "folder")[1] == {
        "data.final_crop": 0,
        "data.cache_mb": 0.0,
        "adversarial.weight": 0.5,
        "rate.probability": 0.0,
    }
    with pytest.raises(UsageError, match="fp16"):
        comparable(load_recipe("tiny", ["run.precision=fp16"]), "folder")


def test_sides_take_turns_in_blocks() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in ("ours", "plain")}
    blocks = alternate(sides, 2, 3, torch.device("cpu"))
    assert "".join(call[0] for call in calls[-12:]) == "oopp" * 3
    assert calls.count("ours") == calls.count("plain")
    assert [len(block) for block in blocks["ours"]] == [2, 2, 2]


def test_the_operations_of_a_step_grow_with_the_pixels(shards: Path, tmp_path: Path) -> None:
    small, large = (config_of(shards, f"data.crop={side}", "adversarial.layers=2") for side in (64, 128))
    flops = [flops_per_image(config, tmp_path)[0] for config in (small, large)]
    assert flops[1] / flops[0] == pytest.approx(4, rel=0.1)
    first_convolution = 2 * 64 * 64 * 9 * 3 * 8
    assert flops[0] > 20 * first_convolution


def test_batches_double_until_the_memory_ends(shards: Path, tmp_path: Path) -> None:
    def measure(size: int) -> dict[str, Any]:
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return {"images_per_s": 1.0}

    rows = until_memory_ends((2 << n for n in itertools.count()), measure, {"setting": "eager"})
    assert [row["batch_size"] for row in rows] == [2, 4, 8, 16]
    assert [row.get("unavailable") for row in rows] == [None] * 3 + [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    ]
    bench = Bench(config_of(shards), tmp_path, Effort(steps=1, repeats=2), flops=1e9, peak_tflops=0.5)
    (row,) = bench.by_batch_size("channels_last")
    assert row["batch_size"] == 4
    assert row["share_of_peak"] == pytest.approx(row["images_per_s"] * 1e9 / 0.5e12)


def test_webdataset_gives_batches_like_ours(shards: Path) -> None:
    urls = sorted({str(sample.shard) for sample in read_index(shards)})
    batch = next(iter(webdataset_batches(urls, 3, 96, True, 0)))  # some images are smaller
    assert (batch.shape, batch.dtype) == ((3, 3, 96, 96), torch.float32)
    assert float(batch.min()) >= -1
    assert float(batch.max()) <= 1
    assert float(batch.std()) > 0.05


@pytest.mark.slow
def test_all_readers_are_measured_with_the_same_workers(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards, "data.workers=1")
    found = compare_loaders(config, tmp_path, 1, 1)
    assert [row["workers"] for row in found["rows"]] == [0, 1]
    for row in found["rows"]:
        assert {name: len(blocks) for name, blocks in row["blocks_images_per_s"].items()} == {
            "ours": 1,
            "webdataset": 1,
            "decoding": 1,
        }
        assert all(rate > 0 for rate in row["images_per_s"].values())
    assert (found["formats"], found["n_samples"]) == ({"png": 12}, 12)


@pytest.mark.slow
def test_the_command_writes_what_it_measured(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    temporary = tmp_path / "temporary"
    for folder in (work, temporary):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    options = ["--steps", "2", "--repeats", "2", "--no-compile", "--peak-tflops", "1", "-o", str(work / "bench.json")]
    assert main(["bench", "tiny", f"data.shards={shards}", *GAME, *options]) == 0
    assert [path.name for path in work.iterdir()] == ["bench.json"]
    assert not list(temporary.iterdir())
    result = json.loads((work / "bench.json").read_text())
    assert {"command", "commit", "versions", "hardware"} <= set(result)
    assert (result["recipe"], result["batch_size"], result["device"]) == ("tiny", 4, "cpu")
    assert [row["setting"] for row in result["step"]] == ["eager", "channels_last"]
    for row in result["step"]:
        for side in ("ours", "plain"):
            times = row["blocks_s"][side]
            assert [len(block) for block in times] == [2, 2]
            assert row[f"{side}_s"] == pytest.approx(float(torch.tensor(times).quantile(0.5)))
        assert row["plain_over_ours"] == pytest.approx(row["plain_s"] / row["ours_s"])
        assert row["images_per_s"] == pytest.approx(4 / row["ours_s"])
        assert 0 < row["share_of_peak"] < 1
    assert [row["workers"] for row in result["loader"]["rows"]] == [0]
    assert "throughput" not in result
    printed = capsys.readouterr().out
    assert "plain/ours" in printed
    assert "12 png in 1 shard(s)" in printed


def test_random_tensors_need_no_shards(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ["--random", "--steps", "1", "--repeats", "1", "--no-compile", "-o", str(out)]
    assert main(["bench", "tiny", *GAME, *options]) == 0
    result = json.loads(out.read_text())
    assert result["data"] == "random"
    assert result["config"]["data"]["shards"] == ""
    assert "loader" not in result
    assert result["peak_tflops"] is result["step"][0]["share_of_peak"] is None
    assert all(math.isfinite(row["plain_over_ours"]) for row in result["step"])
    x = random_batches(replace(load_recipe("tiny")), 2)[1]["image"]
    assert x.shape == (4, 3, 64, 64)
    assert -1 <= float(x.min()) < -0.9 < 0.9 < float(x.max()) <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tiny"], "measured on what? Set data.shards=FOLDER"),
        (["tiny", "data.mode=streaming"], "Set data.local_shards=FOLDER"),
        (["tiny", "data.shards=nowhere"], "nowhere: no such folder"),
        (["tiny", "--random", "run.precision=fp16"], "run.precision = fp16"),
        (["tiny", "--random", "data.crop=8"], "data.crop: crops of 8 x 8"),
        (["tiny", "--random", "--steps", "0"], "--steps"),
        (["nosuch", "--random"], "nosuch: no such recipe file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_largest_batch_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tiny", "--random", "--largest-batch"]) == 2
    assert "--largest-batch: needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_memory_and_the_largest_batch_are_measured(tmp_path: Path) -> None:
    config = load_recipe("tiny", [*GAME, "run.precision=bf16"])
    bench = Bench(comparable(config, "")[0], tmp_path, Effort(steps=2, repeats=1))
    rows = until_memory_ends([4, 8], lambda size: bench._alone("channels_last", size), {})
    assert [row["batch_size"] for row in rows] == [4, 8]
    assert 0 < rows[0]["peak_memory_gb"] < rows[1]["peak_memory_gb"]
