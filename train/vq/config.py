"""What a recipe can set about the quantiser of a VQModel. Must not import torch."""

import math
from dataclasses import dataclass
from typing import Literal

from codec.limits import MAX_CODES
from train.checks import require
from train.schedules import check_moment, parse_moment

LEARNED = ("ema", "gradient", "simvq")  # kinds whose vectors are learned; those of the others are given
_FREE = ("ema", "gradient")  # kinds whose vectors move each by itself
_MOST_BITS = 16  # of lfq: K x d vectors are stored, and indices are to fit into 16 bits
_LATEST_START = 0.9  # of the run: a codebook has to be used to be learned


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """The quantiser between encoder and decoder (model.family vq)."""

    kind: Literal["ema", "gradient", "simvq", "fsq", "lfq"] = "ema"
    """ema: each vector is the running mean of the latents that chose it; gradient: the codebook's loss moves it; simvq:
    fixed random vectors under one learned linear map (arXiv:2411.02038); fsq: a lattice of `fsq_levels`
    (arXiv:2309.15505); lfq: the corners of a cube, with an entropy loss (arXiv:2310.05737)."""
    codebook_size: int = 1024
    """K; of the fine level where there are two."""
    coarse_codebook_size: int = 0
    """K of a second, coarser map, half as wide and high (VQ-VAE-2, arXiv:1906.00446); 0 = one level. All else here
    holds for both (ema, gradient, simvq)."""
    codebook_dim: int = 0
    """d, channels of a vector; 0 = model.latent_channels (fsq: one for each level; lfq: log2 K)."""
    cosine: bool = False
    """Latents and vectors are brought to length 1, so that the angle decides (ema, gradient)."""
    rotation_trick: bool = False
    """Gradients pass the quantiser turned as the latent was turned to its vector (arXiv:2410.06424), not straight."""
    decay: float = 0.99
    """Per optimizer step, of the running means: of vectors (ema), of how often each is used, of lfq's frequencies."""
    beta: float = 0.25
    """Weight of the commitment, (z - sg[z_q])^2, mean over B, d, h, w; of fsq see there."""
    weight: float = 1.0
    """Weight of the quantiser's loss, commitment and codebook together."""
    start: str = "2%"
    """Until then latents pass as they are; then the codebook begins with those seen last. Images, or a share of the
    run (ema, gradient, simvq)."""
    kmeans_init: bool = True
    """The codebook begins with k-means of those latents; false: with random vectors, at once (ema, gradient)."""
    kmeans_iterations: int = 10
    """Lloyd's iterations; 0 = the codebook begins with random latents."""
    kmeans_tokens: int = 8
    """Latents per vector that k-means looks at, at most."""
    revive_below: float = 0.1
    """A vector whose running share of the latents falls below this part of 1 / K becomes a random latent of the step;
    0 = never (ema, gradient)."""
    fsq_levels: tuple[int, ...] = ()
    """Levels of each channel (fsq); their product is K."""
    spread_weight: float = 0.1
    """Weight of fsq's spread loss: 0.5 * squared distance of the second moments of the latents, (D + 1)^2 with their
    means, from those of independent standard normal ones, / D."""
    entropy_weight: float = 0.1
    """Weight of lfq's entropy loss: mean entropy of a latent's corner - diversity * entropy of all corners, nats."""
    entropy_temperature: float = 1.0
    """Of the softmax over corners in that loss."""
    diversity: float = 1.0
    """Weight of the second entropy against the first."""

    def __post_init__(self) -> None:
        size = self.codebook_size
        require(size >= 2, "vq.codebook_size", size, ">= 2: one vector carries nothing")
        require(size <= MAX_CODES, "vq.codebook_size", size, f"<= {MAX_CODES}, what the file format can hold")
        self._check_coarse()
        require(self.codebook_dim >= 0, "vq.codebook_dim", self.codebook_dim, ">= 0")
        for name in ("decay", "revive_below"):
            require(0 <= getattr(self, name) < 1, f"vq.{name}", getattr(self, name), "0 <= value < 1")
        for name in ("beta", "weight", "spread_weight", "entropy_weight", "diversity", "kmeans_iterations"):
            require(getattr(self, name) >= 0, f"vq.{name}", getattr(self, name), ">= 0")
        require(self.kmeans_tokens >= 1, "vq.kmeans_tokens", self.kmeans_tokens, ">= 1")
        require(self.entropy_temperature > 0, "vq.entropy_temperature", self.entropy_temperature, "> 0")
        check_moment("vq.start", self.start)
        late = parse_moment(self.start).share > _LATEST_START
        require(not late, "vq.start", self.start, f"at most {_LATEST_START:.0%} of the run")
        require(not self.cosine or self.kind in _FREE, "vq.cosine", True, f"false with vq.kind {self.kind}")
        require(
            not self.rotation_trick or self.kind in LEARNED,
            "vq.rotation_trick",
            True,
            f"false with vq.kind {self.kind}, whose rounding is no turn",
        )
        self._check_levels()
        self._check_bits()

    def _check_coarse(self) -> None:
        size = self.coarse_codebook_size
        require(size != 1, "vq.coarse_codebook_size", size, "0 (one level) or >= 2: one vector carries nothing")
        require(
            0 <= size <= MAX_CODES, "vq.coarse_codebook_size", size, f"0..{MAX_CODES}, what the file format can hold"
        )
        given = f"0 with vq.kind {self.kind}: d decides about K, and both levels have the same d"
        require(not size or self.kind in LEARNED, "vq.coarse_codebook_size", size, given)

    def _check_levels(self) -> None:
        levels, size = self.fsq_levels, self.codebook_size
        if self.kind != "fsq":
            require(not levels, "vq.fsq_levels", levels, f"empty with vq.kind {self.kind}")
            return
        require(len(levels) >= 1, "vq.fsq_levels", levels, "a level for each channel, e.g. [8, 8, 8, 5, 5]")
        few = ">= 3 each: the bound of two cells lies far out, where no latent comes (lfq has two for each channel)"
        require(all(level >= 3 for level in levels), "vq.fsq_levels", levels, few)
        product = math.prod(levels)
        require(product == size, "vq.codebook_size", size, f"{product}, the product of vq.fsq_levels {list(levels)}")
        self._check_dim(len(levels), "the number of vq.fsq_levels")

    def _check_bits(self) -> None:
        if self.kind != "lfq":
            return
        size = self.codebook_size
        bits = size.bit_length() - 1
        require(size == 1 << bits, "vq.codebook_size", size, "a power of two with vq.kind lfq: the corners of a cube")
        most = f"<= {1 << _MOST_BITS} with vq.kind lfq: every corner is stored as a vector, indices have 16 bits"
        require(bits <= _MOST_BITS, "vq.codebook_size", size, most)
        self._check_dim(bits, "log2 of vq.codebook_size")

    def _check_dim(self, expected: int, what: str) -> None:
        good = self.codebook_dim in (0, expected)
        require(good, "vq.codebook_dim", self.codebook_dim, f"0 or {expected}, {what}")

    def dim(self, latent_channels: int) -> int:
        """Return d, `codebook_dim` resolved."""
        if self.kind == "fsq":
            return len(self.fsq_levels)
        if self.kind == "lfq":
            return self.codebook_size.bit_length() - 1
        return self.codebook_dim or latent_channels
