"""What a recipe's training costs, measured: our step against a plain eager loop, our loader against webdataset.

    recipe -> comparable config -> Trainer.step ------+
                                -> PlainLoop.step ----+-> blocks of steps, in turn -> plain time / our time
                                -> Trainer.step, ever larger batches (GPU) ---------> images/s, share of peak, memory
    shards -> Feed | webdataset | Pillow alone -> blocks of batches, in turn -------> images/s  (`train.bench_loader`)

Both sides of a comparison run in one process, by turns, with equal weights, batches and threads.
"""

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from codec.errors import UsageError
from codec.images import save_png
from codec.shards import read_index
from train.bench_loader import compare_loaders
from train.bench_plain import PlainLoop
from train.config import Config
from train.feed import Feed
from train.networks import decoder_only
from train.run import prepare
from train.shards import write_shards
from train.trainer import Trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "eager": {"channels_last": False, "compile": False},
    "channels_last": {"channels_last": True, "compile": False},
    "channels_last, compile": {"channels_last": True, "compile": True},
}
"""What our side is measured with; the plain loop is always eager, contiguous."""

PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peak by what stands in a GPU's name; the first that fits."""

_WARM_UP = 3  # steps of each side; the adaptive weight counts from the second on
_BATCHES = 4  # different ones, taken in turn


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        steps: steps, or batches for the loaders, in a block; >= 1.
        repeats: blocks of each side; >= 1.
        compiled: also with torch.compile.
        largest: also double the batch until the GPU's memory is used up.
    """

    steps: int = 10
    repeats: int = 5
    compiled: bool = True
    largest: bool = False


def run_bench(
    config: Config,
    effort: Effort,
    *,
    random: bool = False,
    peak_tflops: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a recipe; nothing is left on the disk.

    Args:
        config: the recipe.
        effort: how much is measured.
        random: random tensors in place of images, and no loader.
        peak_tflops: of the hardware, in the recipe's precision; None looks it up by the GPU's name.
        say: told what is being measured.

    Raises:
        UsageError: no shards, a recipe that cannot be trained or compared, `largest` without a GPU.
        TrainingError: losses stay not finite.
    """
    if config.model.condition != "none":
        raise UsageError("model.condition = class: the loop that it is measured beside tells no class; set it to none")
    if effort.largest and not torch.cuda.is_available():
        raise UsageError("--largest-batch: needs a GPU; on a CPU the system kills what takes too much memory")
    with tempfile.TemporaryDirectory(prefix="codec-train-bench-") as name:
        folder = Path(name)
        config, changed = comparable(config, _one_image(folder, config.data.crop) if random else _shards(config))
        say("operations of a step")
        flops, device = flops_per_image(config, folder)
        peak = peak_tflops or _peak_of(config, device)
        bench = Bench(config, folder, effort, flops, peak, say)
        result: dict[str, Any] = {
            "batch_size": config.optim.batch_size,
            "crop": config.data.crop,
            "precision": config.run.precision,
            "device": device.type,
            "data": "random" if random else "shards",
            "changed": changed,
            "config": (replace(config, data=replace(config.data, shards="")) if random else config).to_dict(),
            "gflop_per_image": flops / 1e9,
            "peak_tflops": peak,
        }
        batches = random_batches(config) if random else _real_batches(config, folder)
        result["step"] = [bench.against_plain(setting, batches) for setting in bench.settings]
        if not random:
            result["loader"] = compare_loaders(config, folder, effort.steps, effort.repeats, say)
        if device.type == "cuda":
            result["throughput"] = [row for setting in bench.settings for row in bench.by_batch_size(setting)]
        return result


def comparable(config: Config, shards: str) -> tuple[Config, dict[str, Any]]:
    """Return a recipe as the plain loop can follow it: adversarial from the first step, everything else constant.

    Args:
        config: the recipe.
        shards: folder of indexed shards.

    Returns:
        The config, without `run.out`, and what was changed besides shards and length: dotted names, new values.

    Raises:
        UsageError: its precision is fp16, which the plain loop has no loss scaling for.
    """
    if config.run.precision == "fp16":
        raise UsageError("run.precision = fp16: the plain loop has no loss scaling; compare with bf16 or no")
    changes: dict[str, dict[str, Any]] = {
        "model": {"teacher": "", "image_channels": 3} | ({"trainable": "all"} if decoder_only(config.model) else {}),
        "data": {
            "mode": "indexed",
            "samples": "image",
            "crops": (),
            "final_crop": 0,
            "aspect_buckets": 0,
            "cache_mb": 0.0,
        },
        "loss": {"pixel": config.loss.pixel if config.loss.pixel in ("l1", "l2") else "l1", "learned_scale": False},
        "kl": {"schedule": "constant", "free_bits": 0.0},
        "adversarial": {"weight": config.adversarial.weight or 0.5, "r1_weight": 0.0, "lecam_weight": 0.0},
        "latents": {"equivariance": 0.0, "noise": 0.0, "alignment_weight": 0.0, "anchor_weight": 0.0},
        "rate": {"probability": 0.0},
        "optim": {"accumulate": 1},
    }
    changes["data"]["random_resize"] = 1.0
    changed = {
        f"{section}.{name}": value
        for section, values in changes.items()
        for name, value in values.items()
        if getattr(getattr(config, section), name) != value
    }
    changes["model"]["trainable"] = "all"
    changes["data"] |= {"shards": shards, "n_validation": 0}
    changes["adversarial"] |= {"start": "0", "warmup": "0", "ramp": "0"}
    changes["optim"] |= {"schedule": "constant", "warmup_images": 0}
    changes["run"] = {"out": "", "resume": "", "state": "", "n_images": 2**40, "time_limit_min": 0.0, "trackers": ()}
    parts: dict[str, Any] = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **parts), changed


