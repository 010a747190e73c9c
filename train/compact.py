"""Compact states: what a run that is trained in goes takes along, one small file without code in it.

    checkpoint -> state.safetensors, at most 64 MiB -> continued where nothing else of the run is left
      module.NAME   all that is trained: network, steps and densities, codebooks; as it is, float32
      ema.NAME      its averages; of convolutions' kernels the difference from `module`, float16
      critic.NAME   the discriminator; kernels float16
      header        recipe, position, what the task remembers, the goes so far, SHA-256 of the tensors

The optimizers are left out, and with them half of a checkpoint: what continues is not bit for bit the run that was not
interrupted. See docs/training.md.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from codec.errors import UsageError
from codec.files import write_atomic
from eval.environment import commit, hardware

VERSION = 1
LIMIT_MIB = 64
_KEY, _MODULE, _EMA, _CRITIC = "latent-codec-state", "module.", "ema.", "critic."


def new_go(first: int) -> dict[str, Any]:
    """Return the record of a go that begins after `first` images; `goes_of` brings images and time up to date.

    `time_s` is of the whole run so far, as `Progress.time_s` is.
    """
    return {"first": first, "images": first, "time_s": 0.0, **_here()}


@cache
def _here() -> dict[str, Any]:
    return {"commit": commit(), "hardware": hardware()}


def goes_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the goes of a checkpoint, the last one as far as it is; all of one that knows none is one go."""
    goes = state.get("goes") or [{"first": 0, **{name: state["environment"][name] for name in ("commit", "hardware")}}]
    progress = state["progress"]
    return [*goes[:-1], {**goes[-1], "images": progress["images"], "time_s": round(progress["time_s"], 1)}]


def n_trained(state: Mapping[str, Any]) -> int:
    """Return how many goes of a checkpoint saw images; others only validated or exported."""
    return sum(go["images"] > go["first"] for go in goes_of(state))


def write(path: Path, checkpoint: Mapping[str, Any]) -> int:
    """Write the state of a checkpoint, in place of an older one, whole or not at all; return its bytes.

    Args:
        path: the file.
        checkpoint: see `train.trainer.Trainer.checkpoint`; of this or an earlier version of the program.

    Raises:
        UsageError: it would be larger than LIMIT_MIB, or cannot be written.
    """
    tensors = _packed(checkpoint)
    header = {name: checkpoint[name] for name in ("progress", "task", "validation", "validated_at")}
    header |= {"config": _without_folders(checkpoint["config"])}
    header |= {"goes": goes_of(checkpoint), "sha256": _digest(tensors), "has_critic": _has_critic(checkpoint)}
    data = save(tensors, {_KEY: str(VERSION), "header": json.dumps(header)})
    if len(data) > LIMIT_MIB * 2**20:
        raise UsageError(
            f"{path}: the state would have {len(data) / 2**20:.1f} MiB, more than {LIMIT_MIB}: a model of this size "
            "goes on from its checkpoints (run.resume)"
        )
    try:
        write_atomic(path, data, sync=True)
    except OSError as exception:
        raise UsageError(f"{path}: cannot write the state: {exception}") from exception
    return len(data)


def read(path: Path) -> dict[str, Any]:
    """Read a state as a checkpoint without optimizers and random state, all tensors float32.

    Raises:
        UsageError: missing, damaged, something else, or of another version.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such state")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise UsageError(f"{path}: no compact state of a run (codec-train compact writes one)")
            if metadata[_KEY] != str(VERSION):
                raise UsageError(f"{path}: a state of version {metadata[_KEY]}, expected {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["header"])
        sound = header["sha256"] == _digest(tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as exception:
        raise UsageError(f"{path}: not a sound state: {exception}") from exception
    if not sound:
        raise UsageError(f"{path}: not a sound state: its tensors are not those that were written")
    return {**header, **_unpacked(tensors, header["has_critic"]), "ranks": []}


def _without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the folders of one machine, which are temporary in a go and nothing to the next one."""
    return {**config, "data": {**config["data"], "shards": ""}, "run": {**config["run"], "out": ""}}


def _has_critic(checkpoint: Mapping[str, Any]) -> bool:
    return checkpoint["critic_module"] is not None


def _packed(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    weights: Mapping[str, torch.Tensor] = checkpoint["module"]
    out = {_MODULE + name: tensor for name, tensor in weights.items()}
    for name, tensor in checkpoint["ema"].items():
        difference = _is_kernel(tensor)  # small, so that float16 costs it nothing
        out[_EMA + name] = (tensor - weights[_live(name)]).half() if difference else tensor
    for name, tensor in (checkpoint["critic_module"] or {}).items():
        out[_CRITIC + name] = tensor.half() if _is_kernel(tensor) else tensor
    # Cloned: some tensors are views of others, or channels last.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in out.items()}


def _unpacked(tensors: Mapping[str, torch.Tensor], has_critic: bool) -> dict[str, Any]:
    weights = {name.removeprefix(_MODULE): tensor for name, tensor in tensors.items() if name.startswith(_MODULE)}
    ema, critic = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(_EMA):
            own = name.removeprefix(_EMA)
            ema[own] = weights[_live(own)] + tensor.float() if _is_kernel(tensor) else tensor
        elif name.startswith(_CRITIC):
            critic[name.removeprefix(_CRITIC)] = tensor.float() if _is_kernel(tensor) else tensor
    return {"module": weights, "ema": ema, "critic_module": critic if has_critic else None}


def _is_kernel(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a convolution: nearly all of a network's numbers, and no norms, steps or codebooks."""
    return tensor.is_floating_point() and tensor.ndim == 4


def _live(name: str) -> str:
    """Return the name, in the module, of what an average is of."""
    return name.removeprefix("module.")


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
