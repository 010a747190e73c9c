"""Puts a head's run together: config -> caches -> task -> trainer; and exports the weights that measured best."""

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from codec import console, model_folder
from codec.engine import Engine, EngineConfig
from train.best import BestTrainer, export_run, resumed
from train.denoiser_feed import LatentFeed
from train.head.config import HeadConfig
from train.head.latents import HeadData, load_data
from train.head.task import HeadTask
from train.journal import check_run_folder, check_trackers
from train.run import make_accelerator, state_to_resume


def run(config: HeadConfig) -> dict[str, Any]:
    """Train and export; see `Trainer.run`.

    Raises:
        UsageError: see `train.head.latents.load_data`; an unusable run folder, a checkpoint that does not fit.
        ModelError: held-out latents, or a codec, of another encoder.
    """
    return prepare(config).run()


def prepare(config: HeadConfig) -> BestTrainer:
    """Build everything and check what can be checked; resumed where the config says so. See `run` for errors."""
    check_trackers(config.run.trackers)
    data = load_data(config.data)
    out = check_run_folder(config.run.out, config.run.resume)
    state = state_to_resume(config, out)
    accelerator = make_accelerator(log_with=list(config.run.trackers) or None, project_dir=str(out))
    engine = _load_codec(config, data, str(accelerator.device))
    set_seed(config.run.seed)
    task = HeadTask(config, data, engine)
    feed = LatentFeed(
        data.training,
        out,
        batch_size=config.optim.batch_size,
        seed=config.run.seed,
        rank=accelerator.process_index,
        n_ranks=accelerator.num_processes,
    )
    return resumed(BestTrainer(config, task, feed, accelerator), state)


def _load_codec(config: HeadConfig, data: HeadData, device: str) -> Engine | None:
    """Return what validation decodes with; None = nothing."""
    if not config.data.codec:
        return None
    folder = model_folder.resolve(config.data.codec)
    engine = Engine.load(folder, EngineConfig(device=device), notes=console.note)
    if note := data.origin.require(engine, config.data.cache):
        console.note(f"note: {folder}: {note}")
    return engine


def export(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Export the best checkpoint of a run folder, or one checkpoint; see `train.best.export_run`."""
    return export_run(folder, out, "head", lambda config: HeadTask(config, load_data(config.data)))
