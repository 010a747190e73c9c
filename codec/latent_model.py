"""`LatentModel`: the one face that the codec, the evaluation and the trainer see of every autoencoder family.

    x (B, 3, H, W) in [-1, 1] -> encode -> Posterior(mean, log-variance), raw (B, D, h, w) -> decode -> x_hat

The networks are diffusers' own classes; an adapter adds nothing but names. More families are more adapters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL

from codec import model_folder
from codec.errors import ModelError, UsageError


@dataclass(frozen=True)
class Posterior:
    """q(z|x) of a batch, raw latents.

    Attributes:
        mean: (B, D, h, w) float32.
        logvar: (B, D, h, w) float32, clamped by diffusers to [-30, 20]; None for a family without a variance.
    """

    mean: torch.Tensor
    logvar: torch.Tensor | None


class LatentModel(Protocol):
    """An autoencoder with a latent grid.

    Attributes:
        network: the diffusers module.
        f: downsampling factor; H and W must be multiples of it.
        channels: D.
        scaling_factor: see `shift_factor`.
        shift_factor: normalized latents are (z - shift_factor) * scaling_factor.
        receptive_field: radius in pixels that one output pixel depends on; None when it is the whole image.
    """

    network: torch.nn.Module
    f: int
    channels: int
    scaling_factor: float
    shift_factor: float
    receptive_field: int | None

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return the posterior of x, (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat, (B, 3, h*f, w*f), nominally in [-1, 1], of raw latents z, (B, D, h, w)."""
        ...


class KLModel:
    """Adapter of `diffusers.AutoencoderKL`."""

    receptive_field: int | None = None  # GroupNorm looks at the whole image

    def __init__(self, network: AutoencoderKL) -> None:
        config = network.config
        self.network: torch.nn.Module = network
        self._kl = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(config.shift_factor or 0.0)

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`."""
        posterior = self._kl.encode(x).latent_dist
        return Posterior(posterior.mean.float(), posterior.logvar.float())

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`."""
        x_hat: torch.Tensor = self._kl.decode(z).sample
        return x_hat


def decoder_id(network: torch.nn.Module) -> str:
    """Return the decoder id (FORMAT.md section 3) of a diffusers network as it stands in memory."""
    tensors = {name: tensor.float().cpu().numpy() for name, tensor in network.state_dict().items()}
    config: Any = network.config
    return model_folder.decoder_digest(dict(config) | {"_class_name": type(network).__name__}, tensors)


def load_latent_model(folder: Path, device: str | torch.device = "cpu") -> LatentModel:
    """Load the autoencoder of a diffusers folder, in float32, for inference.

    Raises:
        ModelError: the folder or its weights are missing or damaged, or the class is not supported.
        UsageError: there is no such device.
    """
    try:
        config = AutoencoderKL.load_config(folder, local_files_only=True)
    except (OSError, ValueError) as exception:
        raise ModelError(f"{folder}: not a diffusers model folder: {exception}") from exception
    if config.get("_class_name") != "AutoencoderKL":
        raise ModelError(f"{folder}: a model of class {config.get('_class_name')}, expected AutoencoderKL")
    try:
        network = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except Exception as exception:  # diffusers raises many types for damaged weights
        raise ModelError(f"{folder}: cannot load the weights: {exception}") from exception
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as exception:  # what torch raises for devices that it does not have
        raise UsageError(f"device {device}: {exception}") from exception
    return KLModel(network.eval().requires_grad_(False))
