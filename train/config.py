"""What a recipe can set: one frozen dataclass per component; `train.recipe` reads them. Must not import torch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from train import consistency
from train.checks import require
from train.loss_config import AdversarialConfig, HealthConfig, KLConfig, LatentConfig, LossConfig, RateConfig
from train.vq.config import VQConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a diffusers.AutoencoderKL, AutoencoderTiny or VQModel, or one of this project beside them."""

    family: Literal["kl", "tiny", "vq"] = "kl"
    """kl: AutoencoderKL; tiny: AutoencoderTiny, without variance, norms and attention; vq: VQModel, or with
    vq.coarse_codebook_size a model of two levels; see `vq`."""
    init_from: str = ""
    """Folder or name of an autoencoder to start from; it decides family, widths and so on. Empty = from scratch."""
    trainable: Literal["auto", "all", "decoder"] = "auto"
    """decoder: encoder and latents stay as they are; auto: decoder with init_from and 3 image_channels, else all."""
    teacher: str = ""
    """Folder or name of an autoencoder whose latents an AutoencoderTiny learns (distillation); empty = none."""
    teacher_weight: float = 1.0
    """Weight of the squared error (mean over B, D, h, w) of the latents against the teacher's normalized ones."""
    image_channels: int = 3
    """C of the images: 3; 4 = RGBA; with data.samples npy any number of bands from 3 on. More channels than the network
    of init_from has are added to its first and last convolution, so that its latents do not change."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Widths from full resolution down; f = 2^(number of widths - 1). The last one is that of the coarse level where
    there are two (vq.coarse_codebook_size); the fine level's f is half of it."""
    layers_per_block: int = 2
    """Residual blocks a level in the encoder; the decoder has one more (kl, vq) or as many (tiny)."""
    latent_channels: int = 4
    """D; with family vq before the convolution that gives the codebook's d channels."""
    norm_num_groups: int = 32
    """Groups of GroupNorm; must divide every width (kl, vq)."""
    mid_block_add_attention: bool = True
    """Self-attention over the whole latent grid, in the middle of encoder and decoder."""
    init: Literal["linear", "klt", "diffusers"] = "linear"
    """linear: a nearly linear pyramid that lets brightness pass, learns much sooner; klt: the same, but the encoder
    starts as the Karhunen-Loeve transform of blocks of f x f pixels, the decoder as the guess of what it took (kl, with
    latents of deviation 1; vq, with ones that vary as they count); diffusers: torch's default."""
    use_quant_conv: bool = True
    """The two 1x1 convolutions around the latents, as in Stable Diffusion 1 and 2 (kl; a VQModel always has them)."""
    condition: Literal["none", "class"] = "none"
    """class: encoder and decoder are told each image's class, as the shards have it (kl): a CVAE; see docs/head.md."""
    condition_dropout: float = 0.1
    """The share of the training's images whose class is hidden from both parts: the model serves without one too."""

    def __post_init__(self) -> None:
        require(self.teacher_weight >= 0, "model.teacher_weight", self.teacher_weight, ">= 0")
        require(
            not self.teacher or self.family == "tiny",
            "model.teacher",
            self.teacher,
            "empty unless model.family is tiny",
        )
        require(self.norm_num_groups >= 1, "model.norm_num_groups", self.norm_num_groups, ">= 1")
        require(len(self.block_out_channels) >= 1, "model.block_out_channels", self.block_out_channels, "at least one")
        if self.family == "tiny":
            same = len(set(self.block_out_channels)) == 1 and self.block_out_channels[0] > 0
            require(same, "model.block_out_channels", self.block_out_channels, "equal widths (family tiny)")
        for width in self.block_out_channels if self.family != "tiny" else ():
            require(
                width > 0 and width % self.norm_num_groups == 0,
                "model.block_out_channels",
                width,
                f"multiples of model.norm_num_groups = {self.norm_num_groups}",
            )
            require(
                self.init == "diffusers" or width % (2 * self.norm_num_groups) == 0,
                "model.norm_num_groups",
                self.norm_num_groups,
                f"an even number of channels in each group of width {width} (one channel a group loses brightness)",
            )
        require(self.layers_per_block >= 1, "model.layers_per_block", self.layers_per_block, ">= 1")
        require(self.latent_channels >= 1, "model.latent_channels", self.latent_channels, ">= 1")
        require(self.image_channels >= 3, "model.image_channels", self.image_channels, ">= 3")
        dropout = self.condition_dropout
        why = "between 0 and 1: the model has to know what no condition is"
        require(0 < dropout < 1, "model.condition_dropout", dropout, why)

    @property
    def decoder_only(self) -> bool:
        """Whether the encoder stays as it is: `trainable`, resolved. A student learns its encoder too, and so does a
        network that is to see more than the three channels of its base."""
        chosen = self.init_from != "" and self.teacher == "" and self.image_channels == 3
        return self.trainable == "decoder" or (self.trainable == "auto" and chosen)

    @property
    def starts_klt(self) -> bool:
        """Whether the network starts as the transform of `train.klt_init`."""
        return self.init == "klt" and not self.init_from

    @property
    def klt_channels(self) -> tuple[int, ...]:
        """Coefficients that `init = "klt"` keeps at each halving: those of four places, or as many as channels."""
        kept: list[int] = []
        for width in self.block_out_channels[:-1]:
            kept.append(min(4 * (kept[-1] if kept else self.image_channels), width))
        return tuple(kept)

    @property
    def f(self) -> int:
        """The downsampling factor."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    mode: Literal["indexed", "streaming"] = "indexed"
    """indexed: a folder of local or mounted shards, read by offset; order and resume are exact. streaming: webdataset
    URLs, resampled shards through a shuffle buffer; a resumed run goes on with other random draws."""
    shards: str = ""
    """indexed: folder of tar shards (`codec-train shards` writes one; a missing index is built by one scan).
    streaming: webdataset URLs, e.g. "https://host/{000..127}.tar" or "pipe:...", braces expanded."""
    samples: Literal["image", "npy"] = "image"
    """image: image files; npy: arrays (H, W, model.image_channels) uint8, members *.npy of indexed tar shards."""
    local_shards: str = ""
    """streaming: folder of indexed shards that validation and the export's statistics are taken from."""
    shuffle_buffer: int = 2000
    """streaming: samples in the shuffle buffer of each reading process."""
    crop: int = 256
    """Side of the square random crop, pixels; a multiple of f. Smaller images are enlarged to it."""
    crops: tuple[int, ...] = ()
    """Sides to draw from, one per batch of a rank (multi-resolution); empty = `crop` always."""
    random_resize: float = 1.0
    """Crops are cut up to this many times larger and reduced to size (log-uniform); 1 = never resized."""
    aspect_buckets: int = 0
    """indexed: aspect ratios, from 1:2 to 2:1, that images are grouped by; a batch then has one shape of about
    crop x crop pixels, and its images are resized until they just cover it. 0 = square crops."""
    final_crop: int = 0
    """Side of the crop in the last part of the run, pixels; 0 = `crop` throughout. Small crops give many cheap steps;
    large ones then fit the norms, which look at the whole image, to large images."""
    final_part: float = 0.35
    """The last part of the run that takes `final_crop`, as a share of its length."""
    whole: bool = False
    """indexed: resize each image until it just covers crop x crop, in training and validation, in place of cutting
    pieces out of it: small pictures of whole things."""
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
    memory: Literal["none", "device"] = "none"
    """device: indexed RGB images are all decoded once, held as uint8 where the networks are (on each rank's GPU), and
    crops are cut there, the same ones; without workers. none: images are read when their turn comes."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the samples read could not be used (and more than 10)."""

    @property
    def cover(self) -> int:
        """Side of the square that whole images just cover, pixels; 0 = images are not resized."""
        return self.crop if self.whole else 0

    @property
    def sides(self) -> tuple[int, ...]:
        """All sides of crops that a run takes, pixels (with aspect buckets: of squares of the same area)."""
        return (*(self.crops or (self.crop,)), *([self.final_crop] if self.final_crop else []))

    def __post_init__(self) -> None:
        require(self.crop >= 8, "data.crop", self.crop, ">= 8")
        require(self.final_crop == 0 or self.final_crop >= 8, "data.final_crop", self.final_crop, "0 or >= 8")
        require(all(side >= 8 for side in self.crops), "data.crops", self.crops, ">= 8 each")
        require(not self.crops or self.final_crop == 0, "data.crops", self.crops, "empty with data.final_crop")
        require(self.random_resize >= 1, "data.random_resize", self.random_resize, ">= 1")
        require(self.aspect_buckets >= 0, "data.aspect_buckets", self.aspect_buckets, ">= 0")
        require(
            self.aspect_buckets == 0 or self.mode == "indexed",
            "data.aspect_buckets",
            self.aspect_buckets,
            "0 with data.mode streaming: the index tells the shapes",
        )
        require(
            self.aspect_buckets == 0 or self.random_resize == 1,
            "data.random_resize",
            self.random_resize,
            "1 with data.aspect_buckets, which decide the size",
        )
        plain = (self.mode, self.sides, self.aspect_buckets, self.random_resize) == ("indexed", (self.crop,), 0, 1)
        why = "false with data.mode streaming, crops, final_crop, aspect_buckets or random_resize"
        require(plain or not self.whole, "data.whole", self.whole, why)
        cut = (self.mode, self.aspect_buckets, self.random_resize, self.whole) == ("indexed", 0, 1, False)
        why = "none with data.mode streaming, random_resize, aspect_buckets or whole: its crops are not resized"
        require(cut or self.memory == "none", "data.memory", self.memory, why)
        require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, ">= 1")
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "0..1")
        require(0 <= self.final_part <= 1, "data.final_part", self.final_part, "0..1")
        require(self.n_validation >= 0, "data.n_validation", self.n_validation, ">= 0")
        require(self.validation_crop >= 8, "data.validation_crop", self.validation_crop, ">= 8")
        require(self.workers >= 0, "data.workers", self.workers, ">= 0")
        require(self.cache_mb >= 0, "data.cache_mb", self.cache_mb, ">= 0")


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
    rewarm_images: int = 1000
    """The same at the start of each further go (run.continue_from), whose optimizers know nothing yet: up to what the
    schedule asks for there."""
    clip_norm: float = 1.0
    """Largest gradient norm of a group of parameters (network; steps and densities; discriminator); 0 = no clipping."""
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
        for name in ("warmup_images", "rewarm_images"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), ">= 0")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, ">= 0")
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, ">= 1")
        require(self.accumulate >= 1, "optim.accumulate", self.accumulate, ">= 1")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "0 <= decay < 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the model folder is measured on, after training."""

    name: str = ""
    """Short name of the model; empty = the run folder's name."""
    licence: str = ""
    """Licence of the weights, for the model card, e.g. apache-2.0; empty = the card says that none is granted."""
    data_licence: str = ""
    """Licence of the training images, for the model card; empty = the card says that it is not stated."""
    formats: tuple[Literal["single-file", "fp16", "onnx"], ...] = ("single-file",)
    """What to write beside diffusers' float32 folder; what the network does not permit is left out, and the card says
    why. Any of them can be had later: `codec-train export RUN/model`."""
    statistics_images: int = 400
    """Training images that latent statistics and entropy tables are measured on, whole (largest side 1024 pixels)."""

    def __post_init__(self) -> None:
        require(self.statistics_images >= 1, "export.statistics_images", self.statistics_images, ">= 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where, and how often."""

    out: str = ""
    """Run folder; new or empty, unless the run is resumed."""
    resume: str = ""
    """auto: go on from the newest sound checkpoint of `out`, if there is one; a path: from that checkpoint."""
    continue_from: str = ""
    """Compact state of a run (`codec-train compact`) that a new go continues: weights, averages, discriminator and
    position are its, the optimizers begin anew. Not looked at where `resume` finds a checkpoint. Empty = none."""
    state: str = ""
    """File of the compact state, written at the start and with every checkpoint, in place of the one before; at most
    64 MiB. Empty = none."""
    n_images: int = 1_000_000
    """Length of the run in images seen, over all ranks and all goes."""
    time_limit_min: float = 0.0
    """Ends the run (and its schedule) after so many minutes of training (validation, checkpoints and export not
    counted) if n_images is not reached; 0 = no limit."""
    seed: int = 0
    """Of weights, crops, order and posterior noise."""
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Autocast of the networks (weights, losses and averages stay float32; fp16 with loss scaling), or none."""
    compile: bool = False
    """torch.compile the networks: minutes at the start, faster steps."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, slower."""
    channels_last: bool = False
    """Keep the networks' activations channels last: faster for convolutions on most hardware."""
    max_nonfinite: int = 5
    """Steps in a row whose loss or gradient is not finite (each is skipped) before the run goes back to the last
    checkpoint; after three times without progress it stops."""
    log_every: int = 20
    """Steps between lines of log.jsonl."""
    validate_every: int = 50_000
    """Images between validations."""
    checkpoint_every: int = 100_000
    """Images between checkpoints; the end of the run always writes one."""
    checkpoint_every_min: float = 0.0
    """Minutes of the clock after a checkpoint until another one is written, whatever `checkpoint_every`; 0 = never."""
    keep_last: int = 2
    """Checkpoints kept besides the best (by the validation's loss)."""
    trackers: tuple[str, ...] = ()
    """Besides log.jsonl: "tensorboard", "wandb"; each needs its package."""

    def __post_init__(self) -> None:
        require(self.n_images >= 1, "run.n_images", self.n_images, ">= 1")
        require(0 <= self.seed < 2**32, "run.seed", self.seed, "0..2^32 - 1")
        for name in ("time_limit_min", "checkpoint_every_min"):
            require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), ">= 0")
        goes = self.continue_from != "" or self.state != ""
        why = "0 with run.continue_from or run.state: the schedule of all goes is that of run.n_images"
        require(not goes or self.time_limit_min == 0, "run.time_limit_min", self.time_limit_min, why)
        one = self.continue_from == "" or self.resume in ("", "auto")
        require(one, "run.resume", self.resume, "auto or empty with run.continue_from: only one of them can count")
        require(
            all(tracker in ("tensorboard", "wandb") for tracker in self.trackers),
            "run.trackers",
            self.trackers,
            "tensorboard, wandb",
        )
        for name in ("log_every", "validate_every", "checkpoint_every", "keep_last", "max_nonfinite"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), ">= 1")

    def refuse_goes(self, task: str) -> None:
        """Raise ValueError where a run of a task that is not trained in goes shall be."""
        for name in ("continue_from", "state"):
            require(getattr(self, name) == "", f"run.{name}", getattr(self, name), f"empty with task {task}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    task: Literal["autoencoder"] = "autoencoder"
    """What is trained; more follow."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    vq: VQConfig = field(default_factory=VQConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        consistency.check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)
