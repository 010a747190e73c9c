"""An autoencoder that knows the class of its image (a CVAE, Sohn et al. 2015): the network and its adapter.

    c -> Condition -> e -> scale and shift in every residual block of encoder and decoder (FiLM)
    x, e -> encoder -> q(z|x, c), by the KL near N(0, I) -> z
    z, e -> decoder -> x_hat of p(x|z, c)

`diffusers.AutoencoderKL` has no place for a condition, so the network is a class of this project, made of diffusers'
blocks, whose names its weights keep. Its folders load with `codec.latent_model.load_conditional`, not in a diffusers
pipeline. Entries: `ConditionalAutoencoderKL`, `ConditionalKLModel`. Imports torch and diffusers.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from codec.adapter_base import Adapter, Posterior
from codec.head.blocks import Condition, start_small
from codec.head.conditions import Conditions, conditions_of, generators

NO_CLASS = -1
"""The label of an image whose class the network is not told."""


class FilmEncoder(Encoder):  # type: ignore[misc]
    """diffusers' encoder, its residual blocks modulated by a condition's vector."""

    def __init__(self, features: int, **fields: Any) -> None:
        """Build it; `features`: of the vector; `fields`: of diffusers' class."""
        super().__init__(**fields)
        _modulate(self, features)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return (B, 2 D, h, w) of images, (B, C, H, W), and vectors, (B, features)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            for resnet in block.resnets:  # the block itself passes no vector on
                x = resnet(x, e)
            for halve in block.downsamplers or ():
                x = halve(x)
        x = self.mid_block(x, e)
        out: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return out


class FilmDecoder(Decoder):  # type: ignore[misc]
    """diffusers' decoder, its residual blocks modulated by a condition's vector."""

    def __init__(self, features: int, **fields: Any) -> None:
        """Build it; see `FilmEncoder`."""
        super().__init__(**fields)
        _modulate(self, features)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        """Return images, (B, C, H, W), of latents, (B, D, h, w), and vectors, (B, features)."""
        x = self.mid_block(self.conv_in(z), e)
        for block in self.up_blocks:
            x = block(x, e)
        out: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return out


def _modulate(part: nn.Module, features: int) -> None:
    """Let a vector decide scale and shift after the second norm of every residual block: FiLM, arXiv:1709.07871 eq. 2.

    diffusers' block can, for the time step of its diffusion models; encoders and decoders do not ask it to.
    """
    for block in part.modules():
        if isinstance(block, ResnetBlock2D):
            block.time_embedding_norm = "scale_shift"
            block.skip_time_act = True  # `Condition` ends in one
            block.time_emb_proj = nn.Linear(features, 2 * block.out_channels)
            start_small(block.time_emb_proj, 0.3)


