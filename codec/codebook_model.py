"""Adapters of networks with codebooks: what they share, and that of `diffusers.VQModel`. Imports torch and diffusers.

    x -> encode -> raw latents z -> quantise -> indices -> vectors -> z_q -> decode_vectors -> x_hat

A network may have several codebooks, each with its map of indices (`codec.index_maps`): see `codec.two_level`.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from diffusers import VQModel

from codec import fsq
from codec.adapter_base import Adapter, Posterior
from codec.errors import ModelError
from codec.index_maps import IndexMap

_MOST_DISTANCES = 1 << 22  # between latents and codebook vectors, held at once

Quantise = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of the map, its raw latents (B, d, h, w)) -> what all that follows sees of them, the same shape."""

T = TypeVar("T")


def nearest(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the indices of the nearest vectors, (B, h, w) int64, of latents (B, d, h, w) in a codebook (K, d).

    In float32 whatever the autocast, a part of the positions at a time: (B*h*w, K) distances can be gigabytes.
    """
    z, codebook = z.detach().float(), codebook.detach().float()
    flat = z.movedim(1, -1).reshape(-1, z.shape[1])
    with torch.autocast(z.device.type, enabled=False):
        parts = torch.split(flat, max(1, _MOST_DISTANCES // len(codebook)))
        found = torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in parts])
    return found.reshape(z.shape[0], *z.shape[2:])


def vectors_of(indices: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the vectors, (B, d, h, w), of indices, (B, h, w) int64, in a codebook (K, d)."""
    return codebook[indices].movedim(-1, 1).contiguous()


class CodebookModel(Adapter):
    """Adapter of `diffusers.VQModel`: latents are continuous, and `decode` moves each to its codebook vector.

    That is the nearest one; or, where config.json has the key `fsq_levels`, which diffusers passes over, the cell of
    finite scalar quantisation that the latents lie in. VQModel itself cannot tell cells: its own `decode` of codebook
    vectors is right for such a model, its own quantisation of latents is not.

    Attributes:
        maps: of its indices, coarsest first; one.
        prefixes: what the names of the parts and figures of each map begin with.
        fsq_levels: cells along each of the D dimensions, whose product is K; empty = the nearest vector counts.
    """

    family = "vq"
    shift_factor = 0.0  # the class has none
    maps: tuple[IndexMap, ...]
    prefixes: tuple[str, ...] = ("",)
    fsq_levels: tuple[int, ...] = ()

    def __init__(self, network: VQModel) -> None:
        """Raises ModelError where fsq_levels do not fit the codebook."""
        config = network.config
        self.network: torch.nn.Module = network
        self._vq = network
        self.f = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(network.quantize.vq_embed_dim)
        self.maps = (IndexMap(int(config.num_vq_embeddings), 1),)
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
    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """The vectors of each map, (K, d); of a VQModel d = D."""
        return (self._vq.quantize.embedding.weight,)

    @property
    def codebook_size(self) -> int:
        """K; raises ModelError where there is more than one codebook."""
        return self._only(self.maps).codebook_size

    @property
    def codebook(self) -> torch.Tensor:
        """The vectors, (K, D); raises ModelError where there is more than one codebook."""
        return self._only(self.codebooks)

    def _only(self, each: Sequence[T]) -> T:
        if len(each) != 1:
            raise ModelError(f"a {type(self.network).__name__} has {len(each)} codebooks; this works with one alone")
        return each[0]

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
        return vectors_of(indices, self.codebook)

    def decode_vectors(self, z_q: torch.Tensor) -> torch.Tensor:
        """Return x_hat, (B, 3, h*f, w*f), of codebook vectors, (B, D, h, w), which are not quantised again."""
        x_hat: torch.Tensor = self._vq.decode(z_q, force_not_quantize=True).sample
        return x_hat

    def indices(self, x: torch.Tensor) -> torch.Tensor:
        """Return which codebook vectors stand for x, (B, h, w) int64 in [0, K)."""
        return self.quantise(self.encode(x).mean)

    def quantise(self, z: torch.Tensor) -> torch.Tensor:
        """Return the indices of the codebook vectors that raw latents become: (B, D, h, w) -> (B, h, w) int64."""
        if self.fsq_levels:
            return fsq.to_index(fsq.cells(z.detach().float(), self.fsq_levels), self.fsq_levels)
        return nearest(z, self.codebook)

    def grids(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Return the indices of each map, (B, h*s, w*s), of those that `quantise` gives."""
        return [indices]

    def quantised(self, x: torch.Tensor, quantise: Quantise) -> list[torch.Tensor]:
        """Encode x, and have somebody quantise what comes: what a trainer does, whose gradients pass that.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            quantise: called once for each map, in order; a later map may depend on what it returned.

        Returns:
            What it returned: (B, d, h*s, w*s) of each map, for `pack` and `decode_vectors`.
        """
        return [quantise(0, self.encode(x).mean)]

    def pack(self, each: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return latents or vectors of all maps, (B, d, h*s, w*s) each, as one (B, D, h, w)."""
        return self._only(each)

    def unpack(self, z: torch.Tensor) -> list[torch.Tensor]:
        """Return the latents of each map, (B, d, h*s, w*s), of raw ones, (B, D, h, w); the inverse of `pack`."""
        return [z]
