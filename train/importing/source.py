"""What a user points at, told apart: a folder of diffusers, a file of weights in any layout; and its network.

path -> open_source -> Source: class and config, tensors under diffusers' names -> build -> network in float32
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codec import model_folder, original_layout
from codec.adapters import ADAPTERS, OWN
from codec.errors import ModelError, UsageError
from codec.original_layout_config import infer_config
from codec.original_layout_find import Found, find
from codec.original_layout_tiny import tiny_config, tiny_names
from train.importing.files import SUFFIXES, Weights, open_weights, weights_in

_WEIGHTS = "diffusion_pytorch_model"
_PLACES = ("vae", "vqvae", "movq")  # of the autoencoder in a pipeline's folder
_SCALE_FACTOR = "scale_factor"  # LDM keeps a measured one beside the weights

# Fields of a config that do not decide the network's shape; a given config may set them.
FREE_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast")
_UNSEEN = ("act_fn", "norm_num_groups")  # decide what is computed, and cannot be seen in the tensors
_SAMPLE_SIZE = 512  # pixels; without one diffusers would cut tiles of 32


@dataclass(frozen=True, kw_only=True)
class Source:
    """An autoencoder, found and described, its weights not read yet.

    Attributes:
        path: what was named, or the folder in it.
        files: of the weights.
        layout: whose names the tensors have: "diffusers'", "the original (LDM)" or "TAESD's".
        config: diffusers' config with `_class_name`; of a file the scaling is missing where nothing stated it.
        scaling_from: what stated scaling_factor: "config.json", "--config", "the checkpoint" or "" (nothing).
        n_averaged: tensors that are averages (EMA).
        n_tensors: tensors in all.
        left_out: what else was in the file; "" = nothing.
    """

    path: Path
    files: tuple[Path, ...]
    layout: str
    config: Mapping[str, Any]
    scaling_from: str
    n_averaged: int
    n_tensors: int
    left_out: str
    _read: Callable[[], dict[str, Tensor]] = field(repr=False)

    @property
    def kind(self) -> str:
        """The diffusers class."""
        return str(self.config["_class_name"])

    def build(self) -> nn.Module:
        """Read the weights into their network: float32 on the CPU, evaluation mode.

        Raises:
            ModelError: weights are missing, too many, of other shapes, not finite, or no numbers.
        """
        state = self._read()
        try:
            network = _empty_network(self.config)
            _check(state, network.state_dict())
        except ModelError as exception:
            raise ModelError(f"{self.path}: {exception}") from exception
        network.load_state_dict(state)  # copies the values into float32
        return network.eval()


def open_source(path: Path, given: Path | None = None, averaged: bool | None = None) -> Source:
    """Find out what a path holds.

    Args:
        path: a folder of diffusers (an autoencoder, or a pipeline with one in it), a folder with one file of weights
            or with the two of TAESD, or a file.
        given: a config.json of diffusers, or a folder with one.
        averaged: True = averaged (EMA) weights; False = not those; None = where there are any.

    Raises:
        UsageError: there is no such thing, or it is a model of the codec already.
        ModelError: not an autoencoder that diffusers has a class for that the codec knows; says what it looks like.
    """
    config = _read_config(given) if given is not None else None
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.is_file():
        return _from_file(path, open_weights(path), config, averaged)
    if model_folder.is_model_folder(path):
        raise UsageError(f"{path}: a model folder of the codec already; nothing to import")
    for folder in (path, *(path / place for place in _PLACES)):
        if (folder / "config.json").is_file():
            return _from_folder(folder, config, averaged)
    halves = [sorted(path.glob(f"*{side}*")) for side in ("encoder", "decoder")]
    if all(len(files) == 1 and files[0].suffix in SUFFIXES for files in halves):
        return _from_halves(path, halves[0][0], halves[1][0], config)
    file = weights_in(path)
    if file is None:
        what = "no config.json and not one single file of weights in it"
        raise UsageError(f"{path}: {what} ({' '.join(SUFFIXES)}); name the file itself")
    return _from_file(file, open_weights(file), config, averaged)


def _from_folder(folder: Path, given: Mapping[str, Any] | None, averaged: bool | None) -> Source:
    config = _read_config(folder / "config.json")
    if averaged:
        raise ModelError(f"{folder}: a folder of diffusers holds one set of weights; leave out --ema")
    stated = "config.json" if "scaling_factor" in config else f"the default of {config['_class_name']}"
    if given is not None:
        _check_same(folder, config, given)
        config |= {name: given[name] for name in FREE_FIELDS if name in given}
        stated = "--config" if "scaling_factor" in given else stated
    file = weights_in(folder, _WEIGHTS)
    if file is None:
        raise ModelError(f"{folder}: not one {_WEIGHTS}.safetensors or .bin in it")
    weights = open_weights(file)

    return Source(
        path=folder,
        files=weights.files,
        layout="diffusers'",
        config=config,
        scaling_from=stated,
        n_averaged=0,
        n_tensors=len(weights.shapes),
        left_out="",
        _read=lambda: _modern(weights.read(weights.shapes)),
    )


def _from_file(path: Path, weights: Weights, given: Mapping[str, Any] | None, averaged: bool | None) -> Source:
    try:
        found = find(weights.shapes, averaged)
        shapes = {short: weights.shapes[name] for short, name in found.names.items()}
        diffusers = original_layout.is_diffusers_layout(shapes)
        config = infer_config(original_layout.original_shapes(shapes) if diffusers else shapes)
    except ModelError as exception:
        raise ModelError(f"{path}: {exception}") from exception
    stated, extra = "", _stated_scale(weights, found)
    if extra is not None:
        config["scaling_factor"], config["shift_factor"], stated = extra, 0.0, "the checkpoint"
    if given is not None:
        _check_same(path, config, given)
        config |= {name: given[name] for name in (*FREE_FIELDS, *_UNSEEN) if name in given}
        stated = "--config" if "scaling_factor" in given else stated
    config.setdefault("sample_size", _SAMPLE_SIZE)
    groups, widths = config["norm_num_groups"], config["block_out_channels"]
    if any(width % groups for width in widths):
        raise ModelError(
            f"{path}: widths {', '.join(map(str, widths))} with norms of {groups} groups do not go together; a file "
            "does not say how many groups: give --config with norm_num_groups"
        )

    def read() -> dict[str, Tensor]:
        tensors = weights.read(found.names.values())
        state = {short: tensors[name] for short, name in found.names.items()}
        return _modern(state) if diffusers else original_layout.from_original(state, config)

    return Source(
        path=path,
        files=weights.files,
        layout="diffusers'" if diffusers else "the original (LDM)",
        config=config,
        scaling_from=stated,
        n_averaged=found.n_averaged,
        n_tensors=len(found.names),
        left_out=found.left_out,
        _read=read,
    )


def _from_halves(folder: Path, encoder: Path, decoder: Path, given: Mapping[str, Any] | None) -> Source:
    """TAESD: a file for each half; its latents are the normalized ones of the model that it is for."""
    halves = open_weights(encoder), open_weights(decoder)
    try:
        config = tiny_config(halves[0].shapes, halves[1].shapes)
    except ModelError as exception:
        raise ModelError(f"{folder}: {exception}") from exception
    stated = "the default of AutoencoderTiny"
    if given is not None:
        _check_same(folder, config, given)
        config |= {name: given[name] for name in FREE_FIELDS if name in given}
        stated = "--config" if "scaling_factor" in given else stated
    return Source(
        path=folder,
        files=(encoder, decoder),
        layout="TAESD's",
        config=config,
        scaling_from=stated,
        n_averaged=0,
        n_tensors=sum(len(half.shapes) for half in halves),
        left_out="",
        _read=lambda: tiny_names(*(half.read(half.shapes) for half in halves)),
    )


def _modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in diffusers' layout as it is now: attention by its present names, its weights (C, C) matrices.

    Some files have them as convolutions, (C, C, 1, 1).
    """
    return {
        original_layout.modern_name(name): tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
        for name, tensor in state.items()
    }


