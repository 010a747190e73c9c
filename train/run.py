"""Puts a run together: config -> shards -> task -> trainer. What a user can get wrong is checked before training."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed

from codec import console
from codec.errors import UsageError
from codec.shards import SampleRef, read_index
from train import compact
from train.autoencoder import AutoencoderTask
from train.averaging import averaged
from train.checkpoint import Checkpoints, compare, load
from train.config import Config
from train.cvae.classes import check_same
from train.data import split
from train.feed import Feed
from train.formats import Wanted, check_formats
from train.journal import check_run_folder, check_trackers
from train.onnx_export import check_packages
from train.progress import Progress, run_record
from train.recipe import any_from_dict, from_dict
from train.task import LoopConfig
from train.trainer import Trainer


def run(config: Config) -> dict[str, Any]:
    """Train and export; see `Trainer.run`.

    Raises:
        UsageError: no shards, too few images, missing perceptual features, an unusable run folder, a checkpoint that
            does not fit.
    """
    return prepare(config).run()


def prepare(config: Config) -> Trainer:
    """Build everything and check what can be checked; resumed where the config says so. See `run` for errors."""
    if not config.data.shards:
        raise UsageError("trained on what? Set data.shards=FOLDER (codec-train shards writes one)")
    check_trackers(config.run.trackers)
    if "onnx" in config.export.formats:
        check_packages()
    out = check_run_folder(config.run.out, config.run.resume)
    state = state_to_resume(config, out)
    begin = None if state is not None else state_to_continue(config)
    if state is None and config.run.state:
        _refuse_to_lose(Path(config.run.state), 0 if begin is None else begin["progress"]["images"])
    accelerator = make_accelerator(log_with=list(config.run.trackers) or None, project_dir=str(out))
    if config.run.precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("run.precision = fp16: on CPUs take bf16 or no")
    with accelerator.main_process_first():  # which writes an index where there is none
        training, validation = _samples(config, quiet=not accelerator.is_main_process)
    set_seed(config.run.seed)
    task = AutoencoderTask(config, training, validation)
    rank, n_ranks = accelerator.process_index, accelerator.num_processes
    feed = Feed(config, training, task.f, rank, n_ranks, task.classes, accelerator.device)
    task.check_shapes(feed.shapes)
    trainer = Trainer(config, task, feed, accelerator)
    if state is not None:
        check_same(state["task"].get("classes", ()), task.classes, "the run cannot go on")
        trainer.resume(state)
        set_aside_branches(trainer)
    elif begin is not None:
        check_same(begin["task"].get("classes", ()), task.classes, "the run cannot be continued")
        trainer.continue_from(begin)
    _note_photographs(trainer, training)
    return trainer


def _refuse_to_lose(path: Path, first: int) -> None:
    """Raise UsageError where the state that a run writes over is further than the `first` images it begins after."""
    if path.exists() and (reached := compact.read(path)["progress"]["images"]) > first:
        raise UsageError(
            f"{path}: a state of {reached} images already, this run begins after {first}; go on from it "
            "(run.continue_from, --state), or write elsewhere (run.state, -o)"
        )


def _note_photographs(trainer: Trainer, training: Sequence[SampleRef]) -> None:
    """Put what is trained on into the go's record, and say where it is not what the go before was trained on."""
    text = " ".join(sorted(sample.sha256 for sample in training))
    own = hashlib.sha256(text.encode()).hexdigest()[:16]
    before = [go["photographs"] for go in trainer.goes if "photographs" in go]
    if before and before[-1] != own and trainer.ranks.main:
        console.error("other training images than before: some that are held out now may have been trained on")
    trainer.goes[-1]["photographs"] = own


def set_aside_branches(trainer: Trainer) -> None:
    """Put away checkpoints that are further than the one that a run was resumed from."""
    if trainer.ranks.main:
        for path in trainer.checkpoints.set_aside(trainer.progress.images):
            console.error(f"{path}: set aside, a checkpoint of a branch that this run does not go on with")