class ConditionalAutoencoderKL(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """See the module. Parts and fields are named as in diffusers' AutoencoderKL."""

    _supports_group_offloading = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        classes: tuple[str, ...] = ("0",),
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        condition_features: int = 128,
    ) -> None:
        """Make a network of random weights; the fields are AutoencoderKL's, but for these.

        Args:
            classes: names of the labels 0, 1, ...
            use_quant_conv: both 1 x 1 convolutions around the latents.
            condition_features: of the vector that the condition becomes.
        """
        super().__init__()
        n = len(block_out_channels)
        fields = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        into = {"in_channels": in_channels, "out_channels": latent_channels, "double_z": True}
        out = {"in_channels": latent_channels, "out_channels": out_channels}
        down, up = ("DownEncoderBlock2D",) * n, ("UpDecoderBlock2D",) * n
        self.condition = Condition(condition_features, n_classes=len(classes))
        self.encoder = FilmEncoder(condition_features, **into, **fields, down_block_types=down)
        self.decoder = FilmDecoder(condition_features, **out, **fields, up_block_types=up)
        both = 2 * latent_channels
        self.quant_conv = nn.Conv2d(both, both, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_quant_conv else None

    def encode(self, x: Tensor, labels: Tensor | None = None) -> AutoencoderKLOutput:
        """Return q(z|x, c), raw latents.

        Args:
            x: (B, C, H, W) in [-1, 1], H and W multiples of f.
            labels: (B,) int64, `NO_CLASS` = without; None = all without.
        """
        moments = self.encoder(x, self._vectors(labels, len(x)))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, z: Tensor, labels: Tensor | None = None) -> DecoderOutput:
        """Return the images, (B, C, H, W), of raw latents, (B, D, h, w); `labels`: see `encode`."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return DecoderOutput(sample=self.decoder(z, self._vectors(labels, len(z))))

    def forward(self, sample: Tensor, labels: Tensor | None = None) -> DecoderOutput:
        """Return the reconstruction of images, (B, C, H, W) in [-1, 1], both parts under their classes."""
        return self.decode(self.encode(sample, labels).latent_dist.mode(), labels)

    def _vectors(self, labels: Tensor | None, n: int) -> Tensor:
        if labels is None:
            return self.condition.none(n)
        vectors: Tensor = self.condition(labels.clamp(min=0), labels < 0)
        return vectors


class ConditionalKLModel(Adapter):
    """Adapter of `ConditionalAutoencoderKL`: without a condition, until `under` says one.

    Normalized latents are the raw ones: the KL holds them to N(0, I).
    """

    family = "kl"
    scaling_factor = 1.0
    shift_factor = 0.0

    def __init__(self, network: ConditionalAutoencoderKL) -> None:
        config = network.config
        self.network: nn.Module = network
        self._kl = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self.decoder_out: nn.Module = network.decoder.conv_out
        self.classes: tuple[str, ...] = tuple(config.classes)
        self._labels: Tensor | None = None

    def under(self, c: Conditions | str | int) -> "ConditionalKLModel":
        """Return the same model with a condition, which `encode` and `decode` then know; costs nothing.

        Args:
            c: a class's name or number for all images; or one for each image, None = without; or labels, (B,) int64,
                -1 = without, which are not looked at.

        Raises:
            UsageError: an unknown class.
        """
        bound = copy.copy(self)
        if isinstance(c, Tensor):
            bound._labels = c
            return bound
        known = [c] if c is None or isinstance(c, str | int) else c
        where = self._kl.config.get("_name_or_path") or type(self._kl).__name__
        labels, hidden = conditions_of(known, None, self.classes, str(where))
        bound._labels = labels.masked_fill(hidden, NO_CLASS)
        return bound

    def encode(self, x: Tensor) -> Posterior:
        """See `LatentModel.encode`; raises ValueError where there are not as many conditions as images."""
        posterior = self._kl.encode(x, self._labels_of(x)).latent_dist
        return Posterior(posterior.mean.float(), posterior.logvar.float())

    def decode(self, z: Tensor) -> Tensor:
        """See `LatentModel.decode`; raises ValueError where there are not as many conditions as latents."""
        x_hat: Tensor = self._kl.decode(z, self._labels_of(z)).sample
        return x_hat

    def draw(
        self, n: int, *, seed: int = 0, numbers: Sequence[int] | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Draw raw latents of the prior N(0, I), which is the same under every class: (n, D, h, w).

        Args:
            n: how many.
            seed: of the draws.
            numbers: of the images; equal seed and number give the same draw, whatever else is drawn. None = 0, 1, ...
            size: height and width of the images, pixels, multiples of f; None = as in training.

        Raises:
            ValueError: another size, or not one number for each.
        """
        height, width = size or (int(self._kl.config.sample_size),) * 2
        if height < 1 or width < 1 or height % self.f or width % self.f:
            raise ValueError(f"size {height} x {width}, expected multiples of f = {self.f}")
        chosen = range(n) if numbers is None else numbers
        if len(chosen) != n:
            raise ValueError(f"numbers: {len(chosen)}, expected {n}")
        shape = (self.channels, height // self.f, width // self.f)
        drawn = [rng.standard_normal(shape, dtype=np.float32) for rng in generators(seed, chosen, "prior")]
        return torch.from_numpy(np.array(drawn, np.float32).reshape(n, *shape)).to(self._kl.device)

    def _labels_of(self, each: Tensor) -> Tensor | None:
        if self._labels is None:
            return None
        if len(self._labels) not in (1, len(each)):
            raise ValueError(f"{len(self._labels)} conditions, expected 1 or one for each of {len(each)}")
        return self._labels.to(each.device).expand(len(each))
