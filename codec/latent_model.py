"""`LatentModel`: the one face that the codec, the evaluation and the trainer see of every autoencoder family.

    x (B, 3, H, W) in [-1, 1] -> encode -> Posterior(mean, log-variance), raw (B, D, h, w) -> decode -> x_hat

The networks are diffusers' own classes, but for `codec.adapters.OWN`; an adapter adds nothing but names.
Another family is another adapter and one more row in `codec.adapters.ADAPTERS`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging

from codec import model_folder
from codec.adapters import (
    ADAPTERS,
    AsymmetricModel,
    CodebookModel,
    ConditionalKLModel,
    DCModel,
    Flux2Model,
    KLModel,
    Normalisation,
    Posterior,
    TinyModel,
    TwoLevelModel,
)
from codec.errors import ModelError, UsageError

__all__ = [
    "ADAPTERS",
    "AsymmetricModel",
    "CodebookModel",
    "ConditionalKLModel",
    "DCModel",
    "Flux2Model",
    "KLModel",
    "LatentModel",
    "Normalisation",
    "Posterior",
    "TinyModel",
    "TwoLevelModel",
    "decoder_id",
    "encoder_id",
    "latent_model",
    "load_conditional",
    "load_latent_model",
    "load_network",
    "normalisation_from_json",
    "normalisation_to_json",
]

# Fields of diffusers' configs that decide what an encoder computes and that the shapes of its tensors do not show.
_ENCODER_FIELDS = (
    "_class_name", "act_fn", "attention_head_dim", "down_block_types", "downsample_block_type", "encoder_act_fns",
    "encoder_block_types", "encoder_norm_types", "encoder_qkv_multiscales", "norm_num_groups", "norm_type",
)  # fmt: skip
# Beginnings of the encoder's tensors' names; fine latents of a model of two levels follow from its coarse codes.
_ENCODER_PARTS = (
    "encoder.", "quant_conv.", "coarse_encoder.", "coarse_quant_conv.", "coarse_quantize.", "coarse_decoder.",
)  # fmt: skip
_RGB_ONLY = " (the codec codes RGB, and alpha without loss beside it; others are for training and for pipelines)"


class LatentModel(Protocol):
    """An autoencoder with a latent grid. It has no state of its own: make one wherever it is needed.

    Attributes:
        network: the diffusers module.
        family: "kl" or "tiny", as recipes call them, "vq" or "dc". Of these "kl" has a variance.
        f: downsampling factor; H and W must be multiples of it.
        channels: D.
        scaling_factor: see `shift_factor`.
        shift_factor: normalized latents are (z - shift_factor) * scaling_factor where `normalisation` knows nothing
            better for each channel.
        normalisation: how raw latents become normalized ones.
        receptive_field: radius in pixels of the square around it that one pixel of decode(encode(x).mean) depends on;
            None when it is the whole image.
        decoder_out: the decoder's last convolution; trainers balance losses by their gradients at its weight.
    """

    network: torch.nn.Module
    family: str
    f: int
    channels: int
    scaling_factor: float
    shift_factor: float
    receptive_field: int | None
    decoder_out: torch.nn.Module

    @property
    def normalisation(self) -> Normalisation:
        """See the class."""
        ...

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return the posterior of x, (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat, (B, 3, h*f, w*f), nominally in [-1, 1], of raw latents z, (B, D, h, w)."""
        ...

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return what a diffusion model sees, (B, D, h, w), of raw latents z, (B, D, h, w)."""
        ...

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return the raw latents, (B, D, h, w), of normalized ones; the inverse of `normalize`."""
        ...


def latent_model(network: torch.nn.Module) -> LatentModel:
    """Return the adapter of a diffusers network; costs nothing, changes nothing.

    Raises:
        ModelError: the class is not supported, or this network of it is not.
    """
    for kind, adapter in ADAPTERS.items():
        if isinstance(network, kind):
            adapted: LatentModel = adapter(network)
            return adapted
    raise ModelError(f"a network {_refusal(type(network).__name__)}")


def decoder_id(network: torch.nn.Module) -> str:
    """Return the decoder id (FORMAT.md section 3) of a diffusers network as it stands in memory."""
    tensors = {name: tensor.float().cpu().numpy() for name, tensor in network.state_dict().items()}
    config: Any = network.config
    return model_folder.decoder_digest(dict(config) | {"_class_name": type(network).__name__}, tensors)


