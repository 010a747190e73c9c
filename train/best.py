"""What tasks share that learn from a set in memory: the best checkpoint is exported, and a run keeps to its data.

With few images such a task learns them by heart in the end; the best checkpoint is where it had not yet.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from codec import console
from codec.errors import UsageError
from train.averaging import averaged
from train.checkpoint import BEST, load
from train.progress import Progress, run_record
from train.recipe import any_from_dict
from train.run import set_aside_branches
from train.task import LoopConfig, Task
from train.trainer import Trainer


class BestTrainer(Trainer):
    """The one loop; what it exports is the checkpoint with the smallest loss of the validations, not the last one."""

    exports_last = False

    def export(self) -> dict[str, Any]:
        """Write the averaged weights of the best checkpoint."""
        best = self.checkpoints.folder / BEST
        if not best.is_file():
            return super().export()
        return export_checkpoint(self.task, load(best), self.out / "model", self.config.optim.ema_decay)


def resumed(trainer: BestTrainer, state: dict[str, Any] | None) -> BestTrainer:
    """Return a trainer that goes on from a checkpoint's state; None = begins.

    Raises:
        UsageError: the data are not those that the checkpoint was made with.
    """
    if state is not None:
        check_same(state, trainer.task, "the run cannot go on")
        trainer.resume(state)
        set_aside_branches(trainer)
    return trainer


def check_same(state: dict[str, Any], task: Task, so: str) -> None:
    """Raise UsageError where the data are not those that a checkpoint was made with; `so`: what cannot be done.

    What a checkpoint of an earlier version does not name is not compared.
    """
    before, now = state["task"], json.loads(json.dumps(task.state_dict()))
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UsageError(f"the data are not those of the run: {name} {before[name]} -> {value}; {so}")


def export_checkpoint(task: Task, state: dict[str, Any], out: Path, decay: float) -> dict[str, Any]:
    """Write the averaged weights of a checkpoint's state as the task's folder; return its figures."""
    average = averaged(task.module, decay)
    average.load_state_dict(state["ema"])
    record = run_record(Progress(**state["progress"]), state["validation"], 0, task)
    record["run"] = Path(state["config"]["run"]["out"]).name
    return task.export(average.module, out, record, torch.device("cpu"))


def export_run(folder: Path, out: Path | None, kind: str, build: Callable[[Any], Task]) -> dict[str, Any]:
    """Export the best checkpoint of a run folder, or one checkpoint; see `train.run.export`.

    Args:
        folder: the run's, or the checkpoint's file.
        out: where to; None = `model` in the run folder.
        kind: the task that it has to be of.
        build: the run's config -> its task.

    Raises:
        UsageError: no sound checkpoint, one of another task, or the run's caches are gone.
    """
    checkpoint = folder if folder.is_file() else folder / "checkpoints" / BEST
    state = load(checkpoint)
    config: LoopConfig = any_from_dict(state["config"])
    if config.to_dict()["task"] != kind:
        raise UsageError(f"{checkpoint}: of a run with task {config.to_dict()['task']}, expected {kind}")
    task = build(config)
    check_same(state, task, "its checkpoint cannot be exported with them")
    out = out or checkpoint.parent.parent / "model"
    console.note(f"{checkpoint}: {state['progress']['images']} samples seen")
    return export_checkpoint(task, state, out, config.optim.ema_decay) | {"folder": str(out)}
