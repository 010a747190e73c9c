"""The diffusers classes that stand behind `codec.latent_model.LatentModel`, one adapter each.

The networks are diffusers' own; an adapter adds nothing but names. It is made in no time and holds no state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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

from codec import fsq
from codec.errors import ModelError

_MOST_DISTANCES = 1 << 22  # between latents and codebook vectors, held at once


@dataclass(frozen=True)
class Posterior:
    """q(z|x) of a batch, raw latents.

    Attributes:
        mean: (B, D, h, w) float32.
        logvar: (B, D, h, w) float32, clamped by diffusers to [-30, 20]; None for a family without a variance.
    """

    mean: torch.Tensor
    logvar: torch.Tensor | None


@dataclass(frozen=True)
class Normalisation:
    """What a diffusion model's pipeline does between raw and normalized latents: (z - shift) * scale.

    Attributes:
        shift: one number; or (D, p, p), which repeats over the latent grid, p = 1 or the side of a patch.
        scale: the same.
    """

    shift: float | torch.Tensor
    scale: float | torch.Tensor

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalized latents of raw ones; (B, D, h, w), in the type and on the device of z."""
        return (z - _spread(self.shift, z)) * _spread(self.scale, z)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return the raw latents of normalized ones; (B, D, h, w), in the type and on the device of z."""
        return z / _spread(self.scale, z) + _spread(self.shift, z)

    def deviation(self, z: torch.Tensor) -> torch.Tensor | float:
        """Return what one unit of normalized latents is in raw ones: a number, or (D, h, w) for z, (B, D, h, w)."""
        return 1 / _spread(self.scale, z)


def _spread(values: float | torch.Tensor, z: torch.Tensor) -> torch.Tensor | float:
    if isinstance(values, float):
        return values
    (h, w), (rows, columns) = z.shape[-2:], values.shape[-2:]
    repeated = values.repeat(1, -(-h // rows), -(-w // columns))
    return repeated[:, :h, :w].to(z)


class _Adapter:
    """What all adapters do alike."""

    scaling_factor: float
    shift_factor: float
    receptive_field: int | None = None  # GroupNorm and attention look at the whole image

    @property
    def normalisation(self) -> Normalisation:
        """See `LatentModel.normalisation`."""
        return Normalisation(self.shift_factor, self.scaling_factor)

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.normalize`."""
        return self.normalisation.normalize(z)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.denormalize`."""
        return self.normalisation.denormalize(z)


class KLModel(_Adapter):
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


class AsymmetricModel(_Adapter):
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


class Flux2Model(_Adapter):
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


class DCModel(_Adapter):
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


class TinyModel(_Adapter):
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


class CodebookModel(_Adapter):
    """Adapter of `diffusers.VQModel`: latents are continuous, and `decode` moves each to its codebook vector.

    That is the nearest one; or, where config.json has the key `fsq_levels`, which diffusers passes over, the cell of
    finite scalar quantisation that the latents lie in. VQModel itself cannot tell cells: its own `decode` of codebook
    vectors is right for such a model, its own quantisation of latents is not.

    Attributes:
        codebook_size: K.
        codebook: (K, D), D = `channels`.
        fsq_levels: cells along each of the D dimensions, whose product is K; empty = the nearest vector counts.
    """

    family = "vq"
    shift_factor = 0.0  # the class has none

    def __init__(self, network: VQModel) -> None:
        config = network.config
        self.network: torch.nn.Module = network
        self._vq = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(network.quantize.vq_embed_dim)
        self.codebook_size = int(config.num_vq_embeddings)
        self.fsq_levels = tuple(int(level) for level in config.get("fsq_levels") or ())
        if self.fsq_levels and (len(self.fsq_levels), math.prod(self.fsq_levels)) != (
            self.channels,
            self.codebook_size,
        ):
            raise ModelError(
                f"fsq_levels {list(self.fsq_levels)} of {self.codebook_size} vectors of {self.channels} channels: "
                "expected a level for each channel, and their product as the number of vectors"
            )
        self.scaling_factor = float(config.scaling_factor)
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
        return self.decode_indices(self.quantise(z))

    def decode_indices(self, indices: torch.Tensor) -> torch.Tensor:
        """Return x_hat, (B, 3, h*f, w*f), of codebook indices, (B, h, w) int64 in [0, K)."""
        return self.decode_vectors(self.vectors(indices))

    def vectors(self, indices: torch.Tensor) -> torch.Tensor:
        """Return z_q, (B, D, h, w), the codebook vectors of indices, (B, h, w) int64 in [0, K)."""
        return self.codebook[indices].movedim(-1, 1).contiguous()

    def decode_vectors(self, z_q: torch.Tensor) -> torch.Tensor:
        """Return x_hat, (B, 3, h*f, w*f), of codebook vectors, (B, D, h, w), which are not quantised again."""
        x_hat: torch.Tensor = self._vq.decode(z_q, force_not_quantize=True).sample
        return x_hat

    def indices(self, x: torch.Tensor) -> torch.Tensor:
        """Return which codebook vectors stand for x, (B, h, w) int64 in [0, K)."""
        return self.quantise(self.encode(x).mean)

    def quantise(self, z: torch.Tensor) -> torch.Tensor:
        """Return the indices of the codebook vectors that raw latents become: (B, D, h, w) -> (B, h, w) int64.

        In float32 whatever the autocast, a part of the positions at a time: (B*h*w, K) distances can be gigabytes.
        """
        z = z.detach().float()
        if self.fsq_levels:
            return fsq.to_index(fsq.cells(z, self.fsq_levels), self.fsq_levels)
        flat, codebook = z.movedim(1, -1).reshape(-1, z.shape[1]), self.codebook.detach().float()
        with torch.autocast(z.device.type, enabled=False):
            parts = torch.split(flat, max(1, _MOST_DISTANCES // len(codebook)))
            nearest = torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in parts])
        return nearest.reshape(z.shape[0], *z.shape[2:])


ADAPTERS: dict[type[torch.nn.Module], Any] = {
    AutoencoderKL: KLModel,
    AutoencoderTiny: TinyModel,
    VQModel: CodebookModel,
    AutoencoderDC: DCModel,
    AutoencoderKLFlux2: Flux2Model,
    AsymmetricAutoencoderKL: AsymmetricModel,
}
"""diffusers class -> adapter."""