def encoder_id(network: torch.nn.Module) -> str:
    """Return what tells encoders apart: 16 hex digits, SHA-256 over config and encoder tensors.

    Tensors count as float16, so that the float32 and the float16 folder of a model agree.
    """
    config: Any = network.config
    fields = {name: config[name] for name in _ENCODER_FIELDS if name in config} | {
        "_class_name": type(network).__name__
    }
    sha = hashlib.sha256(b"latent-codec encoder 0")
    sha.update(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(network.state_dict().items()):
        if name.startswith(_ENCODER_PARTS):
            values = tensor.detach().float().cpu().numpy()
            with np.errstate(over="ignore"):  # beyond float16 is inf on both sides
                sha.update(name.encode() + b"\0" + np.ascontiguousarray(values, dtype="<f2").tobytes())
    return sha.hexdigest()[:16]


def normalisation_to_json(normalisation: Normalisation) -> dict[str, Any]:
    """Return a normalisation as plain JSON values, with the formula."""
    values = {"shift": normalisation.shift, "scale": normalisation.scale}
    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return {"formula": "(raw - shift) * scale; lists are (D, p, p), repeated over the grid", **plain}


def normalisation_from_json(found: Mapping[str, Any]) -> Normalisation:
    """Undo `normalisation_to_json`."""
    shift, scale = (
        torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else float(value)
        for value in (found["shift"], found["scale"])
    )
    return Normalisation(shift, scale)


def load_latent_model(
    folder: Path, device: str | torch.device = "cpu", *, image_channels: int | None = 3
) -> LatentModel:
    """Load the autoencoder of a diffusers folder, in float32, for inference; `image_channels`: see `load_network`.

    Raises:
        ModelError: the folder or its weights are missing or damaged, or the class is not supported.
        UsageError: there is no such device.
    """
    return _ready(load_network(folder, image_channels=image_channels), device)


def load_conditional(folder: str | Path, device: str | torch.device = "cpu") -> ConditionalKLModel:
    """Load an autoencoder that knows its images' class, in float32, for inference: a model folder, or the run's.

    Raises:
        ModelError: see `load_latent_model`; or it knows no class.
        UsageError: there is no such device.
    """
    path = Path(folder)
    if (path / "model" / "config.json").is_file():  # a run has a config.json too, its own
        path = path / "model"
    model = _ready(load_network(path, image_channels=None, conditional=True), device)
    if not isinstance(model, ConditionalKLModel):
        raise ModelError(
            f"{path}: a {type(model.network).__name__}, which knows no classes; load_latent_model loads it"
        )
    return model


def _ready(network: torch.nn.Module, device: str | torch.device) -> LatentModel:
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as exception:  # what torch raises for devices that it does not have
        raise UsageError(f"device {device}: {exception}") from exception
    return latent_model(network.eval().requires_grad_(False))


def load_network(folder: Path, *, image_channels: int | None = 3, conditional: bool = False) -> torch.nn.Module:
    """Load the network of a diffusers folder, in float32 on the CPU, in evaluation mode, its parameters trainable.

    Args:
        folder: of an autoencoder, or of a pipeline with one in `vae/`. Nothing is downloaded.
        image_channels: how many it must have; None = any number, as many in as out.
        conditional: also one that knows its images' class, which who only sees images cannot use.

    Raises:
        ModelError: the folder or its weights are missing or damaged, do not fit its config, or the class is not
            supported.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder (expected a diffusers autoencoder)")
    if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
        folder = folder / "vae"
    kind = _class_of(folder)
    if not conditional:
        model_folder.require_unconditional(folder)
    try:
        with _quiet():
            network, found = kind.from_pretrained(
                folder,
                local_files_only=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as exception:  # diffusers raises many types for damaged weights
        raise ModelError(f"{folder}: cannot load the weights: {exception}") from exception
    for what in ("missing", "unexpected"):  # diffusers only warns, and leaves missing ones random
        if names := found[f"{what}_keys"]:
            raise ModelError(f"{folder}: the weights do not fit config.json: {what} {_some(names)}")
    n_in = network.config.in_channels
    n_out = network.config.get("out_channels", n_in)  # an AutoencoderDC has but the first
    if not n_in == n_out == (image_channels or n_in):
        how = f"{n_in} image channels" + (f" in and {n_out} out" if n_in != n_out else "")
        expected = "as many in as out" if image_channels is None else str(image_channels)
        raise ModelError(f"{folder}: {how}, expected {expected}{_RGB_ONLY if image_channels == 3 else ''}")
    try:
        latent_model(network)
    except ModelError as exception:
        raise ModelError(f"{folder}: {exception}") from exception
    loaded: torch.nn.Module = network
    return loaded


def _class_of(folder: Path) -> Any:
    """Return the diffusers class that a folder's config.json names; raises ModelError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as exception:
        reason = f"{type(exception).__name__}: {exception}"
        raise ModelError(f"{folder}: not a diffusers model folder: {reason}") from exception
    for kind in ADAPTERS:
        if name == kind.__name__:
            return kind
    raise ModelError(f"{folder}: a model {_refusal(name)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from writing about what is checked or raised here."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _refusal(name: str) -> str:
    supported = ", ".join(kind.__name__ for kind in ADAPTERS)
    return f"of class {name}: not an image autoencoder that is supported; supported are {supported}"


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
