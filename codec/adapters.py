"""The classes that stand behind `codec.latent_model.LatentModel`, one adapter each.

The networks are diffusers' own, but for those of `OWN`; an adapter adds nothing but names. It is made in no time and
holds no state. Those with codebooks are in `codec.codebook_model` and `codec.two_level`, the one with a condition is in
`codec.conditional_kl`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    VQModel,
)

from codec.adapter_base import Adapter, Normalisation, Posterior
from codec.codebook_model import CodebookModel
from codec.conditional_kl import ConditionalAutoencoderKL, ConditionalKLModel
from codec.errors import ModelError
from codec.two_level import TwoLevelModel, TwoLevelVQModel

__all__ = [
    "ADAPTERS",
    "OWN",
    "AsymmetricModel",
    "CodebookModel",
    "ConditionalKLModel",
    "DCModel",
    "Flux2Model",
    "KLModel",
    "Normalisation",
    "Posterior",
    "TinyModel",
    "TwoLevelModel",
]


class KLModel(Adapter):
    """Adapter of `diffusers.AutoencoderKL`."""

    family = "kl"

    def __init__(self, network: AutoencoderKL) -> None:
        """Raises ModelError where latents_mean and latents_std do not fit latent_channels."""
        config = network.config
        self.network: torch.nn.Module = network
        self._kl = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(config.shift_factor or 0.0)
        self.decoder_out: torch.nn.Module = network.decoder.conv_out
        self._by_channel = _by_channel(config, self.channels, self.scaling_factor)

    @property
    def normalisation(self) -> Normalisation:
        """See `LatentModel.normalisation`; by latents_mean and latents_std where the config has both, as in SDXL."""
        return self._by_channel or super().normalisation

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`."""
        return _gaussian(self._kl.encode(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`."""
        x_hat: torch.Tensor = self._kl.decode(z).sample
        return x_hat


def _by_channel(config: Any, channels: int, scaling_factor: float) -> Normalisation | None:
    means, deviations = config.get("latents_mean"), config.get("latents_std")
    if means is None or deviations is None:  # pipelines use both or neither
        return None
    if not len(means) == len(deviations) == channels:
        raise ModelError(f"{len(means)} latents_mean and {len(deviations)} latents_std, expected {channels} each")
    shift, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (means, deviations))
    return Normalisation(shift, scaling_factor / std)


def _gaussian(encoded: Any) -> Posterior:
    posterior = encoded.latent_dist
    return Posterior(posterior.mean.float(), posterior.logvar.float())


class AsymmetricModel(Adapter):
    """Adapter of `diffusers.AsymmetricAutoencoderKL`: a larger decoder, here without the image and mask it can take."""

    family = "kl"
    shift_factor = 0.0  # the class has none

    def __init__(self, network: AsymmetricAutoencoderKL) -> None:
        """Raises ModelError when encoder and decoder disagree about f."""
        config = network.config
        self.network: torch.nn.Module = network
        self._kl = network
        widths = (config.down_block_out_channels, config.up_block_out_channels)
        self.f, enlarges = (2 ** (len(levels) - 1) for levels in widths)
        _same_factor(network, self.f, enlarges)
        self.channels = int(config.latent_channels)
        self.scaling_factor = float(config.scaling_factor)
        self.decoder_out: torch.nn.Module = network.decoder.conv_out

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`."""
        return _gaussian(self._kl.encode(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`."""
        x_hat: torch.Tensor = self._kl.decode(z).sample
        return x_hat


def _same_factor(network: torch.nn.Module, shrinks: int, enlarges: int) -> None:
    if shrinks != enlarges:
        name = type(network).__name__
        raise ModelError(f"an {name} that shrinks by {shrinks} and enlarges by {enlarges}: not supported")


class Flux2Model(Adapter):
    """Adapter of `diffusers.AutoencoderKLFlux2`. Raw latents are those of its encoder, not cut into patches.

    Pipelines of FLUX.2 cut them into patches of 2 x 2 and normalize each of the 4 D channels by the network's
    `bn.running_mean` and `bn.running_var`. Here the patches are put together again, so that normalized latents are
    (B, D, h, w) too: a mean and a deviation for each channel and place in the patch.
    """

    family = "kl"

    def __init__(self, network: AutoencoderKLFlux2) -> None:
        config = network.config
        self.network: torch.nn.Module = network
        self._kl = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        # One number each for all channels, which the class has no fields for.
        self.shift_factor = float(network.bn.running_mean.double().mean())
        self.scaling_factor = float(self._variance().mean().rsqrt())
        self.decoder_out: torch.nn.Module = network.decoder.conv_out

    def _variance(self) -> torch.Tensor:
        variance: torch.Tensor = self._kl.bn.running_var.double() + self._kl.config.batch_norm_eps
        return variance

    @property
    def normalisation(self) -> Normalisation:
        """See `LatentModel.normalisation`."""
        patched = (self.channels, *self._kl.config.patch_size)
        mean: torch.Tensor = self._kl.bn.running_mean.double()
        return Normalisation(mean.reshape(patched), self._variance().rsqrt().reshape(patched))

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`."""
        return _gaussian(self._kl.encode(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`."""
        x_hat: torch.Tensor = self._kl.decode(z).sample
        return x_hat


class DCModel(Adapter):
    """Adapter of `diffusers.AutoencoderDC`: no variance, f 32 and more."""

    family = "dc"
    shift_factor = 0.0  # the class has none

    def __init__(self, network: AutoencoderDC) -> None:
        """Raises ModelError when encoder and decoder disagree about f."""
        config = network.config
        self.network: torch.nn.Module = network
        self._dc = network
        self.f, enlarges = (_dc_factor(config[f"{part}_layers_per_block"]) for part in ("encoder", "decoder"))
        _same_factor(network, self.f, enlarges)
        self.channels = int(config.latent_channels)
        self.scaling_factor = float(config.scaling_factor)
        last = network.decoder.conv_out
        self.decoder_out: torch.nn.Module = last if isinstance(last, torch.nn.Conv2d) else last.conv

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `LatentModel.encode`."""
        return Posterior(self._dc.encode(x).latent.float(), None)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.decode`."""
        x_hat: torch.Tensor = self._dc.decode(z).sample
        return x_hat


def _dc_factor(layers_per_block: Sequence[int]) -> int:
    """Return f: a stage without layers does not resample, but for the first, which does so in its one convolution."""
    return int(2 ** ((layers_per_block[0] == 0) + sum(n > 0 for n in layers_per_block[:-1])))


class TinyModel(Adapter):
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
        _same_factor(network, self.f, int(config.upsampling_scaling_factor) ** (len(config.num_decoder_blocks) - 1))
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


ADAPTERS: dict[type[torch.nn.Module], Any] = {
    AutoencoderKL: KLModel,
    AutoencoderTiny: TinyModel,
    VQModel: CodebookModel,
    AutoencoderDC: DCModel,
    AutoencoderKLFlux2: Flux2Model,
    AsymmetricAutoencoderKL: AsymmetricModel,
    TwoLevelVQModel: TwoLevelModel,
    ConditionalAutoencoderKL: ConditionalKLModel,
}
"""Class of the network -> adapter."""

OWN = (TwoLevelVQModel, ConditionalAutoencoderKL)
"""Classes of this project, which diffusers has not."""
