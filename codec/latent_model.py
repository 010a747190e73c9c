"""`LatentModel`: the one face that the codec, the evaluation and the trainer see of every autoencoder family.

    x (B, 3, H, W) in [-1, 1] -> encode -> Posterior(mean, log-variance), raw (B, D, h, w) -> decode -> x_hat

The networks are diffusers' own classes; an adapter adds nothing but names. Another family is another adapter and one
more row in `ADAPTERS`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.utils import logging as diffusers_logging

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
    """An autoencoder with a latent grid. It has no state of its own: make one wherever it is needed.

    Attributes:
        network: the diffusers module.
        family: "kl" or "tiny", as recipes call them, or "vq".
        f: downsampling factor; H and W must be multiples of it.
        channels: D.
        scaling_factor: see `shift_factor`.
        shift_factor: normalized latents are (z - shift_factor) * scaling_factor.
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

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return the posterior of x, (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat, (B, 3, h*f, w*f), nominally in [-1, 1], of raw latents z, (B, D, h, w)."""
        ...


class KLModel:
    """Adapter of `diffusers.AutoencoderKL`."""

    family = "kl"
    receptive_field: int | None = None  # GroupNorm looks at the whole image

    def __init__(self, network: AutoencoderKL) -> None:
        config = network.config
        self.network: torch.nn.Module = network
        self._kl = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(config.shift_factor or 0.0)
        self.decoder_out: torch.nn.Module = network.decoder.conv_out

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`."""
        posterior = self._kl.encode(x).latent_dist
        return Posterior(posterior.mean.float(), posterior.logvar.float())

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`."""
        x_hat: torch.Tensor = self._kl.decode(z).sample
        return x_hat


class TinyModel:
    """Adapter of `diffusers.AutoencoderTiny`: no variance, no norm, no attention.

    Its decoder sees 3 * tanh(z / 3): raw latents far beyond +-3 are all the same to it.
    """

    family = "tiny"

    def __init__(self, network: AutoencoderTiny) -> None:
        """Raises ModelError when encoder and decoder disagree about f."""
        config = network.config
        self.network: torch.nn.Module = network
        self._tiny = network
        self.f = 2 ** (len(config.num_encoder_blocks) - 1)
        enlarges = int(config.upsampling_scaling_factor) ** (len(config.num_decoder_blocks) - 1)
        if enlarges != self.f:
            raise ModelError(f"an AutoencoderTiny that shrinks by {self.f} and enlarges by {enlarges}: not supported")
        self.channels = int(config.latent_channels)
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(config.shift_factor or 0.0)
        self.receptive_field = _tiny_receptive_field(config, self.f)
        self.decoder_out: torch.nn.Module = network.decoder.layers[-1]

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`."""
        return Posterior(self._tiny.encode(x).latents.float(), None)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`."""
        x_hat: torch.Tensor = self._tiny.decode(z).sample
        return x_hat


def _tiny_receptive_field(config: Any, f: int) -> int | None:
    """Follow the 3 x 3 convolutions of an AutoencoderTiny, three to a block, from an output pixel back to the input."""
    if config.upsample_fn != "nearest":
        return None  # other filters reach further; nobody uses them
    first_blocks, *later_blocks = config.num_encoder_blocks
    encoder = 1 + 3 * first_blocks  # pixels on each side of the one that a latent stands on
    for level, blocks in enumerate(later_blocks, start=1):
        encoder += 2 ** (level - 1) + 3 * blocks * 2**level  # the strided convolution works on the finer grid
    encoder += f
    radius = 0
    for pixel in range(f):  # the pixels above one latent do not all see equally far
        low = high = pixel
        for stage, blocks in enumerate(reversed(config.num_decoder_blocks)):
            low, high = low - 1, high + 1
            if stage > 0:  # this convolution follows an enlargement
                low, high = low // config.upsampling_scaling_factor, high // config.upsampling_scaling_factor
            low, high = low - 3 * blocks, high + 3 * blocks
        low, high = f * (low - 1) - encoder, f * (high + 1) + encoder
        radius = max(radius, pixel - low, high - pixel)
    return radius


class CodebookModel:
    """Adapter of `diffusers.VQModel`: latents are continuous, and `decode` moves each to its nearest codebook vector.

    Attributes:
        codebook_size: K.
        codebook: (K, D), D = `channels`.
    """

    family = "vq"
    receptive_field: int | None = None  # GroupNorm looks at the whole image

    def __init__(self, network: VQModel) -> None:
        config = network.config
        self.network: torch.nn.Module = network
        self._vq = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(network.quantize.vq_embed_dim)
        self.codebook_size = int(config.num_vq_embeddings)
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = 0.0  # VQModel has none
        self.decoder_out: torch.nn.Module = network.decoder.conv_out

    @property
    def codebook(self) -> torch.Tensor:
        """See the class."""
        weight: torch.Tensor = self._vq.quantize.embedding.weight
        return weight

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`; the latents before they are quantised."""
        return Posterior(self._vq.encode(x).latents.float(), None)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`; z is quantised first."""
        x_hat: torch.Tensor = self._vq.decode(z).sample
        return x_hat

    def indices(self, x: torch.Tensor) -> torch.Tensor:
        """Return which codebook vectors stand for x, (B, h, w) int64 in [0, K)."""
        return self.quantise(self.encode(x).mean)

    def quantise(self, z: torch.Tensor) -> torch.Tensor:
        """Return the indices of the codebook vectors nearest to raw latents: (B, D, h, w) -> (B, h, w) int64."""
        _, _, (_, _, nearest) = self._vq.quantize(z)
        indices: torch.Tensor = nearest.reshape(z.shape[0], *z.shape[2:])
        return indices


ADAPTERS: dict[type[torch.nn.Module], Any] = {
    AutoencoderKL: KLModel,
    AutoencoderTiny: TinyModel,
    VQModel: CodebookModel,
}
"""diffusers class -> adapter."""


def latent_model(network: torch.nn.Module) -> LatentModel:
    """Return the adapter of a diffusers network; costs nothing, changes nothing.

    Raises:
        ModelError: the class is not supported, or this network of it is not.
    """
    for kind, adapter in ADAPTERS.items():
        if isinstance(network, kind):
            adapted: LatentModel = adapter(network)
            return adapted
    raise ModelError(f"a network of class {type(network).__name__}, expected {_supported()}")


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
    network = load_network(folder)
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as exception:  # what torch raises for devices that it does not have
        raise UsageError(f"device {device}: {exception}") from exception
    return latent_model(network.eval().requires_grad_(False))


def load_network(folder: Path) -> torch.nn.Module:
    """Load the network of a diffusers folder, in float32 on the CPU, in evaluation mode, its parameters trainable.

    Args:
        folder: of an autoencoder, or of a pipeline with one in `vae/`. Nothing is downloaded.

    Raises:
        ModelError: the folder or its weights are missing or damaged, do not fit its config, or the class is not
            supported.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder (expected a diffusers autoencoder)")
    if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
        folder = folder / "vae"
    kind = _class_of(folder)
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
    if (network.config.in_channels, network.config.out_channels) != (3, 3):
        raise ModelError(f"{folder}: {network.config.in_channels} image channels, expected 3")
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
    raise ModelError(f"{folder}: a model of class {name}, expected {_supported()}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from writing about what is checked or raised here."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _supported() -> str:
    return " or ".join(kind.__name__ for kind in ADAPTERS)


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
