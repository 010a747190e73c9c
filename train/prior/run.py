"""Puts a prior's run together: config -> caches -> task -> trainer; and exports the weights that measured best."""

from pathlib import Path
from typing import Any

from train.best import BestTrainer, export_run, resumed
from train.journal import check_run_folder, check_trackers
from train.prior.config import PriorConfig
from train.prior.task import PriorTask
from train.prior.tokens import TokenFeed, load_data
from train.run import make_accelerator, state_to_resume


def run(config: PriorConfig) -> dict[str, Any]:
    """Train and export; see `Trainer.run`.

    Raises:
        UsageError: no cache or one of latents, nothing to learn from or to measure on, an unusable run folder, a
            checkpoint that does not fit.
        ModelError: held-out indices of another model.
    """
    return prepare(config).run()


def prepare(config: PriorConfig) -> BestTrainer:
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
    return resumed(BestTrainer(config, task, feed, accelerator), state)


def export(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Export the best checkpoint of a run folder, or one checkpoint; see `train.best.export_run`."""

    def build(config: PriorConfig) -> PriorTask:
        return PriorTask(config.prior, load_data(config.data), card=config.export, seed=config.run.seed)

    return export_run(folder, out, "prior", build)
