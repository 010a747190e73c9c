"""What DDP wraps: one forward is the whole pass of an autoencoder, so that every gradient is reduced over ranks.

x -> encoder -> mean, log-variance -> z (posterior sample, one quantiser step of noise, or codebook vectors)
  -> noise, transform -> decoder -> x_hat
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from codec.latent_model import latent_model
from codec.latent_transform import LatentTransform
from train.latent_losses import noisy_latents
from train.rate import RateModel
from train.vq.quantiser import Codes, Quantiser


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is random in one forward pass, drawn beforehand from (seed, position); None where it is not used.

    Attributes:
        posterior: (B, D, h, w) standard normal.
        uniform: (B, D, h, w) in [-0.5, 0.5): the quantiser's noise, in steps.
        quality: (B,) 0..100.
        coded: (B,) bool: which images take the quantiser's noise in place of the posterior's.
        noise: (B, D, h, w) standard normal, added to the latents times `noise_deviation`.
        noise_deviation: (B,) in raw units.
        transform: of the latents, before the decoder.
        teacher_latents: (B, D, h, w) a teacher's normalized latents, decoded in place of the network's own.
    """

    posterior: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    quality: torch.Tensor | None = None
    coded: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    noise_deviation: torch.Tensor | None = None
    transform: LatentTransform | None = None
    teacher_latents: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What one forward pass gives, float32.

    Attributes:
        x_hat: (B, C, H, W).
        mean: (B, D, h, w) raw.
        logvar: the same shape; None for a family without a variance.
        bits: (B,) estimated bits of each image, coded or not; None without a rate model.
        log_scale: scalar s of the learned scale; None without it.
        projected: (B, C', h, w) latents projected to the features they are aligned with; None without alignment.
        codes: what the quantiser made of the latents; None without one.
    """

    x_hat: torch.Tensor
    mean: torch.Tensor
    logvar: torch.Tensor | None
    bits: torch.Tensor | None
    log_scale: torch.Tensor | None
    projected: torch.Tensor | None
    codes: Codes | None


class AutoencoderModule(nn.Module):
    """A diffusers autoencoder with everything else that is trained beside it."""

    def __init__(
        self,
        network: AutoencoderKL | AutoencoderTiny | VQModel,
        *,
        rate: RateModel | None = None,
        quantiser: Quantiser | None = None,
        projection: nn.Module | None = None,
        learned_scale: bool = False,
        frozen_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.rate = rate
        self.quantiser = quantiser
        self.projection = projection
        self.log_scale = nn.Parameter(torch.zeros(())) if learned_scale else None
        self._frozen_encoder = frozen_encoder
        self._model = latent_model(network)

    def forward(self, x: torch.Tensor, draws: Draws) -> Outputs:
        """Encode, draw latents, decode.

        Args:
            x: (B, C, H, W) in [-1, 1].
            draws: all that is random.
        """
        with torch.no_grad() if self._frozen_encoder else nullcontext():
            posterior = self._model.encode(x)
        mean, logvar = posterior.mean, posterior.logvar
        z = mean
        if logvar is not None and draws.posterior is not None:
            z = mean + torch.exp(0.5 * logvar) * draws.posterior
        bits = None
        if self.rate is not None:
            assert draws.quality is not None
            assert draws.uniform is not None
            assert draws.coded is not None
            noisy = self.rate.noisy(mean, draws.quality, draws.uniform)
            bits = self.rate.bits(noisy, draws.quality)
            z = torch.where(draws.coded[:, None, None, None], noisy, z)
        codes = None
        if self.quantiser is not None:
            codes = self.quantiser(z, self.network.quantize.embedding.weight)
            z = codes.z_q
        if draws.teacher_latents is not None:
            z = draws.teacher_latents
        if draws.noise is not None and draws.noise_deviation is not None:
            z = noisy_latents(z, draws.noise_deviation, draws.noise)
        if draws.transform is not None:
            z = draws.transform.latents(z)
        return Outputs(
            x_hat=self._decode(z).float(),
            mean=mean,
            logvar=logvar,
            bits=bits,
            log_scale=self.log_scale,
            projected=None if self.projection is None else self.projection(mean).float(),
            codes=codes,
        )

    @property
    def is_quantised(self) -> bool:
        """Whether latents become codebook vectors by now."""
        return self.quantiser is not None and bool(self.quantiser.started)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        if self.quantiser is None:
            return self._model.decode(z)
        x_hat: torch.Tensor = self.network.decode(z, force_not_quantize=True).sample  # vectors already, to the bit
        return x_hat

    @torch.no_grad()
    def settle(self, live: nn.Module) -> None:
        """See `train.averaging.Settles`: averaged vectors have to be a codebook."""
        assert isinstance(live, AutoencoderModule)
        if self.quantiser is not None and live.quantiser is not None:
            average, weight = (network.quantize.embedding.weight for network in (self.network, live.network))
            self.quantiser.settle(average, weight, live.quantiser)


def compile_blocks(network: nn.Module) -> None:
    """torch.compile an autoencoder block by block, in place; state-dict keys stay as they are.

    The last layer of the decoder stays out: gradients at its weight are read without those of the rest, which one graph
    of everything would compute each time. And equal blocks are compiled once.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one per shape of a block
    for block in network.modules():
        if isinstance(block, ResnetBlock2D | Attention | Downsample2D | Upsample2D | AutoencoderTinyBlock):
            block.compile()


def force_eager() -> AbstractContextManager[Any]:
    """Run compiled blocks as they were written while the context is open."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
