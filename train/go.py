"""One go of a training: photographs, code and one state in; a state, figures and at the end a model folder out.

    photographs -> shards (unless they are) -> Trainer, images in memory --+-> OUT/state.safetensors, each checkpoint
    state (none: from the start) ------------------------------------------+-> OUT/go-003.json, OUT/log.jsonl
                                                                           +-> OUT/model, where the run is at its end

Nothing else outlasts a go: shards, exact checkpoints and validation pictures lie in a temporary folder.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec import console
from codec.errors import UsageError
from codec.files import check_writable, remove_abandoned, write_atomic
from codec.shard_scan import list_shards
from codec.shards import MANIFEST
from train import compact
from train.config import Config
from train.journal import environment
from train.recipe import load_recipe
from train.run import prepare
from train.shards import write_shards
from train.trainer import OutOfTime, Preempted, Trainer

STATE = "state.safetensors"
SAVE_EVERY_MIN = 2.0
_LAST_LINES = 50  # of the log, whose mean losses are told
# What a go wants otherwise than a recipe, which may be of a run that reads its images; KEY=VALUE wins over these.
_DEFAULTS = (
    "data.memory=device", "data.workers=0", "data.cache_mb=0", "run.channels_last=true", "run.keep_last=1",
    f"run.checkpoint_every_min={SAVE_EVERY_MIN}",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Go:
    """What a go is given.

    Attributes:
        recipe: see `train.recipe.load_any`.
        overrides: "key=value" each.
        photos: folder of images, or of shards.
        state: of the go before; None = the first one.
        out: folder of what comes out; what lies there is replaced.
        minutes: of the clock, for all of it; 0 = no step is taken.
        reserve_min: the part of them that is kept for the last validation, the state, and the export.
        export: write the model folder though the run is not at its end.
        began_s: `time.monotonic()` when the minutes began.
    """

    recipe: str
    overrides: Sequence[str]
    photos: Path
    state: Path | None
    out: Path
    minutes: float
    reserve_min: float
    export: bool
    began_s: float

    @property
    def stop_at_s(self) -> float:
        """When training stops."""
        return self.began_s + 60 * (self.minutes - self.reserve_min)


def run_go(go: Go) -> dict[str, Any]:
    """Train until the run or its minutes end; return the figures that were written to OUT/go-NNN.json.

    SIGTERM and SIGUSR1 save and end it, SIGINT saves and raises.

    Raises:
        UsageError: no photographs, a recipe that cannot be trained in goes, a state that is damaged or of another
            model, an unusable folder.
        TrainingError: see `Trainer.run`.
        KeyboardInterrupt: SIGINT.
    """
    _resolve(go, Path("shards"), Path("run"))  # what is wrong with the recipe is said before anything is read
    if go.state is None and (go.out / STATE).exists():
        raise UsageError(f"{go.out / STATE}: a state already; go on with --state, or name another folder")
    check_writable(go.out)
    remove_abandoned([go.out])
    with tempfile.TemporaryDirectory(prefix="latent-codec-go-") as folder:
        run = Path(folder) / Path(go.recipe).stem  # also the model's name, where the recipe has none
        trainer = prepare(_resolve(go, _shards(go.photos, Path(folder) / "shards"), run))
        if trainer.ranks.count > 1:
            raise UsageError("a go is one process; several ranks: codec-train run with run.continue_from and run.state")
        trainer.stop_at_s = go.stop_at_s
        exported: dict[str, Any] = {}
        try:
            exported = trainer.run()
        except OutOfTime:
            if go.export:
                exported = trainer.export()
        except Preempted:
            console.note("a signal ended the go")
        finally:
            _keep_log(go, run)
        if exported:
            _replace_folder(run / "model", go.out / "model")
        figures = _figures(go, trainer, run, exported)
        write_atomic(go.out / f"go-{figures['go']:03d}.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def _resolve(go: Go, shards: Path, run: Path) -> Config:
    """Return the config of a go; `run`: its run folder. Raises UsageError, see `train.recipe.load_recipe`."""
    own = {
        "data.shards": str(shards),
        "run.out": str(run),
        "run.state": str(go.out / STATE),
        "run.continue_from": "" if go.state is None else str(go.state),
    }
    for override in go.overrides:
        name = override.partition("=")[0].strip()
        if name in (*own, "run.resume"):
            raise UsageError(f"{override}: a go sets {name} by itself, from its options")
    forced = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in own.items()]
    return load_recipe(go.recipe, [*_DEFAULTS, *go.overrides, *forced])


def _shards(photos: Path, folder: Path) -> Path:
    """Return the folder of shards: the photographs' own, or one that they are packed into."""
    if photos.is_dir() and ((photos / MANIFEST).is_file() or list_shards(photos)):
        return photos
    for path, reason in write_shards([photos], folder).bad:
        console.error(f"{path}: {reason} (left out)")
    return folder


def _keep_log(go: Go, run: Path) -> None:
    """Append the go's log to that of the goes before, as far as they are here."""
    if (run / "log.jsonl").is_file():
        with (go.out / "log.jsonl").open("wb" if go.state is None else "ab") as file:
            file.write((run / "log.jsonl").read_bytes())


def _replace_folder(source: Path, target: Path) -> None:
    """Copy a folder in place of an older one: whole before the older one goes."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def _figures(go: Go, trainer: Trainer, run: Path, exported: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a go has to say of itself, as plain values; of its state what can be read again."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "step"][-_LAST_LINES:]
    validations = [line for line in lines if line["event"] == "validation"]
    data, goes = (go.out / STATE).read_bytes(), compact.read(go.out / STATE)["goes"]
    first, seen, planned = goes[-1]["first"], goes[-1]["images"], trainer.config.run.n_images
    time_s = goes[-1]["time_s"] - (goes[-2]["time_s"] if len(goes) > 1 else 0.0)
    return {
        "recipe": go.recipe,
        "go": len(goes),
        "first_image": first,
        "images_seen": seen,
        "n_images": planned,
        "finished": seen >= planned,
        "minutes": round((time.monotonic() - go.began_s) / 60, 3),
        "images_per_s": round((seen - first) / time_s, 2) if time_s else None,
        "losses": _means(steps),
        "validation": validations[-1] if validations else None,
        "state": {"file": STATE, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "bad_samples": trainer.feed.bad.counts,
        "model": exported or None,
        "goes": goes,
        **environment(),
    }


def _means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each number of the log's lines that is not where the run stands."""
    names = [name for name in (lines[-1] if lines else {}) if name not in ("event", "step", "images", "time_s")]
    values = {name: [line[name] for line in lines if isinstance(line.get(name), int | float)] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}
