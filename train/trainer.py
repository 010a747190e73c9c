"""The training loop: one loop over a `Task`, under Accelerate.

    positions -> batches -> task.generator_step -> backward -+
                         -> task.critic_step    -> backward -+-> finite check, clip, step -> EMA -> task.after_step
              -> log / validation / checkpoint -> at the end: export of the averaged weights

Everything that decides (whether gradients are finite, phases, signals, time) is equal on all ranks. Where a run stands
is the number of images seen; what is random is drawn from (seed, position). So a resumed run goes on exactly.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import TextColumn
from torch import nn

from codec import console
from train import signals
from train.averaging import averaged
from train.checkpoint import Checkpoints, random_state, set_random_state
from train.config import Config
from train.feed import Feed
from train.journal import Journal, environment
from train.module import force_eager
from train.precision import Side, autocast
from train.schedules import learning_rate_factor
from train.task import Step, Task, Terms, Values

_MAX_ROLLBACKS = 3


class TrainingError(ArithmeticError):
    """Training cannot go on: losses stay not finite, or ranks have drifted apart."""


class Preempted(Exception):
    """SIGTERM or SIGUSR1 came; the run is saved and can be resumed."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        images: images seen, over all ranks; the position in the run's sequence.
        time_s: seconds of training, without validation.
    """

    step: int = 0
    images: int = 0
    time_s: float = 0.0

    def fraction(self, n_images: int, time_limit_s: float) -> float:
        """The part of the run that is done, 0..1: of the images or of the time (0 = no limit), whichever is further."""
        of_time = self.time_s / time_limit_s if time_limit_s > 0 else 0.0
        return min(1.0, max(self.images / n_images, of_time))


class Trainer:
    """Runs one recipe to its end."""

    def __init__(self, config: Config, task: Task, feed: Feed, accelerator: Accelerator) -> None:
        """Prepare a run.

        Args:
            config: the resolved recipe; `run.out` must be set.
            task: what is trained.
            feed: where batches come from.
            accelerator: without mixed precision of its own: `train.precision` does that.
        """
        self.config = config
        self.task = task
        self.out = Path(config.run.out)
        self.progress = Progress()
        self.accelerator = accelerator
        self.device = accelerator.device
        self.feed = feed
        task.to(self.device)
        task.module.to(self.device)
        if task.critic is not None:
            task.critic.to(self.device)
        self.ema = averaged(task.module, config.optim.ema_decay)
        if config.run.compile:
            task.compile()
        optim, adversarial = config.optim, config.adversarial
        self.generator = self._side(task.module, task.parameter_groups(optim.lr), optim.betas, optim.weight_decay)
        self.critic: Side | None = None
        if task.critic is not None:
            groups = [{"params": list(task.critic.parameters()), "peak_lr": adversarial.lr or optim.lr}]
            self.critic = self._side(task.critic, groups, adversarial.betas, 0.0)
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.run.keep_last)
        self.journal = Journal(self.out, accelerator, config)
        self._autocast = autocast(config.run.precision, self.device)
        self._share = 0.0  # the part of the run that is done
        self._last_validation: dict[str, float] = {}
        self._best_loss = math.inf
        self._nonfinite = 0  # steps in a row
        self._rollbacks = 0  # without a finite step between

    def _side(self, module: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float], decay: float) -> Side:
        wrapped = self.accelerator.prepare_model(module)
        optimizer = torch.optim.AdamW(groups, lr=groups[0]["peak_lr"], betas=betas, weight_decay=decay)
        return Side(wrapped, optimizer, self.config.optim.clip_norm, self.config.run.precision == "fp16")

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self, batches: Iterator[dict[str, Any]]) -> Values:
        """Take one optimizer step over `accumulate` batches; return its values, averaged over batches and ranks."""
        optim, start = self.config.optim, time.perf_counter()
        factor = learning_rate_factor(
            optim.schedule, optim.final_lr_ratio, optim.warmup_images, self.progress.images, self._share
        )
        sides = [self.generator] + ([self.critic] if self.critic else [])
        for side in sides:
            side.set_rate(factor)
        collected: list[dict[str, torch.Tensor]] = []
        keys: list[str] = []
        critic_steps = False
        for micro in range(optim.accumulate):
            batch = next(batches)
            keys += batch["key"]
            batch["image"] = batch["image"].to(self.device, non_blocking=True)
            last = micro == optim.accumulate - 1
            where = self._where(micro)
            with self._reduced(self.generator.module, last):
                terms = self.task.generator_step(self.generator.module, batch, where)
                self.generator.backward(terms.objective / optim.accumulate)
            values = terms.values
            if self.critic is not None:
                critic_terms = self._critic_step(batch, terms.carry, where, last)
                if critic_terms is not None:
                    critic_steps = True
                    values = values | critic_terms.values
            collected.append(values)
        sides = sides if critic_steps else sides[:1]
        norms = {"gradient_norm": self.generator.finish()}
        if critic_steps and self.critic is not None:
            norms["d_gradient_norm"] = self.critic.finish()
        out = self._averaged(collected, norms)
        finite = all(math.isfinite(out[name]) for name in norms)
        for side in sides:
            side.update(finite)
        if finite:
            self._nonfinite = self._rollbacks = 0
            self.ema.update_parameters(self.task.module)
        elif not (self.generator.scaler.is_enabled() and math.isfinite(out["loss"])):  # else a scale found too large
            self._note_nonfinite(out, keys)
        for line in self.task.after_step(out, self._where(0), self._mean_over_ranks):
            self._say(line)
        self.progress.step += 1
        self.progress.images += self._images_per_step
        self.progress.time_s += time.perf_counter() - start
        self._share = self._fraction()
        return {"lr": self.generator.optimizer.param_groups[0]["lr"], **out}

    def _critic_step(self, batch: dict[str, Any], carry: Any, where: Step, last: bool) -> Terms | None:
        assert self.critic is not None
        with self._reduced(self.critic.module, last):
            terms = self.task.critic_step(self.critic.module, batch, carry, where)
            if terms is not None:
                self.critic.backward(terms.objective / self.config.optim.accumulate)
        return terms

    @property
    def _images_per_step(self) -> int:
        ranks: int = self.accelerator.num_processes
        return self.config.optim.batch_size * self.config.optim.accumulate * ranks

    def _where(self, micro: int) -> Step:
        """Where this rank's batch number `micro` of the step stands."""
        size, ranks = self.config.optim.batch_size, self.accelerator.num_processes
        first = self.progress.images + (micro * ranks + self.accelerator.process_index) * size
        return Step(
            number=self.progress.step,
            images=self.progress.images,
            share=self._share,
            seed=self.config.run.seed,
            positions=range(first, first + size),
            autocast=self._autocast,
        )

    def _reduced(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Reduce gradients over ranks once a step, with its last batch."""
        if last:
            return nullcontext()
        held: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return held

    def _mean_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        mean: torch.Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return mean

    def _averaged(self, collected: list[dict[str, torch.Tensor]], norms: dict[str, torch.Tensor]) -> Values:
        """Average values over batches and ranks, with one transfer from the device; norms are equal on all ranks."""
        names = list(collected[0])
        flat = torch.stack([torch.cat([values[name].float().flatten() for name in names]) for values in collected])
        flat = torch.cat([self._mean_over_ranks(flat.mean(0)), torch.stack(list(norms.values()))])
        numbers, at = flat.tolist(), 0
        out: Values = {}
        for name in names:
            n = collected[0][name].numel()
            out[name] = numbers[at : at + n] if collected[0][name].ndim else numbers[at]
            at += n
        return out | dict(zip(norms, numbers[at:], strict=True))

    def _note_nonfinite(self, values: Values, keys: list[str]) -> None:
        """Count a step that was left out; go back to the last checkpoint after too many in a row."""
        self._nonfinite += 1
        what = ", ".join(f"{name} = {value:g}" for name, value in values.items() if not _finite(value))
        text = f"step {self.progress.step}: not finite: {what}; step left out; samples: {' '.join(keys)}"
        self._say(text)
        self.journal.line("nonfinite", {**vars(self.progress), "text": text}, self.progress.images)
        if self._nonfinite < self.config.run.max_nonfinite:
            return
        found = self.checkpoints.newest() if self._rollbacks < _MAX_ROLLBACKS else None
        if found is None:
            raise TrainingError(f"{text}; {self._nonfinite} in a row, and no checkpoint helps")
        self._nonfinite = 0
        self._rollbacks += 1
        path, state = found
        self._load_weights(state)  # the position in the data stays: the same samples would do the same again
        self._say(f"{self.config.run.max_nonfinite} steps in a row were not finite: back to the weights of {path.name}")

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, validate, checkpoint and export; return what the model folder's export reported.

        Raises:
            TrainingError: losses or gradients stay not finite, or the ranks' parameters differ.
            Preempted: after a checkpoint, because of SIGTERM or SIGUSR1.
            KeyboardInterrupt: after a checkpoint, because of SIGINT.
        """
        config, main = self.config, self.accelerator.is_main_process
        self._record_start()
        columns = (TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[losses]}"))
        with console.progress(*columns, disable=not main) as bar:
            task = bar.add_task("", total=config.run.n_images, speed="", losses="")
            stage: bool | None = None
            batches: Iterator[dict[str, Any]] = iter(())
            with signals.requests() as request:
                asked, due = 0, False
                while self._share < 1.0:
                    asked = self._agreed(request)
                    if asked:
                        break
                    if (now := self.feed.stage(self._share)) is not stage:
                        stage, batches = now, self.feed.batches(self._share, self.progress.images)
                    before = self.progress.images
                    values = self.step(batches)
                    if self.progress.step % config.run.log_every == 0:
                        self.journal.line("step", {**vars(self.progress), **values}, self.progress.images)
                    seen = self.progress.images
                    bar.update(
                        task,
                        completed=seen,
                        total=max(seen, round(seen / self._share)),  # a time limit ends the run before n_images
                        speed=f"{seen / max(self.progress.time_s, 1e-9):.1f}/s",
                        losses=_brief(values),
                    )
                    ends = self._share >= 1.0
                    if not ends and _passed(config.run.validate_every, before, seen):
                        self.validate(bar)
                    due = due or _passed(config.run.checkpoint_every, before, seen)
                    if not ends and due and self._nonfinite == 0:  # never of weights that may be the reason
                        self.checkpoint()
                        due = False
            if not asked:
                self.validate(bar)
            self.checkpoint()
        if asked:
            raise KeyboardInterrupt if asked == signals.INTERRUPT else Preempted
        self.journal.close()
        self.accelerator.wait_for_everyone()
        return self.export() if main else {}

    def _agreed(self, request: signals.Request) -> int:
        """What the signals ask for, on any rank: all save at the same step."""
        if self.accelerator.num_processes == 1:
            return request.kind
        kinds = self.accelerator.gather(torch.tensor([request.kind], device=self.device))
        asked: int = kinds.max().item()
        return asked

    def _fraction(self) -> float:
        """Progress of the run; the same on every rank, whose clocks differ."""
        fraction = self.progress.fraction(self.config.run.n_images, 60 * self.config.run.time_limit_min)
        if self.accelerator.num_processes > 1 and self.config.run.time_limit_min > 0:
            fraction = float(self._mean_over_ranks(torch.tensor(fraction, device=self.device)))
        return fraction

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            console.stderr.print(f"{self.progress.images} images: {text}", markup=False, highlight=False)

    def validate(self, bar: Any = None) -> dict[str, float]:
        """Measure averaged and last weights on the held-out samples, each once over all ranks; see `Task.evaluate`."""
        rank, n_ranks = self.accelerator.process_index, self.accelerator.num_processes
        rows, picture = self.task.evaluate(self.ema.module, self.device, rank, n_ranks)
        self.task.module.eval()
        with force_eager():  # images come in many shapes: not worth compiling for
            raw_rows, _ = self.task.evaluate(self.task.module, self.device, rank, n_ranks)
        self.task.module.train()
        if n_ranks > 1:
            rows, raw_rows = gather_object(rows), gather_object(raw_rows)
        metrics = _means(rows) | {f"raw_{name}": value for name, value in _means(raw_rows).items()}
        if metrics:
            metrics["n_validated"] = float(len(rows))
        if picture is not None:
            path = self.journal.picture(picture, self.progress.images)
            text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.startswith("raw_"))
            self._say(f"{text}; {path}")
        self.journal.line("validation", {**vars(self.progress), **metrics}, self.progress.images)
        for line in self.task.after_validation(metrics, self._where(0)):
            self._say(line)
        self._last_validation = metrics
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write everything that continues the run, whole or not at all; see `train.checkpoint`.

        Raises:
            TrainingError: the ranks' parameters differ.
            UsageError: it cannot be written.
        """
        digests = self._digests()
        if len(set(digests)) > 1:
            raise TrainingError(f"the ranks have drifted apart at step {self.progress.step}: {' '.join(digests)}")
        ranks = [{"random": random_state(), "bad": self.feed.bad.state_dict()}]
        if self.accelerator.num_processes > 1:
            ranks = gather_object(ranks)
        loss = self._last_validation.get("loss", math.inf)
        best = loss < self._best_loss
        self._best_loss = min(loss, self._best_loss)
        if self.accelerator.is_main_process:
            self.checkpoints.save(self._state(ranks), self.progress.images, best)
        self.journal.line("checkpoint", {**vars(self.progress), "parameters": digests}, self.progress.images)
        self.accelerator.wait_for_everyone()

    def _state(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "config": json.loads(json.dumps(self.config.to_dict())),
            "progress": dict(vars(self.progress)),
            "module": self.task.module.state_dict(),
            "ema": self.ema.state_dict(),
            "generator": self.generator.state_dict(),
            "critic_module": None if self.task.critic is None else self.task.critic.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "task": self.task.state_dict(),
            "validation": self._last_validation,
            "best_loss": self._best_loss,
            "nonfinite": [self._nonfinite, self._rollbacks],
            "ranks": ranks,
            "environment": environment(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, on every rank."""
        self._load_weights(state)
        self.progress = Progress(**state["progress"])
        self._share = self._fraction()
        self._last_validation, self._best_loss = state["validation"], state["best_loss"]
        self._nonfinite, self._rollbacks = state["nonfinite"]
        if self.accelerator.process_index < len(state["ranks"]):  # with more ranks than before, the new ones start anew
            own = state["ranks"][self.accelerator.process_index]
            set_random_state(own["random"])
            self.feed.bad.load_state_dict(own["bad"])

    def _load_weights(self, state: dict[str, Any]) -> None:
        self.task.module.load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        self.generator.load_state_dict(state["generator"])
        if self.critic is not None and self.task.critic is not None:
            self.task.critic.load_state_dict(state["critic_module"])
            self.critic.load_state_dict(state["critic"])
        self.task.load_state_dict(state["task"])

    def _digests(self) -> list[str]:
        """SHA-256 over each rank's parameters, averages and decisions, 16 hex digits: equal bits on every rank."""
        sha = hashlib.sha256()
        for part in (self.task.module, self.task.critic, self.ema):
            for tensor in [] if part is None else part.state_dict().values():
                sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        sha.update(json.dumps(self.task.state_dict(), sort_keys=True).encode())
        digests = [sha.hexdigest()[:16]]
        return gather_object(digests) if self.accelerator.num_processes > 1 else digests

    # --- start and end ------------------------------------------------------------------------------------------

    def _record_start(self) -> None:
        self.journal.start()
        if self.progress.images:
            self.journal.line("resume", vars(self.progress), self.progress.images)
            self._say("resumed")
        if not self.accelerator.is_main_process:
            return
        for name, text in self.task.describe().items():
            console.stderr.print(f"{name}: {text}", markup=False, highlight=False)
        ranks, optim = self.accelerator.num_processes, self.config.optim
        console.stderr.print(f"data: {self.feed.describe()}", markup=False, highlight=False)
        console.stderr.print(
            f"run: {self.out}, {ranks} rank(s) on {self.device.type}, precision {self.config.run.precision}, "
            f"{self._images_per_step} images a step ({optim.batch_size} x {optim.accumulate} x {ranks}), "
            f"lr {optim.lr:g} (never rescaled)",
            markup=False,
            highlight=False,
        )

    def export(self) -> dict[str, Any]:
        """Write the averaged weights as a model folder; see `Task.export`."""
        record = {
            "images_seen": self.progress.images,
            "steps": self.progress.step,
            "time_s": round(self.progress.time_s, 1),
            "validation": self._last_validation,
            "n_bad_samples": self.feed.bad.total,
            "losses": self.task.describe()["loss"],
            **{name: value for name, value in environment().items() if name != "command"},  # it holds local paths
        }
        return self.task.export(self.ema.module, self.out / "model", record, self.device)


def _passed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _brief(values: Values) -> str:
    """The weighted terms, short enough for a progress bar of 80 columns; log.jsonl has them in full."""
    shown = [name for name in ("l1", "l2", "huber", "bce", "perceptual", "ms_ssim", "kl", "rate") if name in values]
    return " ".join(f"{name[:4]} {values[name]:.2f}" for name in shown) + f" {values.get('phase', '')}"
