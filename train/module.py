"""What DDP wraps: one forward is the whole pass of an autoencoder, so that every gradient is reduced over ranks.

x (and its class) -> encoder -> mean, log-variance -> z (posterior sample; or one step of noise, or rounded)
             -> latents of each map -> its quantiser -> z (codebook vectors)
  -> noise, transform -> decoder (and the class) -> x_hat
"""

from collections.abc import Sequence
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

from codec.codebook_model import CodebookModel
from codec.conditional_kl import ConditionalAutoencoderKL, ConditionalKLModel
from codec.latent_model import LatentModel, latent_model
from codec.latent_transform import LatentTransform
from codec.two_level import TwoLevelVQModel
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
        coded: (B,) bool: which images take the quantiser's errors in place of the posterior's noise.
        noise: (B, D, h, w) standard normal, added to the latents times `noise_deviation`.
        noise_deviation: (B,) in raw units.
        transform: of the latents, before the decoder.
        teacher_latents: (B, D, h, w) a teacher's normalized latents, decoded in place of the network's own.
        labels: (B,) int64, the classes that encoder and decoder are told, -1 = none; None where they take none.
    """

    posterior: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    quality: torch.Tensor | None = None
    coded: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    noise_deviation: torch.Tensor | None = None
    transform: LatentTransform | None = None
    teacher_latents: torch.Tensor | None = None
    labels: torch.Tensor | None = None


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
        latents: what the encoder gives, before anything is done to it, as the terms on it see it: `mean` alone, or of a
            network with codebooks the latents of each map, (B, d, h*s, w*s).
        codes: what the quantiser of each map made of them; empty without one.
    """

    x_hat: torch.Tensor
    mean: torch.Tensor
    logvar: torch.Tensor | None
    bits: torch.Tensor | None
    log_scale: torch.Tensor | None
    projected: torch.Tensor | None
    latents: tuple[torch.Tensor, ...]
    codes: tuple[Codes, ...]


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """The part of a pass before the decoder; `z`: (B, D, h, w), what goes on to it; the others: see `Outputs`."""

    z: torch.Tensor
    mean: torch.Tensor
    logvar: torch.Tensor | None = None
    bits: torch.Tensor | None = None
    latents: tuple[torch.Tensor, ...]
    codes: tuple[Codes, ...] = ()


class AutoencoderModule(nn.Module):
    """An autoencoder with everything else that is trained beside it."""

    def __init__(
        self,
        network: AutoencoderKL | AutoencoderTiny | VQModel | TwoLevelVQModel | ConditionalAutoencoderKL,
        *,
        rate: RateModel | None = None,
        decodes_rounded: bool = False,
        quantisers: Sequence[Quantiser] = (),
        projection: nn.Module | None = None,
        learned_scale: bool = False,
        frozen_encoder: bool = False,
    ) -> None:
        """Join the parts.

        Args:
            network: what is trained.
            rate: steps and densities of its latents.
            decodes_rounded: coded images are decoded from `RateModel.rounded`, not from `RateModel.noisy`.
            quantisers: one for each map of a network with codebooks, in its order.
            projection: of latents to the features that they are aligned with.
            learned_scale: whether the scale of the reconstruction's likelihood is learned.
            frozen_encoder: whether nothing before the latents learns.
        """
        super().__init__()
        self.network = network
        self.rate = rate
        self._decodes_rounded = decodes_rounded
        self._model = latent_model(network)
        self._coded: CodebookModel | None = None  # the same, where it is quantised here
        if quantisers:
            assert isinstance(self._model, CodebookModel)
            self._coded = self._model
            for prefix, quantiser in zip(self._model.prefixes, quantisers, strict=True):
                self.add_module(f"{prefix}quantiser", quantiser)
        self.projection = projection
        self.log_scale = nn.Parameter(torch.zeros(())) if learned_scale else None
        self._frozen_encoder = frozen_encoder

    @property
    def quantisers(self) -> list[Quantiser]:
        """One for each map of the network, in its order; empty where there is none."""
        return [] if self._coded is None else [getattr(self, f"{prefix}quantiser") for prefix in self._coded.prefixes]

    def forward(self, x: torch.Tensor, draws: Draws) -> Outputs:
        """Encode, draw latents, decode.

        Args:
            x: (B, C, H, W) in [-1, 1].
            draws: all that is random.
        """
        model = self._model if draws.labels is None else self._told(draws.labels)
        encoded = self._sampled(model, x, draws) if self._coded is None else self._quantised(x, self._coded)
        z = encoded.z
        if draws.teacher_latents is not None:
            z = draws.teacher_latents
        if draws.noise is not None and draws.noise_deviation is not None:
            z = noisy_latents(z, draws.noise_deviation, draws.noise)
        if draws.transform is not None:
            z = draws.transform.latents(z)
        return Outputs(
            x_hat=self._decode(model, z).float(),
            mean=encoded.mean,
            logvar=encoded.logvar,
            bits=encoded.bits,
            log_scale=self.log_scale,
            projected=None if self.projection is None else self.projection(encoded.mean).float(),
            latents=encoded.latents,
            codes=encoded.codes,
        )

    def _told(self, labels: torch.Tensor) -> LatentModel:
        """Return the network under labels, (B,): one tensor for both parts, so what is hidden is hidden from both."""
        assert isinstance(self._model, ConditionalKLModel)
        return self._model.under(labels)

    def _sampled(self, model: LatentModel, x: torch.Tensor, draws: Draws) -> _Encoded:
        """Encode to a posterior, and draw from it."""
        with self._encoding():
            posterior = model.encode(x)
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
            coded = self.rate.rounded(mean, draws.quality) if self._decodes_rounded else noisy
            z = torch.where(draws.coded[:, None, None, None], coded, z)
        return _Encoded(z=z, mean=mean, logvar=logvar, bits=bits, latents=(mean,))

    def _quantised(self, x: torch.Tensor, model: CodebookModel) -> _Encoded:
        """Encode map by map: what a quantiser gives, the maps after it see."""
        quantisers = self.quantisers
        latents: list[torch.Tensor] = []
        codes: list[Codes] = []

        def quantise(level: int, z: torch.Tensor) -> torch.Tensor:
            latents.append(z)
            codes.append(quantisers[level](z, model.codebooks[level]))
            return codes[-1].z_q

        with self._encoding():
            z = model.pack(model.quantised(x, quantise))
        return _Encoded(z=z, mean=model.pack(latents), latents=tuple(latents), codes=tuple(codes))

    def _encoding(self) -> AbstractContextManager[Any]:
        return torch.no_grad() if self._frozen_encoder else nullcontext()

    @property
    def is_quantised(self) -> bool:
        """Whether latents become codebook vectors by now."""
        return self._coded is not None and all(bool(quantiser.started) for quantiser in self.quantisers)

    def _decode(self, model: LatentModel, z: torch.Tensor) -> torch.Tensor:
        if self._coded is None:
            return model.decode(z)
        return self._coded.decode_vectors(z)  # vectors already, to the bit

    @torch.no_grad()
    def settle(self, live: nn.Module) -> None:
        """See `train.averaging.Settles`: averaged vectors have to be a codebook."""
        assert isinstance(live, AutoencoderModule)
        if self._coded is None or live._coded is None:
            return
        codebooks = zip(self._coded.codebooks, live._coded.codebooks, strict=True)
        for own, theirs, (average, weight) in zip(self.quantisers, live.quantisers, codebooks, strict=True):
            own.settle(average, weight, theirs)


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