@dataclass(frozen=True)
class Bench:
    """Measures the steps of one comparable config.

    Attributes:
        config: of `comparable`.
        folder: takes the run folders.
        effort: how much is measured.
        flops: of a step, per image.
        peak_tflops: of the hardware; None = not known.
        say: told what is being measured.
    """

    config: Config
    folder: Path
    effort: Effort
    flops: float = 0.0
    peak_tflops: float | None = None
    say: Callable[[str], None] = lambda text: None

    @property
    def settings(self) -> list[str]:
        """What of `SETTINGS` is measured."""
        return [name for name, setting in SETTINGS.items() if self.effort.compiled or not setting["compile"]]

    def against_plain(self, setting: str, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Measure our step under a setting and the plain loop's, by turns; a row of the result."""
        self.say(f"step: {setting}")
        row: dict[str, Any] = {"setting": setting, **SETTINGS[setting]}
        try:
            blocks = self._blocks(setting, batches)
        except torch._dynamo.exc.TorchDynamoException as exception:  # no compiler here, or one that cannot
            return row | {"unavailable": _first_line(exception)}
        finally:
            free()
        row["blocks_s"] = blocks
        row |= {f"{side}_s": median(itertools.chain(*times)) for side, times in blocks.items()}
        row["plain_over_ours"] = row["plain_s"] / row["ours_s"]
        return row | self._speed(self.config.optim.batch_size, row["ours_s"])

    def _blocks(self, setting: str, batches: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
        trainer = self._trainer(setting, self.config.optim.batch_size)
        plain = PlainLoop(self.config, trainer)
        batches = [{**batch, "image": batch["image"].to(trainer.device)} for batch in batches]
        ours = itertools.cycle(batches)
        theirs = itertools.cycle([batch["image"] for batch in batches])
        sides = {"ours": lambda: trainer.step(ours), "plain": lambda: plain.step(next(theirs))}
        return alternate(sides, self.effort.steps, self.effort.repeats, trainer.device)

    def by_batch_size(self, setting: str) -> list[dict[str, Any]]:
        """Measure our step alone, at the recipe's batch size or at ever larger ones; a row for each."""
        first = self.config.optim.batch_size
        sizes: Iterable[int] = (first << n for n in itertools.count()) if self.effort.largest else [first]
        return until_memory_ends(sizes, lambda size: self._alone(setting, size), {"setting": setting})

    def _alone(self, setting: str, batch_size: int) -> dict[str, Any]:
        self.say(f"throughput: {setting}, batch {batch_size}")
        trainer = self._trainer(setting, batch_size)
        device = trainer.device
        optim = replace(self.config.optim, batch_size=batch_size)
        (batch,) = random_batches(replace(self.config, optim=optim), 1)
        batches = itertools.repeat({**batch, "image": batch["image"].to(device)})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        blocks = alternate({"ours": lambda: trainer.step(batches)}, self.effort.steps, self.effort.repeats, device)
        row: dict[str, Any] = {"blocks_s": blocks, "ours_s": median(itertools.chain(*blocks["ours"]))}
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
        return row | self._speed(batch_size, row["ours_s"])

    def _speed(self, batch_size: int, step_s: float) -> dict[str, float | None]:
        tflops = self.flops * batch_size / step_s / 1e12
        share = tflops / self.peak_tflops if self.peak_tflops else None
        return {"images_per_s": batch_size / step_s, "tflops": tflops, "share_of_peak": share}

    def _trainer(self, setting: str, batch_size: int) -> Trainer:
        optim = replace(self.config.optim, batch_size=batch_size)
        run = replace(self.config.run, **SETTINGS[setting])
        if run.compile:
            torch.compiler.reset()  # else a second batch size compiles for any size
        return build(replace(self.config, optim=optim, run=run), self.folder)


def build(config: Config, folder: Path) -> Trainer:
    """Build a trainer as `codec-train run` does, with a new run folder in `folder`.

    Raises:
        UsageError: see `train.run.prepare`; several processes.
    """
    trainer = prepare(replace(config, run=replace(config.run, out=tempfile.mkdtemp(dir=folder))))
    if trainer.accelerator.num_processes > 1:
        raise UsageError("bench measures one process: start it without torchrun or accelerate launch")
    task: Any = trainer.task
    task.adversary.started = (-1, 0.0)  # before the first step, which would otherwise announce it
    return trainer


def alternate(
    sides: Mapping[str, Callable[[], object]], steps: int, repeats: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Run sides in blocks of steps, by turns, after a warm-up of each; return the seconds of each step, by block."""
    for step in sides.values():
        for _ in range(_WARM_UP):
            step()
    blocks: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, step in sides.items():
            blocks[name].append(_timed(step, steps, device))
    return blocks


def _timed(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Time steps one by one; on a GPU all at once, since waiting for each would end the overlap with the next."""
    _finish(device)
    marks = [time.perf_counter()]
    for _ in range(steps):
        step()
        if device.type == "cpu":
            marks.append(time.perf_counter())
    if device.type == "cpu":
        return [after - before for before, after in itertools.pairwise(marks)]
    _finish(device)
    return [(time.perf_counter() - marks[0]) / steps] * steps


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def until_memory_ends(
    sizes: Iterable[int], measure: Callable[[int], dict[str, Any]], row: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure at one batch size after the other until the memory, or what the kernels can address, is used up.

    Args:
        sizes: batch sizes, growing.
        measure: what gives a row.
        row: what every row begins with.

    Returns:
        Rows; the last one says what ended it under "unavailable", where something did.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        found: dict[str, Any] = {}
        try:
            found = measure(size)
        except RuntimeError as exception:  # out of memory, a tensor of more than 2^31 values, a compiler that cannot
            found = {"unavailable": _first_line(exception)}
        free()  # out here, where no traceback holds the tensors any more
        rows.append({**row, "batch_size": size, **found})
        if "unavailable" in found:
            break
    return rows


def free() -> None:
    """Give the memory of networks that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def flops_per_image(config: Config, folder: Path) -> tuple[float, torch.device]:
    """Count the operations of our step: all networks and losses, forwards and backwards, per image.

    A multiply-add counts as two. Convolutions, products of matrices and attention count, nothing else; activations that
    are computed twice (`run.gradient_checkpointing`) count once.

    Returns:
        Operations, and the device that runs are on.
    """
    run = replace(config.run, gradient_checkpointing=False, channels_last=False, compile=False)
    single = replace(config, optim=replace(config.optim, batch_size=1), run=run)
    trainer = build(single, folder)
    with _Operations() as operations, sdpa_kernel(SDPBackend.MATH):  # the one that has a formula everywhere
        trainer.step(iter(random_batches(single, 1)))
    device = trainer.device
    del trainer
    free()
    return operations.flops, device


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by torch's own formulas; its FlopCounterMode also follows modules, and then fails in autograd.grad."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += float(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _peak_of(config: Config, device: torch.device) -> float | None:
    if device.type != "cuda" or config.run.precision == "no":
        return None
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in torch.cuda.get_device_name(device)), None)


def random_batches(config: Config, n: int = _BATCHES) -> list[dict[str, Any]]:
    """Return n batches of uniform noise, as the loader would give them."""
    size, side = config.optim.batch_size, config.data.crop
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.rand(size, 3, side, side, generator=generator) * 2 - 1, "key": ["random"] * size, "bad": []}
        for _ in range(n)
    ]


def _real_batches(config: Config, folder: Path) -> list[dict[str, Any]]:
    data, run = replace(config.data, workers=0, memory="none"), replace(config.run, out=tempfile.mkdtemp(dir=folder))
    feed = Feed(replace(config, data=data, run=run), read_index(Path(config.data.shards)), 1, 0, 1)
    return list(itertools.islice(feed.batches(0.0, 0), _BATCHES))


def _shards(config: Config) -> str:
    data = config.data
    shards = data.local_shards if data.mode == "streaming" else data.shards
    if not shards:
        name = "data.local_shards" if data.mode == "streaming" else "data.shards"
        raise UsageError(f"measured on what? Set {name}=FOLDER (codec-train shards writes one), or give --random")
    return shards


def _one_image(folder: Path, side: int) -> str:
    """Write shards of a single image, out of which a run is put together whose batches come from elsewhere."""
    (folder / "photos").mkdir()
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    (folder / "photos" / "noise.png").write_bytes(save_png(image, compress_level=0))
    write_shards([folder / "photos"], folder / "shards", jobs=1)
    return str(folder / "shards")


def _first_line(exception: Exception) -> str:
    return f"{type(exception).__name__}: {str(exception).strip().partition(chr(10))[0]}"
