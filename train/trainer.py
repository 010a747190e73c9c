"""The training loop: one loop over a `Task`, under Accelerate.

    positions -> batches -> task.generator_step -> backward -+
                         -> task.critic_step    -> backward -+-> finite check, clip, step -> task.after_step -> EMA
              -> log / validation / checkpoint -> at the end: export of the averaged weights

Everything that decides (whether gradients are finite, phases, signals, time) is equal on all ranks. Where a run stands
is the number of images seen; what is random is drawn from (seed, position). So a resumed run goes on exactly.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import TextColumn
from torch import nn

from codec import console
from codec.errors import UsageError
from train import compact, signals
from train.averaging import averaged, lag
from train.bad_samples import TooManyBadError
from train.checkpoint import Checkpoints, digest, random_state, set_random_state
from train.journal import Journal, environment
from train.module import force_eager
from train.precision import Side, autocast
from train.progress import Progress, brief, finite, means, passed, run_record
from train.ranks import Ranks
from train.schedules import learning_rate_factor, warmed
from train.task import LoopConfig, Source, Step, Task, Values

_MAX_ROLLBACKS = 3


class TrainingError(ArithmeticError):
    """Training cannot go on: losses stay not finite, or ranks have drifted apart."""


class Preempted(Exception):
    """SIGTERM or SIGUSR1 came; the run is saved and can be resumed."""


class OutOfTime(Preempted):
    """`Trainer.stop_at_s` has come; the run is validated and saved, and can be resumed or continued."""


class Trainer:
    """Runs one recipe to its end.

    Attributes:
        progress: how far the run is.
        goes: a record of each go, see `train.compact.new_go`; the last one is this.
        stop_at_s: `time.monotonic()` when the run validates, saves and stops; its schedule stays what it is.
    """

    exports_last = True  # whether the averaged weights of the last step are what is exported

    def __init__(self, config: LoopConfig, task: Task, feed: Source, accelerator: Accelerator) -> None:
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
        self.goes = [compact.new_go(0)]
        self.accelerator = accelerator
        self.ranks = Ranks(accelerator)
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
        self._bad = (0.0, 0.0)  # samples of all ranks that could not be used, and that were read
        self._last_validation: dict[str, float] = {}
        self._validated_at = -1  # images seen at the last validation
        self._best_loss = math.inf
        self._nonfinite = 0  # steps in a row
        self._rollbacks = 0  # without a finite step between
        self.stop_at_s = math.inf
        self._saved_s = 0.0  # when the last checkpoint was written, by `time.monotonic()`

    def _side(self, module: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float], decay: float) -> Side:
        wrapped = self.accelerator.prepare_model(module)
        optimizer = torch.optim.AdamW(groups, lr=groups[0]["peak_lr"], betas=betas, weight_decay=decay, fused=True)
        return Side(wrapped, optimizer, self.config.optim.clip_norm, self.config.run.precision == "fp16")

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self, batches: Iterator[dict[str, Any]]) -> Values:
        """Take one optimizer step over the next `accumulate` batches; see `step_on`."""
        return self.step_on(self._fetch(batches))

    def _fetch(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        return [next(batches) for _ in range(self.config.optim.accumulate)]

    def step_on(self, batches: list[dict[str, Any]]) -> Values:
        """Take one optimizer step over batches; return its values, averaged over batches and ranks.

        Raises:
            TrainingError: steps stay not finite.
            TooManyBadError: too many samples cannot be read, on all ranks together.
        """
        optim, start = self.config.optim, time.perf_counter()
        factor = learning_rate_factor(
            optim.schedule, optim.final_lr_ratio, optim.warmup_images, self.progress.images, self._share
        )
        if len(self.goes) > 1:
            factor *= warmed(optim.rewarm_images, self.progress.images - self.goes[-1]["first"])
        for side in (self.generator, self.critic):
            if side is not None:
                side.set_rate(factor)
        collected: list[dict[str, torch.Tensor]] = []
        for micro, batch in enumerate(batches):
            self.feed.bad.add(batch["bad"], len(batch["key"]), self.progress.images)
            tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            batch |= {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            last = micro == len(batches) - 1
            where = self._where(micro)
            with self._reduced(self.generator.module, last):
                terms = self.task.generator_step(self.generator.module, batch, where)
                self.generator.backward(terms.objective / len(batches))
            critic_values = self._critic_step(batch, terms.carry, where, last)
            collected.append(terms.values | critic_values)
        sides = {"gradient_norm": self.generator}
        if self.critic is not None and critic_values:
            sides["d_gradient_norm"] = self.critic
        norms = {name: side.finish() for name, side in sides.items()}
        out = self._averaged(collected, norms)
        sound = all(finite(value) for value in out.values())
        for side in sides.values():
            side.update(sound)
        if sound:
            self._nonfinite = self._rollbacks = 0
            for line in self.task.after_step(out, self._where(0), self.ranks.mean):
                self._say(line)
            self.ema.update_parameters(self.task.module)
        else:
            self.task.discard_step()
            if any(side.scale_is_exhausted for side in sides.values()) or not math.isfinite(out["loss"]):
                self._note_nonfinite(out, collected, [key for batch in batches for key in batch["key"]])
        self.progress.step += 1
        self.progress.images += self._images_per_step
        self.progress.time_s += time.perf_counter() - start
        self._share = self._fraction()
        self.feed.bad.require_few(*self._bad)
        return {"lr": self.generator.optimizer.param_groups[0]["lr"], **out}

    def _critic_step(self, batch: dict[str, Any], carry: Any, where: Step, last: bool) -> dict[str, torch.Tensor]:
        """Let the critic learn from a batch, if it does now; return its values."""
        if self.critic is None:
            return {}
        with self._reduced(self.critic.module, last):
            terms = self.task.critic_step(self.critic.module, batch, carry, where)
            if terms is None:
                return {}
            self.critic.backward(terms.objective / self.config.optim.accumulate)
        return terms.values

    @property
    def _images_per_step(self) -> int:
        return self.config.optim.batch_size * self.config.optim.accumulate * self.ranks.count

    def _where(self, micro: int) -> Step:
        """Where this rank's batch number `micro` of the step stands."""
        size = self.config.optim.batch_size
        first = self.progress.images + (micro * self.ranks.count + self.ranks.index) * size
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

    def _averaged(self, collected: list[dict[str, torch.Tensor]], norms: dict[str, torch.Tensor]) -> Values:
        """Average values over batches and ranks, with one transfer from the device; norms are equal on all ranks."""
        names = list(collected[0])
        rows = [torch.cat([values[name].float().flatten() for name in names]) for values in collected]
        bad = torch.tensor([self.feed.bad.total, self.feed.bad.n_read], dtype=torch.float32, device=self.device)
        means = self.ranks.mean(torch.cat([torch.stack(rows).mean(0), bad]))
        *numbers, total, n_read = means.tolist()
        self._bad = (total * self.ranks.count, n_read * self.ranks.count)
        at = 0
        out: Values = {}
        for name in names:
            n = collected[0][name].numel()
            out[name] = numbers[at : at + n] if collected[0][name].ndim else numbers[at]
            at += n
        return out | dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))

    def _note_nonfinite(self, values: Values, collected: list[dict[str, torch.Tensor]], keys: list[str]) -> None:
        """Count a step that was left out, on every rank; go back to the last checkpoint after too many in a row."""
        self._nonfinite += 1
        what = ", ".join(f"{name} = {value}" for name, value in values.items() if not finite(value))
        own = any(not bool(torch.isfinite(value).all()) for row in collected for value in row.values())
        told = self.ranks.gather([(own, keys)])
        blamed = [keys for own, keys in told if own] or [keys for _, keys in told]
        samples = " ".join(key for keys in blamed for key in keys)
        text = f"step {self.progress.step}: not finite: {what}; step left out; samples: {samples}"
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
        self._load_optimizers(state)
        self._say(f"{self.config.run.max_nonfinite} steps in a row were not finite: back to the weights of {path.name}")

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, validate, checkpoint and export; return what the model folder's export reported.

        Raises:
            TrainingError: losses or gradients stay not finite, or the ranks' parameters differ.
            Preempted: after a checkpoint, because of SIGTERM or SIGUSR1; `OutOfTime` because of `stop_at_s`.
            KeyboardInterrupt: after a checkpoint, because of SIGINT.
        """
        config, main = self.config, self.ranks.main
        self._saved_s = time.monotonic()
        self._record_start()
        columns = (TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[losses]}"))
        with console.progress(*columns, disable=not main) as bar:
            task = bar.add_task("", total=config.run.n_images, speed="", losses="")
            stage: bool | None = None
            batches: Iterator[dict[str, Any]] = iter(())
            with signals.requests() as request:
                asked, due = 0, False
                while self._share < 1.0:
                    if (now := self.feed.stage(self._share)) is not stage:
                        stage, batches = now, self.feed.batches(self._share, self.progress.images)
                    fetched, asked, late = self._fetch_and_agree(batches, request)
                    if asked:
                        break
                    due = due or late
                    before = self.progress.images
                    values = self._step_or_save(fetched)
                    if self.progress.step % config.run.log_every == 0:
                        self.journal.line("step", {**vars(self.progress), **values}, self.progress.images)
                    seen = self.progress.images
                    bar.update(
                        task,
                        completed=seen,
                        total=max(seen, round(seen / self._share)),  # a time limit ends the run before n_images
                        speed=f"{seen / max(self.progress.time_s, 1e-9):.1f}/s",
                        losses=brief(values),
                    )
                    ends = self._share >= 1.0
                    if not ends and passed(config.run.validate_every, before, seen):
                        self.validate(bar)
                    due = due or passed(config.run.checkpoint_every, before, seen)
                    if not ends and due and self._nonfinite == 0:  # never of weights that may be the reason
                        self.checkpoint()
                        due = False
            if asked in (0, signals.STOP):
                self._write_state_alone()  # validation takes its time, and a second signal may not wait
                line = lag(self.validate(bar))
                if line and self.exports_last and not asked:
                    self._say(line)
            self.checkpoint()
        self.journal.close()
        if asked:
            raise {signals.STOP: OutOfTime, signals.INTERRUPT: KeyboardInterrupt}.get(asked, Preempted)
        self.ranks.wait()
        return self.export() if main else {}

    def _fetch_and_agree(
        self, batches: Iterator[dict[str, Any]], request: signals.Request
    ) -> tuple[list[dict[str, Any]], int, bool]:
        """Read the next batches, and what signals and clock ask for on any rank: all save at the same step.

        Returns:
            The batches, what is asked for (see `train.signals`), and whether a checkpoint is due by the clock.

        Raises:
            UsageError: a rank's data have failed; on all ranks, after a checkpoint.
        """
        fetched: list[dict[str, Any]] = []
        failure: UsageError | None = None
        try:
            fetched = self._fetch(batches)
        except UsageError as exception:
            failure = exception
        now, every_s = time.monotonic(), 60 * self.config.run.checkpoint_every_min
        stop = signals.STOP if now >= self.stop_at_s else 0
        late = 0 < every_s <= now - self._saved_s
        asked, failed, due = self.ranks.largest(max(request.kind, stop), int(failure is not None), int(late))
        if failed:
            self.checkpoint()
            self.ranks.raise_together(failure, "read its data")
        return fetched, asked, bool(due)

    def _step_or_save(self, fetched: list[dict[str, Any]]) -> Values:
        try:
            return self.step_on(fetched)
        except TooManyBadError:
            self.checkpoint()
            raise

    def _fraction(self) -> float:
        """Progress of the run; the same on every rank, whose clocks differ."""
        fraction = self.progress.fraction(self.config.run.n_images, 60 * self.config.run.time_limit_min)
        if self.ranks.count > 1 and self.config.run.time_limit_min > 0:
            fraction = float(self.ranks.mean(torch.tensor(fraction, device=self.device)))
        return fraction

    def _say(self, text: str) -> None:
        if self.ranks.main:
            console.stderr.print(f"{self.progress.images} images: {text}", markup=False, highlight=False)

    def validate(self, bar: Any = None) -> dict[str, float]:
        """Measure averaged and last weights on the held-out samples, each once over all ranks; see `Task.evaluate`."""
        rank, n_ranks = self.ranks.index, self.ranks.count
        self.task.module.eval()
        with force_eager():  # images come in many shapes: not worth compiling for
            rows, picture = self.task.evaluate(self.ema.module, self.device, rank, n_ranks)
            raw_rows, _ = self.task.evaluate(self.task.module, self.device, rank, n_ranks)
        self.task.module.train()
        rows, raw_rows = self.ranks.gather(rows), self.ranks.gather(raw_rows)
        metrics = means(rows) | {f"raw_{name}": value for name, value in means(raw_rows).items()}
        if metrics:
            metrics["n_validated"] = float(len(rows))
        if picture is not None:
            path = self.journal.picture(picture, self.progress.images)
            text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.startswith("raw_"))
            self._say(f"{text}; {path}")
        self.journal.line("validation", {**vars(self.progress), **metrics}, self.progress.images)
        for line in self.task.after_validation(metrics, self._where(0)):
            self._say(line)
        self._last_validation, self._validated_at = metrics, self.progress.images
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
        ranks = self.ranks.gather([{"random": random_state(), "bad": self.feed.bad.state_dict()}])
        loss = self._last_validation.get("loss", math.inf) if self._validated_at == self.progress.images else math.inf
        best = loss < self._best_loss
        self._best_loss = min(loss, self._best_loss)
        failure: UsageError | None = None
        try:
            if self.ranks.main:
                state = self._state(ranks)
                self.checkpoints.save(state, self.progress.images, best)
                self._write_compact(state)
        except UsageError as exception:
            failure = exception
        self.ranks.raise_together(failure, "write the checkpoint")
        self.journal.line("checkpoint", {**vars(self.progress), "parameters": digests}, self.progress.images)
        self._saved_s = time.monotonic()

    def _write_compact(self, state: dict[str, Any]) -> None:
        path = Path(self.config.run.state)
        if not self.config.run.state:
            return
        if self._nonfinite and path.exists():  # weights that may be the reason, and no optimizer to go back with
            self._say(f"{path}: left as it is, the last {self._nonfinite} step(s) were not finite")
            return
        compact.write(path, state)

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
            "validated_at": self._validated_at,
            "best_loss": self._best_loss,
            "nonfinite": [self._nonfinite, self._rollbacks],
            "ranks": ranks,
            "goes": self.goes,
            "environment": environment(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, on every rank."""
        self._load_weights(state)
        self._load_optimizers(state)
        self._load_position(state)
        self.goes = compact.goes_of(state)
        self._last_validation, self._best_loss = state["validation"], state["best_loss"]
        self._nonfinite, self._rollbacks = state["nonfinite"]
        self._validated_at = state["validated_at"]
        if self.ranks.index < len(state["ranks"]):  # with more ranks than before, the new ones start anew
            own = state["ranks"][self.ranks.index]
            set_random_state(own["random"])
            self.feed.bad.load_state_dict(own["bad"])

    def continue_from(self, state: dict[str, Any]) -> None:
        """Begin a new go where a compact state stands, on every rank; the optimizers stay as they are, new."""
        self._load_weights(state)
        self._load_position(state)
        self._last_validation = state["validation"]
        self.goes = [*state["goes"], compact.new_go(self.progress.images)]

    def _load_weights(self, state: dict[str, Any]) -> None:
        self.task.module.load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        if self.task.critic is not None:
            self.task.critic.load_state_dict(state["critic_module"])
        self.task.load_state_dict(state["task"])

    def _load_optimizers(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])

    def _load_position(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self._share = self._fraction()

    def _digests(self) -> list[str]:
        """A digest of each rank's parameters, averages and decisions: equal where all bits are."""
        return self.ranks.gather([digest((self.task.module, self.task.critic, self.ema), self.task.state_dict())])

    # --- start and end ------------------------------------------------------------------------------------------

    def _record_start(self) -> None:
        self.journal.start()
        self._write_state_alone()
        if self.progress.images:
            is_new = self.progress.images == self.goes[-1]["first"]
            self.journal.line("continue" if is_new else "resume", vars(self.progress), self.progress.images)
            self._say(f"continued: go {len(self.goes)}, with new optimizers" if is_new else "resumed")
        if not self.ranks.main:
            return
        for name, text in self.task.describe().items():
            console.stderr.print(f"{name}: {text}", markup=False, highlight=False)
        ranks, optim = self.ranks.count, self.config.optim
        console.stderr.print(f"data: {self.feed.describe()}", markup=False, highlight=False)
        console.stderr.print(
            f"run: {self.out}, {ranks} rank(s) on {self.device.type}, precision {self.config.run.precision}, "
            f"{self._images_per_step} images a step ({optim.batch_size} x {optim.accumulate} x {ranks}), "
            f"lr {optim.lr:g} (never rescaled)",
            markup=False,
            highlight=False,
        )

    def _write_state_alone(self) -> None:
        """Write the compact state, if there is to be one, without a checkpoint.

        At the start, so that one that is too large is refused before the work; at the end before the validation.

        Raises:
            UsageError: see `train.compact.write`; on all ranks.
        """
        if not self.config.run.state:
            return
        failure: UsageError | None = None
        try:
            if self.ranks.main:
                self._write_compact(self._state([]))
        except UsageError as exception:
            failure = exception
        self.ranks.raise_together(failure, "write the state")

    def export(self) -> dict[str, Any]:
        """Write the averaged weights as a model folder; see `Task.export`."""
        n_goes = compact.n_trained({"goes": self.goes, "progress": vars(self.progress)})
        record = run_record(self.progress, self._last_validation, round(self._bad[0]), self.task, n_goes)
        return self.task.export(self.ema.module, self.out / "model", record, self.device)