def export(folder: Path, out: Path | None = None, licence: str = "", wanted: Wanted | None = None) -> dict[str, Any]:
    """Export the newest checkpoint of a run folder, or one checkpoint, as a model folder, in no further formats.

    Args:
        folder: the run's, or the checkpoint's file.
        out: the model folder; None = `model` in the run folder.
        licence: of the weights; "" = as the run's config says.
        wanted: formats that are to follow: what the network cannot have is said at once.

    Returns:
        Figures, see `train.export.export_model`; `folder` is the model folder.

    Raises:
        UsageError: no sound checkpoint; shards or features that the run used are missing.
        ModelError: see `train.formats.check_formats`.
    """
    checkpoints = folder.parent if folder.is_file() else folder / "checkpoints"
    found = (folder, load(folder)) if folder.is_file() else Checkpoints(checkpoints, 1).newest()
    if found is None:
        raise UsageError(f"{folder}: no checkpoint here")
    _, state = found
    config = from_dict(state["config"])
    config = replace(config, run=replace(config.run, out=str(checkpoints.parent)))  # the folder may have moved
    config = replace(config, export=replace(config.export, formats=(), licence=licence or config.export.licence))
    task = AutoencoderTask(config, *_samples(config))
    check_same(state["task"].get("classes", ()), task.classes, "its checkpoint cannot be exported with them")
    average = averaged(task.module, config.optim.ema_decay)
    average.load_state_dict(state["ema"])
    network = average.module.network
    if wanted is not None and isinstance(network, torch.nn.Module):
        check_formats(network, wanted)
    if task.critic is not None:
        task.critic.load_state_dict(state["critic_module"])
    n_bad = sum(sum(rank["bad"]["counts"].values()) for rank in state["ranks"])
    record = run_record(Progress(**state["progress"]), state["validation"], n_bad, task, compact.n_trained(state))
    out = out or checkpoints.parent / "model"
    return task.export(average.module, out, record, torch.device("cpu")) | {"folder": str(out)}


def make_accelerator(**settings: Any) -> Accelerator:
    """Return what spreads a run over ranks; precision and compilation are the recipe's, whatever a launcher says."""
    # The first rank may scan a large set for its index while the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", kwargs_handlers=[patience], **settings)
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UsageError(f"{kind}: not supported; launch with --multi_gpu (data parallel), or one process")
    return accelerator


def _samples(config: Config, quiet: bool = False) -> tuple[list[SampleRef], list[SampleRef]]:
    """Return training samples (in streaming mode: those to measure latents on) and held-out ones."""
    data = config.data
    if data.mode == "streaming" and not data.local_shards:
        raise UsageError("data.mode = streaming: set data.local_shards=FOLDER, for validation and latent statistics")
    return split(
        read_index(
            Path(data.local_shards or data.shards), quiet=quiet, max_bad_share=data.max_bad_share, kind=data.samples
        ),
        data.n_validation,
    )


def state_to_resume(config: LoopConfig, out: Path) -> dict[str, Any] | None:
    """Load the checkpoint that the run shall go on from, and check that it fits; None for a new run."""
    resume = config.run.resume
    if not resume:
        return None
    if resume == "auto":
        found = Checkpoints(out / "checkpoints", config.run.keep_last).newest()
        if found is None:
            return None
        path, state = found
    else:
        path, state = Path(resume), load(Path(resume))
    # Read and written again: what a checkpoint of an earlier version does not name is at its default.
    impossible, other = compare(any_from_dict(state["config"]).to_dict(), config.to_dict())
    if impossible:
        raise UsageError(f"{path}: cannot be resumed with a changed model: {_list(impossible)}")
    if other:
        console.error(f"{path}: resumed with a changed recipe: {_list(other)}")
    return state


def state_to_continue(config: Config) -> dict[str, Any] | None:
    """Read the compact state that a new go shall continue, and check that it fits; None for a new run."""
    if not config.run.continue_from:
        return None
    path = Path(config.run.continue_from)
    state = compact.read(path)
    before = any_from_dict(state["config"])
    then_config = before.to_dict()
    then_config["data"]["shards"] = config.data.shards  # where they lie; what is in them: `_note_photographs`
    impossible, other = compare(then_config, config.to_dict())
    if impossible:
        raise UsageError(f"{path}: cannot be continued with a changed model: {_list(impossible)}")
    for name in ("n_images", "time_limit_min"):  # free where a run is resumed; here they say where the schedule stands
        then, now = getattr(before.run, name), getattr(config.run, name)
        other += [f"run.{name} {then} -> {now}, and the schedule with it"] if then != now else []
    if other:
        console.error(f"{path}: continued with a changed recipe: {_list(other)}")
    return state


def _list(texts: Sequence[str]) -> str:
    return ", ".join(texts)
