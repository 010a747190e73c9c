"""Puts a prior's run together: config -> caches -> task -> trainer; and exports the weights that measured best."""

import json
from pathlib import Path
from typing import Any

import torch

from codec import console
from codec.errors import UsageError
from train.averaging import averaged
from train.checkpoint import BEST, load
from train.journal import check_run_folder, check_trackers
from train.prior.config import PriorConfig
from train.prior.task import PriorTask
from train.prior.tokens import TokenFeed, load_data
from train.progress import Progress, run_record
from train.recipe import any_from_dict
from train.run import make_accelerator, set_aside_branches, state_to_resume
from train.trainer import Trainer


class PriorTrainer(Trainer):
    """The one loop; what it exports is the checkpoint with the fewest held-out bits an index, not the last one.

    With few images a prior learns them by heart in the end; the best checkpoint is where it had not yet.
    """

    def export(self) -> dict[str, Any]:
        """Write the averaged weights of the best checkpoint as the prior's folder."""
        best = self.checkpoints.folder / BEST
        if not best.is_file():
            return super().export()
        return export_checkpoint(self.task, load(best), self.out / "model", self.config.optim.ema_decay)


def run(config: PriorConfig) -> dict[str, Any]:
    """Train and export; see `Trainer.run`.

    Raises:
        UsageError: no cache or one of latents, nothing to learn from or to measure on, an unusable run folder, a
            checkpoint that does not fit.
        ModelError: held-out indices of another model.
    """
    return prepare(config).run()


def prepare(config: PriorConfig) -> PriorTrainer:
    """Build everything and check what can be checked; resumed where the config says so. See `run` for errors."""
    check_trackers(config.run.trackers)
    data = load_data(config.data)
    out = check_run_folder(config.run.out, config.run.resume)
    state = state_to_resume(config, out)
    accelerator = make_accelerator(log_with=list(config.run.trackers) or None, project_dir=str(out))
    task = PriorTask(config.prior, data, card=config.export, seed=config.run.seed)
    feed = TokenFeed(
        data.training,
        out,
        batch_size=config.optim.batch_size,
        seed=config.run.seed,
        rank=accelerator.process_index,
        n_ranks=accelerator.num_processes,
    )
    trainer = PriorTrainer(config, task, feed, accelerator)
    if state is not None:
        _check_same(state, task, "the run cannot go on")
        trainer.resume(state)
        set_aside_branches(trainer)
    return trainer


def _check_same(state: dict[str, Any], task: PriorTask, so: str) -> None:
    """Raise UsageError where the caches are not those that a checkpoint was made with; `so`: what cannot be done."""
    before, now = state["task"], json.loads(json.dumps(task.state_dict()))
    for name, value in now.items():
        if before.get(name) != value:
            raise UsageError(f"the caches have another {name} than the run had: {before.get(name)} -> {value}; {so}")


def export_checkpoint(task: Any, state: dict[str, Any], out: Path, decay: float) -> dict[str, Any]:
    """Write the averaged weights of a checkpoint's state as a prior's folder; return its figures."""
    average = averaged(task.module, decay)
    average.load_state_dict(state["ema"])
    record = run_record(Progress(**state["progress"]), state["validation"], 0, task)
    record["run"] = Path(state["config"]["run"]["out"]).name
    figures: dict[str, Any] = task.export(average.module, out, record, torch.device("cpu"))
    return figures


def export(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Export the best checkpoint of a run folder, or one checkpoint; see `train.run.export`.

    Raises:
        UsageError: no sound checkpoint, or the run's caches are gone.
    """
    checkpoint = folder if folder.is_file() else folder / "checkpoints" / BEST
    state = load(checkpoint)
    config = any_from_dict(state["config"])
    if not isinstance(config, PriorConfig):
        raise UsageError(f"{checkpoint}: of a run with task {config.task}, expected prior")
    task = PriorTask(config.prior, load_data(config.data), card=config.export, seed=config.run.seed)
    _check_same(state, task, "its checkpoint cannot be exported with them")
    out = out or checkpoint.parent.parent / "model"
    console.note(f"{checkpoint}: {state['progress']['images']} samples seen")
    return export_checkpoint(task, state, out, config.optim.ema_decay) | {"folder": str(out)}