def _stated_scale(weights: Weights, found: Found) -> float | None:
    """Return the scale_factor that LDM keeps beside an autoencoder in a checkpoint of a diffusion model."""
    name = found.prefix.removesuffix("first_stage_model.") + _SCALE_FACTOR
    if not found.prefix.endswith("first_stage_model.") or weights.shapes.get(name) != ():
        return None
    return float(weights.read([name])[name])


def _read_config(path: Path) -> dict[str, Any]:
    """Read a config.json of a diffusers autoencoder that is supported."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except OSError as exception:
        raise UsageError(f"{file}: cannot be read: {exception.strerror}") from exception
    except (ValueError, KeyError, TypeError) as exception:
        raise ModelError(f"{file}: not a config of diffusers: {type(exception).__name__}: {exception}") from exception
    known = {one.__name__ for one in ADAPTERS if one not in OWN}  # which have no other home to come from
    if kind not in known:
        raise ModelError(f"{file}: a model of class {kind}; expected {', '.join(sorted(known))}")
    return dict(config)


def _check_same(path: Path, config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ModelError where a given config is of another network than the one that was found."""
    for name, value in config.items():
        other = given.get(name, value)  # what it does not say, it does not contradict
        if name in (*FREE_FIELDS, *_UNSEEN) or name.startswith("_diffusers") or other is None:
            continue
        if (list(other) if isinstance(other, (list, tuple)) else other) != (
            list(value) if isinstance(value, (list, tuple)) else value
        ):
            raise ModelError(f"{path}: --config says {name} {other}, the weights say {value}")


def _empty_network(config: Mapping[str, Any]) -> nn.Module:
    """Return the network of a config, with random weights."""
    kind: Any = next(one for one in ADAPTERS if one.__name__ == config["_class_name"])
    try:
        network: nn.Module = kind.from_config({name: config[name] for name in config_fields(kind) if name in config})
    except Exception as exception:  # each class complains in its own way
        raise ModelError(f"the config makes no {config['_class_name']}: {exception}") from exception
    return network


def config_fields(kind: type[nn.Module]) -> list[str]:
    """Return the names of a diffusers class's config fields; whatever else stands in a config.json is of no use."""
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ModelError where tensors do not fit the network, all kinds of misfit in one line."""
    problems = []
    if missing := sorted(set(expected) - set(state)):
        problems.append(f"missing {_some(missing)}")
    if unknown := sorted(set(state) - set(expected)):
        problems.append(f"not of this network {_some(unknown)}")
    for name in sorted(set(expected) & set(state)):
        if state[name].shape != expected[name].shape:
            here, there = tuple(state[name].shape), tuple(expected[name].shape)
            problems.append(f"{name} is {here}, expected {there}")
            break
    if problems:
        raise ModelError(f"the weights are not of this network: {'; '.join(problems)}")
    for name, tensor in state.items():
        if not tensor.is_floating_point() and expected[name].is_floating_point():
            raise ModelError(f"{name} is {tensor.dtype}, not floating point: quantised weights are not supported")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ModelError(f"{name} holds values that are not finite: the weights are damaged")


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
