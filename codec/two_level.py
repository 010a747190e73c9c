"""A VQ model of two levels (VQ-VAE-2, Razavi et al. 2019, arXiv:1906.00446): the network and its adapter.

    x -> encoder -> features (f / 2) -> coarse_encoder -> coarse latents (f) -> coarse_quantize -> z_q, coarse
                       |                                                            |
                       +--- joined, 1 x 1 <---- coarse_decoder (back to f / 2) <----+
                                 v                                                  |
                            fine latents -> quantize -> z_q, fine                   |
                                                          v                         v
                                              decoder <- joined, 1 x 1 <- coarse_upsample (learned)     -> x_hat

The coarse map carries what is the same over large areas, the fine map the rest. `diffusers.VQModel` cannot hold this:
it has one encoder, one codebook, and a decoder that sees one grid. So the network is a class of this project, made of
diffusers' blocks; its folders load with `codec.latent_model.load_latent_model`, not in a diffusers pipeline. Entries:
`TwoLevelVQModel`, `TwoLevelModel`. Imports torch and diffusers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder, VectorQuantizer
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional

from codec.adapter_base import Posterior
from codec.codebook_model import CodebookModel, Quantise, nearest, vectors_of
from codec.errors import ModelError
from codec.index_maps import IndexMap, planes

SCALE = 2  # of the fine map against the coarse one


@dataclass
class TwoLevelOutput(BaseOutput):  # type: ignore[misc]
    """Raw latents of both levels; the fine ones follow from the quantised coarse ones.

    Attributes:
        coarse: (B, d, h, w).
        fine: (B, d, 2h, 2w).
    """

    coarse: torch.Tensor
    fine: torch.Tensor


class TwoLevelVQModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """See the module. Parts that only one level has begin with `coarse_`; the others are named as in VQModel."""

    _skip_layerwise_casting_patterns = ["quantize"]  # noqa: RUF012, of diffusers
    _supports_group_offloading = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 64),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        num_coarse_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 1.0,
        mid_block_add_attention: bool = True,
    ) -> None:
        """Make a network of random weights; the fields are VQModel's, but for these.

        Args:
            block_out_channels: widths from the image's size down to the coarse level's, which is the last one: f is
                2^(n - 1), and the fine level's factor half of it.
            num_vq_embeddings: K of the fine level.
            num_coarse_vq_embeddings: K of the coarse level.
            vq_embed_dim: d of both levels; None = latent_channels.

        Raises:
            ModelError: fewer than two widths.
        """
        super().__init__()
        if len(block_out_channels) < 2:
            raise ModelError(f"block_out_channels {list(block_out_channels)}, expected one for each of two levels")
        fine, coarse = block_out_channels[:-1], block_out_channels[-2:]
        width, dim = fine[-1], vq_embed_dim or latent_channels
        how = {
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        into, out = ({"double_z": False} | how, how)
        self.encoder = Encoder(in_channels, width, **_down(fine), **into)
        self.coarse_encoder = Encoder(width, latent_channels, **_down(coarse), **into)
        self.coarse_quant_conv = nn.Conv2d(latent_channels, dim, 1)
        self.coarse_quantize = VectorQuantizer(num_coarse_vq_embeddings, dim, beta=0.25)
        self.coarse_decoder = Decoder(dim, width, **_up(coarse), **out)
        self.quant_conv = nn.Conv2d(2 * width, dim, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, dim, beta=0.25)
        self.coarse_upsample = Upsample2D(dim, use_conv=True, out_channels=dim)
        self.post_quant_conv = nn.Conv2d(2 * dim, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, **_up(fine), **out)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what both levels are made of, (B, C', 2h, 2w), of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: sides that are not multiples of f.
        """
        f = 2 ** (len(self.config.block_out_channels) - 1)
        if x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]} pixels, expected multiples of f = {f}")
        features: torch.Tensor = self.encoder(x)
        return features

    def coarse_latents(self, features: torch.Tensor) -> torch.Tensor:
        """Return the raw coarse latents, (B, d, h, w), of `features`."""
        z: torch.Tensor = self.coarse_quant_conv(self.coarse_encoder(features))
        return z

    def fine_latents(self, features: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        """Return the raw fine latents, (B, d, 2h, 2w); `coarse`: the quantised coarse ones, (B, d, h, w)."""
        z: torch.Tensor = self.quant_conv(torch.cat([self.coarse_decoder(coarse), features], dim=1))
        return z

    def encode(self, x: torch.Tensor) -> TwoLevelOutput:
        """Return the raw latents of images, (B, C, H, W) in [-1, 1]."""
        return self.latents(self.features(x))

    def latents(self, features: torch.Tensor) -> TwoLevelOutput:
        """Return the raw latents of `features`."""
        coarse = self.coarse_latents(features)
        return TwoLevelOutput(coarse=coarse, fine=self.fine_latents(features, _snap(coarse, self.coarse_quantize)))

    def decode(self, coarse: torch.Tensor, fine: torch.Tensor, force_not_quantize: bool = False) -> DecoderOutput:
        """Return the images, (B, C, H, W), of raw latents, or of vectors with `force_not_quantize`.

        Args:
            coarse: (B, d, h, w).
            fine: (B, d, 2h, 2w).
            force_not_quantize: they are codebook vectors already.
        """
        if not force_not_quantize:
            coarse, fine = _snap(coarse, self.coarse_quantize), _snap(fine, self.quantize)
        return DecoderOutput(sample=self.decoder(self.joined(coarse, fine)))

    def joined(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """Return what the decoder takes, (B, C', 2h, 2w), of vectors, see `decode`."""
        joined: torch.Tensor = self.post_quant_conv(torch.cat([fine, self.coarse_upsample(coarse)], dim=1))
        return joined

    def forward(self, sample: torch.Tensor) -> DecoderOutput:
        """Return the reconstruction of images, (B, C, H, W) in [-1, 1]."""
        z = self.encode(sample)
        return self.decode(z.coarse, z.fine)


def _down(widths: Sequence[int]) -> dict[str, tuple[int, ...] | tuple[str, ...]]:
    return {"block_out_channels": tuple(widths), "down_block_types": ("DownEncoderBlock2D",) * len(widths)}


def _up(widths: Sequence[int]) -> dict[str, tuple[int, ...] | tuple[str, ...]]:
    return {"block_out_channels": tuple(widths), "up_block_types": ("UpDecoderBlock2D",) * len(widths)}


def _snap(z: torch.Tensor, quantize: VectorQuantizer) -> torch.Tensor:
    """Return the vectors nearest to latents, (B, d, h, w), to the bit, without a gradient."""
    weight = quantize.embedding.weight
    return vectors_of(nearest(z, weight), weight)


class TwoLevelModel(CodebookModel):
    """Adapter of `TwoLevelVQModel`. Its grid is the coarse one; what is finer is cut into places of 2 x 2.

    Raw latents have D = 5 d channels: the coarse ones, then the fine ones as `pixel_unshuffle` of torch cuts them
    (channel, dy, dx). Indices have 5 planes, (B, 5, h, w), as in `codec.index_maps`: coarse, then fine (dy, dx).
    """

    prefixes = ("coarse_", "")

    def __init__(self, network: TwoLevelVQModel) -> None:
        config = network.config
        self.network: torch.nn.Module = network
        self._two = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.maps = (
            IndexMap(int(config.num_coarse_vq_embeddings), 1),
            IndexMap(int(config.num_vq_embeddings), SCALE),
        )
        self.dim = int(network.quantize.vq_embed_dim)  # d
        self.channels = planes(self.maps) * self.dim
        self.scaling_factor = float(config.scaling_factor)
        self.decoder_out: torch.nn.Module = network.decoder.conv_out

    @property
    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """See `CodebookModel.codebooks`: coarse, fine."""
        return self._two.coarse_quantize.embedding.weight, self._two.quantize.embedding.weight

    def encode(self, x: torch.Tensor) -> Posterior:
        """See `CodebookModel.encode`; the fine latents are those that follow from the quantised coarse ones."""
        return Posterior(self.latents(self._two.features(x)), None)

    def latents(self, features: torch.Tensor) -> torch.Tensor:
        """Return the raw latents, (B, D, h, w) float32, of `TwoLevelVQModel.features`."""
        z = self._two.latents(features)
        return self.pack([z.coarse.float(), z.fine.float()])

    def joined(self, z_q: torch.Tensor) -> torch.Tensor:
        """Return what the network's `decoder` takes, (B, C', 2h, 2w), of codebook vectors, (B, D, h, w)."""
        return self._two.joined(*self.unpack(z_q))

    def quantised(self, x: torch.Tensor, quantise: Quantise) -> list[torch.Tensor]:
        """See `CodebookModel.quantised`."""
        features = self._two.features(x)
        coarse = quantise(0, self._two.coarse_latents(features).float())
        return [coarse, quantise(1, self._two.fine_latents(features, coarse).float())]

    def quantise(self, z: torch.Tensor) -> torch.Tensor:
        """Return the indices of both maps, (B, 5, h, w) int64, that raw latents become, (B, D, h, w)."""
        coarse, fine = (
            nearest(each, codebook)[:, None] for each, codebook in zip(self.unpack(z), self.codebooks, strict=True)
        )
        return torch.cat([coarse, functional.pixel_unshuffle(fine, SCALE)], dim=1)

    def vectors(self, indices: torch.Tensor) -> torch.Tensor:
        """Return z_q, (B, D, h, w), the codebook vectors of indices, (B, 5, h, w) int64 in [0, K) of their map.

        Raises:
            ValueError: another number of planes.
        """
        pairs = zip(self.grids(indices), self.codebooks, strict=True)
        return self.pack([vectors_of(grid, codebook) for grid, codebook in pairs])

    def grids(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """See `CodebookModel.grids`; raises ValueError for another number of planes."""
        _expect(indices, planes(self.maps), "indices")
        return [indices[:, 0], functional.pixel_shuffle(indices[:, 1:], SCALE)[:, 0]]

    def decode_vectors(self, z_q: torch.Tensor) -> torch.Tensor:
        """See `CodebookModel.decode_vectors`; z_q: (B, D, h, w)."""
        coarse, fine = self.unpack(z_q)
        x_hat: torch.Tensor = self._two.decode(coarse, fine, force_not_quantize=True).sample
        return x_hat

    def pack(self, each: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `CodebookModel.pack`."""
        coarse, fine = each
        return torch.cat([coarse, functional.pixel_unshuffle(fine, SCALE)], dim=1)

    def unpack(self, z: torch.Tensor) -> list[torch.Tensor]:
        """See `CodebookModel.unpack`; raises ValueError for another number of channels."""
        _expect(z, self.channels, "latents")
        return [z[:, : self.dim].contiguous(), functional.pixel_shuffle(z[:, self.dim :], SCALE)]


def _expect(z: torch.Tensor, channels: int, what: str) -> None:
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"{what} of shape {tuple(z.shape)}, expected (B, {channels}, h, w)")
