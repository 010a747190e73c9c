"""What a recipe can set: one frozen dataclass per component; `train.recipe` reads them. Must not import torch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from train.checks import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a diffusers.AutoencoderKL."""

    family: Literal["kl"] = "kl"
    """Which class of network; more follow."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Widths from full resolution down; f = 2^(number of widths - 1)."""
    layers_per_block: int = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    latent_channels: int = 4
    """D."""
    norm_num_groups: int = 32
    """Groups of GroupNorm; must divide every width."""
    mid_block_add_attention: bool = True
    """Self-attention over the whole latent grid, in the middle of encoder and decoder."""
    init: Literal["linear", "diffusers"] = "linear"
    """linear: a nearly linear pyramid that lets brightness pass, learns much sooner; diffusers: torch's default."""
    use_quant_conv: bool = True
    """The two 1x1 convolutions around the latents, as in Stable Diffusion 1 and 2."""

    def __post_init__(self) -> None:
        require(self.norm_num_groups >= 1, "model.norm_num_groups", self.norm_num_groups, ">= 1")
        require(len(self.block_out_channels) >= 1, "model.block_out_channels", self.block_out_channels, "at least one")
        for width in self.block_out_channels:
            require(
                width > 0 and width % self.norm_num_groups == 0,
                "model.block_out_channels",
                width,
                f"multiples of model.norm_num_groups = {self.norm_num_groups}",
            )
            require(
                self.init != "linear" or width % (2 * self.norm_num_groups) == 0,
                "model.norm_num_groups",
                self.norm_num_groups,
                f"an even number of channels in each group of width {width} (one channel a group loses brightness)",
            )
        require(self.layers_per_block >= 1, "model.layers_per_block", self.layers_per_block, ">= 1")
        require(self.latent_channels >= 1, "model.latent_channels", self.latent_channels, ">= 1")

    @property
    def f(self) -> int:
        """The downsampling factor."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    shards: str = ""
    """Folder written by `codec-train shards`."""
    crop: int = 256
    """Side of the square random crop, pixels; a multiple of f. Smaller images are enlarged to it."""
    final_crop: int = 0
    """Side of the crop in the last part of the run, pixels; 0 = `crop` throughout. Small crops give many cheap steps;
    large ones then fit the norms, which look at the whole image, to large images."""
    final_part: float = 0.35
    """The last part of the run that takes `final_crop`, as a share of its length."""
    flip: bool = True
    """Mirror half of the crops."""
    n_validation: int = 64
    """Images held out of training, chosen by a hash of their keys; 0 = none."""
    validation_crop: int = 256
    """Largest side of the centre crop that validation sees, pixels."""
    workers: int = 1
    """Processes that read images, per rank; 0 = read in the training process."""
    cache_mb: float = 0.0
    """Decoded images that each worker keeps in memory, 10^6 bytes: spares small sets their decoding; 0 = none."""

    def __post_init__(self) -> None:
        require(self.crop >= 8, "data.crop", self.crop, ">= 8")
        require(self.final_crop == 0 or self.final_crop >= 8, "data.final_crop", self.final_crop, "0 or >= 8")
        require(0 <= self.final_part <= 1, "data.final_part", self.final_part, "0..1")
        require(self.n_validation >= 0, "data.n_validation", self.n_validation, ">= 0")
        require(self.validation_crop >= 8, "data.validation_crop", self.validation_crop, ">= 8")
        require(self.workers >= 0, "data.workers", self.workers, ">= 0")
        require(self.cache_mb >= 0, "data.cache_mb", self.cache_mb, ">= 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """loss = pixel + perceptual_weight * perceptual + ms_ssim_weight * (1 - MS-SSIM) + kl_weight * KL."""

    pixel: Literal["l1", "l2"] = "l1"
    """Mean over B, C, H, W of |x - x_hat| or of its square, pixels in [-1, 1]."""
    perceptual: Literal["auto", "sqz10", "lpips-vgg", "lpips-alex", "none"] = "auto"
    """auto: sqz10 when `features` or its default places hold SqueezeNet 1.0, else none (MS-SSIM takes its place)."""
    features: str = ""
    """File or folder of the perceptual backbone; empty = $LATENT_CODEC_FEATURES, then the torch cache."""
    perceptual_weight: float = 0.15
    """Weight of the perceptual distance, mean over B."""
    ms_ssim_weight: float = 0.0
    """Weight of 1 - MS-SSIM (mean over B)."""
    fallback_ms_ssim_weight: float = 0.5
    """Least ms_ssim_weight of a run with perceptual = "auto" that finds no features."""
    kl_weight: float = 1e-3
    """Weight of KL(q(z|x) || N(0, I)) in nats per image pixel: sum over D, h, w, divided by H * W, mean over B."""

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "ms_ssim_weight", "fallback_ms_ssim_weight", "kl_weight"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), ">= 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and the moving average of the weights."""

    lr: float = 1e-4
    """Peak learning rate; never rescaled by batch size or ranks."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or half a cosine down to `final_lr_ratio` of the peak at the end of the run."""
    final_lr_ratio: float = 0.01
    """Learning rate at the end / at the peak (cosine)."""
    warmup_images: int = 2000
    """Images over which the learning rate grows linearly from 0."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    batch_size: int = 16
    """Images per forward pass and rank."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights, which are what is exported; warm-up (1 + t) / (10 + t)."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "> 0")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "0 <= beta < 1 each")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        require(0 <= self.final_lr_ratio <= 1, "optim.final_lr_ratio", self.final_lr_ratio, "0..1")
        require(self.warmup_images >= 0, "optim.warmup_images", self.warmup_images, ">= 0")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, ">= 0")
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, ">= 1")
        require(self.accumulate >= 1, "optim.accumulate", self.accumulate, ">= 1")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "0 <= decay < 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the model folder is measured on, after training."""

    name: str = ""
    """Short name of the model; empty = the run folder's name."""
    data_licence: str = ""
    """Licence of the training images, for the model card; empty = the card says that it is not stated."""
    statistics_images: int = 400
    """Training images that latent statistics and entropy tables are measured on, whole (largest side 1024 pixels)."""

    def __post_init__(self) -> None:
        require(self.statistics_images >= 1, "export.statistics_images", self.statistics_images, ">= 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where, and how often."""

    out: str = ""
    """Run folder; must be new or empty."""
    n_images: int = 1_000_000
    """Length of the run in images seen, over all ranks."""
    time_limit_min: float = 0.0
    """Ends the run (and its schedule) after so many minutes of training (validation, checkpoints and export not
    counted) if n_images is not reached; 0 = no limit."""
    seed: int = 0
    """Of weights, crops, order and posterior noise."""
    precision: Literal["bf16", "no"] = "bf16"
    """bf16 autocast of the networks (weights stay float32), or none."""
    log_every: int = 20
    """Steps between lines of log.jsonl."""
    validate_every: int = 50_000
    """Images between validations."""
    checkpoint_every: int = 100_000
    """Images between checkpoints; the end of the run always writes one."""

    def __post_init__(self) -> None:
        require(self.n_images >= 1, "run.n_images", self.n_images, ">= 1")
        require(self.seed >= 0, "run.seed", self.seed, ">= 0")
        require(self.time_limit_min >= 0, "run.time_limit_min", self.time_limit_min, ">= 0")
        for name in ("log_every", "validate_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), ">= 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    task: Literal["autoencoder"] = "autoencoder"
    """What is trained; more follow."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("crop", "final_crop"):
            side = getattr(self.data, name)
            require(side % self.model.f == 0, f"data.{name}", side, f"multiples of f = {self.model.f}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)
