"""What a run writes down: log.jsonl always, TensorBoard and Weights & Biases through Accelerate where asked for."""

import json
import shlex
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from codec import images
from codec.errors import UsageError
from codec.files import check_writable, write_atomic
from eval.environment import commit, hardware, versions
from train.task import LoopConfig


class Journal:
    """The records of one run; writes on the main rank alone."""

    def __init__(self, out: Path, accelerator: Accelerator, config: LoopConfig) -> None:
        self._out = out
        self._accelerator = accelerator
        self._config = config
        self._main = accelerator.is_main_process

    def start(self) -> None:
        """Write config.json and environment.json, and open the trackers."""
        if self._main:
            (self._out / "validation").mkdir(parents=True, exist_ok=True)
            write_atomic(self._out / "config.json", (json.dumps(self._config.to_dict(), indent=2) + "\n").encode())
            write_atomic(self._out / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
        if self._config.run.trackers:
            self._accelerator.init_trackers("latent-codec", {"config": json.dumps(self._config.to_dict())})

    def line(self, event: str, values: Mapping[str, Any], images_seen: int) -> None:
        """Append one line to log.jsonl; steps and validations go to the trackers too."""
        if not self._main:
            return
        with (self._out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")
        if self._config.run.trackers and event in ("step", "validation"):
            scalars = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
            self._accelerator.log(scalars, step=images_seen)

    def picture(self, picture: np.ndarray, images_seen: int) -> Path:
        """Write a validation picture, (H, W, 3) uint8, on the main rank; return its path."""
        path = self._out / "validation" / f"images-{images_seen:09d}.png"
        if self._main:
            write_atomic(path, images.save_png(picture))
            for tracker in self._config.run.trackers:
                self._accelerator.get_tracker(tracker).log_images(
                    {"reconstructions": picture[None] if tracker == "tensorboard" else [picture]},
                    step=images_seen,
                    **({"dataformats": "NHWC"} if tracker == "tensorboard" else {}),
                )
        return path

    def close(self) -> None:
        """Close the trackers."""
        if self._config.run.trackers:
            self._accelerator.end_training()


def check_trackers(trackers: tuple[str, ...]) -> None:
    """Raise UsageError unless the packages of the trackers are installed."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise UsageError(f"run.trackers: {tracker} is not installed; pip install {tracker}, or leave it out")


def check_run_folder(out: str, resume: str) -> Path:
    """Return the run folder, created and writable.

    Raises:
        UsageError: none was named, it holds a run already that is not to be resumed, or it cannot be written.
    """
    if not out:
        raise UsageError("where to? Set run.out=FOLDER")
    path = Path(out)
    if not resume and path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UsageError(f"{path}: not empty; name a new folder for run.out, or go on with run.resume=auto")
    check_writable(path)
    return path


def environment() -> dict[str, Any]:
    """Return command, commit, versions and hardware of this run."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": commit(), "versions": versions(), "hardware": hardware()}
