"""Checkpoints: one file each, whole or not at all; the last few and the best are kept.

    checkpoints/images-000020000.pt    everything that continues the run
    checkpoints/best.pt                a second name of the one with the smallest validation loss

A file is written under a temporary name, forced to disk and renamed: a full disk or a kill in the middle of a save
leaves the ones before untouched.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codec import console
from codec.errors import UsageError

VERSION = 1
BEST = "best.pt"
_NAME = re.compile(r"images-(\d+)\.pt")


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self._keep_last = keep_last

    def save(self, state: Mapping[str, Any], images: int, best: bool) -> Path:
        """Write a checkpoint, make it the best one if it is, and delete those that are neither recent nor the best.

        Raises:
            UsageError: it cannot be written (a full disk); what was there before is whole.
        """
        path = self.folder / f"images-{images:09d}.pt"
        temporary = self.folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save({"version": VERSION, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            if best:
                _second_name(path, self.folder / BEST)
        except (OSError, RuntimeError) as exception:  # torch's writer raises RuntimeError on a full disk
            raise UsageError(f"{self.folder}: cannot write the checkpoint: {exception}") from exception
        finally:
            temporary.unlink(missing_ok=True)
        for old in [*self.all()[: -self._keep_last], *self.folder.glob(".*.tmp")]:  # tmp: left by a kill in a save
            old.unlink(missing_ok=True)
        return path

    def set_aside(self, after: int) -> list[Path]:
        """Rename the checkpoints of more images than `after`, of a branch that the run does not go on with."""
        aside = []
        for path in self.all():
            if int(path.stem.removeprefix("images-")) > after:
                aside.append(path.rename(path.with_name(f"aside-{path.name}")))
        best = self.folder / BEST
        if aside and best.is_file() and not self._is_within(best, after):
            aside.append(best.rename(best.with_name(f"aside-{BEST}")))
        return aside

    @staticmethod
    def _is_within(path: Path, images: int) -> bool:
        """Whether a checkpoint is sound, and of at most so many images."""
        try:
            return bool(load(path)["progress"]["images"] <= images)
        except UsageError as exception:
            console.error(str(exception))
            return False

    def all(self) -> list[Path]:
        """Return the checkpoints by images seen, oldest first."""
        return sorted(path for path in self.folder.glob("images-*.pt") if _NAME.fullmatch(path.name))

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest sound checkpoint and what it holds, None where there are none at all.

        Damaged ones are named and passed over.

        Raises:
            UsageError: there are some, and none is sound.
        """
        found = self.all()
        for path in reversed(found):
            try:
                return path, load(path)
            except UsageError as exception:
                console.error(f"{exception}; trying the one before")
        if found:
            raise UsageError(f"{self.folder}: none of the {len(found)} checkpoints is sound; name another run.out")
        return None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running pickled code.

    Raises:
        UsageError: missing, damaged, or of another version.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except FileNotFoundError as exception:
        raise UsageError(f"{path}: no such checkpoint") from exception
    except Exception as exception:  # torch.load raises many types for damaged files
        reason = str(exception) or type(exception).__name__  # an empty file's EOFError says nothing
        raise UsageError(f"{path}: not a sound checkpoint: {reason.splitlines()[0]}") from exception
    if version != VERSION:
        raise UsageError(f"{path}: a checkpoint of version {version}, expected {VERSION}")
    return state


def _second_name(path: Path, name: Path) -> None:
    """Give a file a second name in place of what had it; a copy where the file system has no links."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    temporary.replace(name)


def random_state() -> dict[str, Any]:
    """Return the state of this process's global random generators, as plain values and tensors."""
    name, words, at, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), np.asarray(words).tolist(), int(at), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the global random generators to a state of `random_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, words, at, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), at, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


# What decides which tensors there are; a run cannot be resumed with any of it changed.
_SHAPING = (
    "task", "model", "adversarial.channels", "adversarial.layers", "adversarial.norm", "rate.components",
    "loss.learned_scale", "latents.alignment", "vq.kind", "vq.codebook_size", "vq.coarse_codebook_size",
    "vq.codebook_dim", "vq.cosine", "vq.fsq_levels", "prior.width", "prior.depth", "head",
    "objective.kind", "objective.critic_width",
)  # fmt: skip
_PRESENCE = ("adversarial.weight", "rate.probability", "latents.alignment_weight")  # on or off
# What changes nothing that a resumed run computes, besides where it ends.
_FREE = (
    "run.out", "run.resume", "run.log_every", "run.validate_every", "run.checkpoint_every", "run.keep_last",
    "run.trackers", "run.n_images", "run.time_limit_min", "run.max_nonfinite", "run.continue_from", "run.state",
    "data.workers", "data.cache_mb", "data.memory", "export.",
)  # fmt: skip


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the config of a checkpoint with the one that shall go on from it.

    Returns:
        Changes that make it impossible, and those that only make it another run: "optim.lr 0.001 -> 0.0005".
    """
    impossible: list[str] = []
    other: list[str] = []
    then, after = _flat(before), _flat(now)
    for name in {**then, **after}:
        a, b = then.get(name), after.get(name)
        if _plain(a) == _plain(b) or name.startswith(_FREE):
            continue
        text = f"{name} {a} -> {b}"
        shaping = any(name == key or name.startswith(f"{key}.") for key in _SHAPING)
        presence = name in _PRESENCE and bool(a) != bool(b)
        (impossible if shaping or presence else other).append(text)
    return impossible, other


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def digest(modules: Iterable[nn.Module | None], decisions: Mapping[str, Any]) -> str:
    """Return SHA-256 over the tensors of modules and over plain values, 16 hex digits."""
    sha = hashlib.sha256()
    for module in modules:
        for tensor in [] if module is None else module.state_dict().values():
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    sha.update(json.dumps(decisions, sort_keys=True).encode())
    return sha.hexdigest()[:16]
