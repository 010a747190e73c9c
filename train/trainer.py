"""The training loop: one loop over a `Task`, under Accelerate.

    position -> batch -> task.generator_step -> sum of losses -> backward, clip, finite check, step -> EMA
             -> log.jsonl / validation / checkpoints -> at the end: export of the averaged weights

A critic step (the discriminator) has its place after the generator's; checkpoints hold what an exact resume needs.
"""

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import TextColumn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from codec import console, images
from codec.errors import UsageError
from codec.files import check_writable, write_atomic
from eval.environment import commit, hardware, versions
from train.config import Config, OptimConfig
from train.data import SampleSequence, batches
from train.task import Task


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite; raised before the optimizer step, with the step and the keys of the batch."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        images: images seen, over all ranks.
        time_s: seconds of training, without validation.
    """

    step: int = 0
    images: int = 0
    time_s: float = 0.0

    def fraction(self, n_images: int, time_limit_s: float) -> float:
        """The part of the run that is done, 0..1: of the images or of the time (0 = no limit), whichever is further."""
        of_time = self.time_s / time_limit_s if time_limit_s > 0 else 0.0
        return min(1.0, max(self.images / n_images, of_time))


def learning_rate(config: OptimConfig, images_seen: int, fraction: float) -> float:
    """Return the learning rate: linear warm-up, then constant or cosine (Loshchilov & Hutter, arXiv:1608.03983)."""
    warm = min(1.0, images_seen / config.warmup_images) if config.warmup_images else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    low = config.final_lr_ratio
    return config.lr * warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fraction)))


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """Return a float32 exponential moving average of a module, decay min(decay, (1 + t) / (10 + t)) at update t."""

    def update(averages: Any, values: Any, count: torch.Tensor | int) -> None:
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(values), rate)

    average = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    return average.eval().requires_grad_(False)


class Trainer:
    """Runs one recipe to its end."""

    def __init__(self, config: Config, task: Task, sequence: SampleSequence) -> None:
        """Prepare a run.

        Args:
            config: the resolved recipe; `run.out` must be set.
            task: what is trained.
            sequence: the training samples by position.
        """
        self.config = config
        self.task = task
        self.out = Path(config.run.out)
        self.progress = Progress()
        self.accelerator = Accelerator(
            mixed_precision=config.run.precision, gradient_accumulation_steps=config.optim.accumulate
        )
        self.device = self.accelerator.device
        task.to(self.device)
        # Copied before Accelerate puts autocast around forward: the average is evaluated and exported in float32.
        self.ema = averaged(task.module.to(self.device), config.optim.ema_decay)
        self.module = self.accelerator.prepare_model(task.module)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        self._sequence = sequence
        self._share = 0.0  # the part of the run that is done
        self._bad: Counter[str] = Counter()
        self._last_validation: dict[str, float] = {}

    def _batches(self, sequence: SampleSequence) -> Iterator[dict[str, Any]]:
        """Read on from where the run stands."""
        loader = batches(  # sharded by rank here and nowhere else: the loader is never given to accelerator.prepare
            sequence,
            self.config.optim.batch_size,
            self.config.data.workers,
            rank=self.accelerator.process_index,
            n_ranks=self.accelerator.num_processes,
            start=self.progress.images,
        )
        try:
            yield from loader
        except UsageError as exception:  # out of a worker process it comes with that process's traceback in front
            reason = str(exception).strip().splitlines()[-1]
            raise UsageError(reason.removeprefix("codec.errors.UsageError: ")) from exception

    def run(self) -> dict[str, Any]:
        """Train, validate, checkpoint and export; return what the model folder's export reported.

        Raises:
            NonFiniteError: a loss or gradient is not finite.
            KeyboardInterrupt: after a checkpoint of what was reached.
        """
        config, main = self.config, self.accelerator.is_main_process
        if main:
            self._record_start()
        next_validation, next_checkpoint = config.run.validate_every, config.run.checkpoint_every
        columns = (TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[losses]}"))
        with console.progress(*columns, disable=not main) as bar:
            task = bar.add_task("", total=config.run.n_images, speed="", losses="")
            sequence = None
            with _interrupts() as interrupted:
                while self._share < 1.0 and not interrupted:
                    if (stage := self._sequence.stage(self._share)) is not sequence:
                        sequence, iterator = stage, self._batches(stage)
                    losses = self._step(iterator)
                    if self.progress.step % config.run.log_every == 0:
                        self._log({"lr": self.optimizer.param_groups[0]["lr"], **losses})
                    seen = self.progress.images
                    bar.update(
                        task,
                        completed=seen,
                        total=max(seen, round(seen / self._share)),  # a time limit ends the run before n_images
                        speed=f"{seen / max(self.progress.time_s, 1e-9):.1f}/s",
                        losses=_brief(losses),
                    )
                    if seen >= next_validation and self._share < 1.0:
                        next_validation += config.run.validate_every
                        self._validate(bar)
                    if seen >= next_checkpoint and self._share < 1.0:
                        next_checkpoint += config.run.checkpoint_every
                        self.checkpoint()
            self.checkpoint()
            if interrupted:
                raise KeyboardInterrupt
            self._validate(bar)
        self.accelerator.wait_for_everyone()
        return self._export() if main else {}

    def _fraction(self) -> float:
        """Progress of the run; the same on every rank, whose clocks differ."""
        fraction = self.progress.fraction(self.config.run.n_images, 60 * self.config.run.time_limit_min)
        if self.accelerator.num_processes > 1 and self.config.run.time_limit_min > 0:
            fraction = float(self.accelerator.reduce(torch.tensor(fraction, device=self.device), reduction="mean"))
        return fraction

    def _step(self, iterator: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step over `accumulate` batches; returns the mean losses of this rank."""
        config, start = self.config.optim, time.perf_counter()
        rate = learning_rate(config, self.progress.images, self._share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, float] = {}
        keys: list[str] = []
        for micro in range(config.accumulate):
            batch = next(iterator)
            keys += batch["key"]
            self._count_bad(batch["bad"])
            batch["image"] = batch["image"].to(self.device, non_blocking=True)
            generator = torch.Generator().manual_seed(self._noise_seed(micro))
            last = micro == config.accumulate - 1
            # Gradients are reduced over ranks once, with the last batch.
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                losses = self.task.generator_step(self.module, batch, generator)
                total = torch.stack(list(losses.values())).sum()
                self._require_finite(total, losses, keys)
                self.accelerator.backward(total)  # divides by the number of accumulated batches
            for name, value in {"loss": total, **losses}.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.clip_norm or math.inf)
        self._require_finite(norm, {"gradient norm": norm}, keys)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.task.module)
        self.progress.step += 1
        self.progress.images += config.batch_size * config.accumulate * self.accelerator.num_processes
        self.progress.time_s += time.perf_counter() - start
        self._share = self._fraction()
        return {**totals, "gradient_norm": float(norm)}

    def _noise_seed(self, micro: int) -> int:
        """A seed that depends on the run's seed, the step, the batch in it and the rank, and on nothing else."""
        position = (self.progress.step * self.config.optim.accumulate + micro) * self.accelerator.num_processes
        words = np.random.SeedSequence((self.config.run.seed, 2, position + self.accelerator.process_index))
        return int(words.generate_state(1, np.uint64)[0] >> 1)

    def _require_finite(self, value: torch.Tensor, parts: Mapping[str, torch.Tensor], keys: list[str]) -> None:
        if bool(torch.isfinite(value)):
            return
        what = ", ".join(f"{name} = {float(part):g}" for name, part in parts.items())
        raise NonFiniteError(f"step {self.progress.step}: not finite: {what}; samples: {' '.join(keys)}")

    def _count_bad(self, bad: list[tuple[str, str]]) -> None:
        for key, reason in bad:
            if not self._bad[key]:
                console.error(f"sample {key}: {reason} (replaced; listed in {self.out / 'bad_samples.jsonl'})")
                with (self.out / "bad_samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reason": reason, "images": self.progress.images}) + "\n")
            self._bad[key] += 1

    def _log(self, values: Mapping[str, float], event: str = "step") -> None:
        if self.accelerator.is_main_process:
            line = {"event": event, **vars(self.progress), **values}
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _validate(self, bar: Any) -> None:
        """Measure the averaged weights on the held-out images, on the main rank; the others wait."""
        if self.accelerator.is_main_process:
            metrics, picture = self.task.evaluate(self.ema.module, self.device)
            if picture is not None:
                path = self.out / "validation" / f"images-{self.progress.images:09d}.png"
                write_atomic(path, images.save_png(picture))
                self._log(metrics, "validation")
                text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                bar.console.print(f"{self.progress.images} images: {text}; {path}")
            self._last_validation = metrics
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> None:
        """Write everything that continues the run to checkpoints/last.pt, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        folder = self.out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".last.{os.getpid()}.tmp"
        try:
            torch.save(
                {
                    "config": self.config.to_dict(),
                    "progress": vars(self.progress),
                    "module": self.task.module.state_dict(),
                    "ema": self.ema.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                },
                temporary,
            )
            temporary.replace(folder / "last.pt")
        except (OSError, RuntimeError) as exception:  # torch's writer raises RuntimeError on a full disk
            raise UsageError(f"{folder}: cannot write the checkpoint: {exception}") from exception
        finally:
            temporary.unlink(missing_ok=True)

    def _record_start(self) -> None:
        (self.out / "validation").mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / "config.json", (json.dumps(self.config.to_dict(), indent=2) + "\n").encode())
        write_atomic(self.out / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
        for name, text in self.task.describe().items():
            console.stderr.print(f"{name}: {text}")
        ranks = self.accelerator.num_processes
        console.stderr.print(
            f"run: {self.out}, {ranks} rank(s) on {self.device.type}, precision {self.config.run.precision}, "
            f"{self.config.optim.batch_size * self.config.optim.accumulate * ranks} images a step"
        )

    def _export(self) -> dict[str, Any]:
        record = {
            "images_seen": self.progress.images,
            "steps": self.progress.step,
            "time_s": round(self.progress.time_s, 1),
            "validation": self._last_validation,
            "n_bad_samples": sum(self._bad.values()),
            "losses": self.task.describe()["loss"],
            **{name: value for name, value in environment().items() if name != "command"},  # it holds local paths
        }
        return self.task.export(self.ema.module, self.out / "model", record, self.device)


def _brief(losses: Mapping[str, float]) -> str:
    """The weighted terms, short enough for a progress bar of 80 columns; log.jsonl has them in full."""
    return " ".join(f"{name[:4]} {losses[name]:.2f}" for name in losses if name not in ("loss", "gradient_norm"))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT instead of raising in the middle of a step; yields a list that is empty until one came.

    A second one raises KeyboardInterrupt at once.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield seen
        return

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def check_run_folder(out: str) -> Path:
    """Return the run folder, created and writable.

    Raises:
        UsageError: none was named, it holds a run already, or it cannot be written.
    """
    if not out:
        raise UsageError("where to? Set run.out=FOLDER")
    path = Path(out)
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UsageError(f"{path}: not empty; name a new folder for run.out")
    check_writable(path)
    return path


def environment() -> dict[str, Any]:
    """Return command, commit, versions and hardware of this run."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": commit(), "versions": versions(), "hardware": hardware()}
