"""What a recipe can set about losses, the discriminator, the latents and the rate. Must not import torch."""

from dataclasses import dataclass
from typing import Literal

from train.checks import require
from train.schedules import check_moment


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """reconstruction = pixel_weight * pixel + perceptual_weight * perceptual + ms_ssim_weight * (1 - MS-SSIM).

    Each term is a mean over B (and over C, H, W where it is a map), so weights do not depend on the size of the crop.
    """

    pixel: Literal["l1", "l2", "huber", "bce"] = "l1"
    """Mean over B, C, H, W; pixels in [-1, 1]. l2: squared error; huber: see huber_delta; bce: binary cross-entropy of
    the pixels in [0, 1], in nats."""
    pixel_weight: float = 1.0
    """Weight of the pixel term."""
    huber_delta: float = 0.1
    """Where Huber's loss turns from squared to absolute, in units of [-1, 1]."""
    learned_scale: bool = False
    """Learn one log-scale s: reconstruction * exp(-s) + s (the negative log-likelihood of LDM, with s optimised)."""
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

    def __post_init__(self) -> None:
        for name in ("pixel_weight", "perceptual_weight", "ms_ssim_weight", "fallback_ms_ssim_weight"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), ">= 0")
        require(self.huber_delta > 0, "loss.huber_delta", self.huber_delta, "> 0")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """KL(q(z|x) || N(0, I)) of the families that have a variance."""

    weight: float = 1e-3
    """Final weight of the KL in nats, reduced as `reduction` says, mean over B; 0 = none."""
    reduction: Literal["pixel", "image", "element"] = "pixel"
    """pixel: sum over D, h, w, divided by H * W; image: that sum; element: its mean over D, h, w."""
    schedule: Literal["constant", "linear", "sigmoid", "exponential", "cyclical", "capacity"] = "constant"
    """How the weight comes to its final value. cyclical: Fu et al. 2019; capacity: a constant weight multiplies
    |KL - C|, C growing linearly to `capacity` (Burgess et al. 2018)."""
    ramp: str = "20%"
    """How long linear, sigmoid, exponential and capacity take: images, or a share of the run."""
    cycles: int = 4
    """Cycles in the run (cyclical)."""
    cycle_ramp: float = 0.5
    """The part of a cycle that grows (cyclical), 0..1."""
    capacity: float = 0.0
    """C at the end of the ramp, nats per image pixel (capacity)."""
    free_bits: float = 0.0
    """KL in nats per latent position that each channel has for free (Kingma et al. 2016). It and capacity act on
    the mean over one batch of one rank: with them, accumulating is not quite one larger batch."""

    def __post_init__(self) -> None:
        for name in ("weight", "capacity", "free_bits"):
            require(getattr(self, name) >= 0, f"kl.{name}", getattr(self, name), ">= 0")
        check_moment("kl.ramp", self.ramp)
        require(self.cycles >= 1, "kl.cycles", self.cycles, ">= 1")
        require(0 < self.cycle_ramp <= 1, "kl.cycle_ramp", self.cycle_ramp, "0 < part <= 1")
        require(
            self.schedule != "capacity" or self.capacity > 0, "kl.capacity", self.capacity, "> 0 with schedule capacity"
        )


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The patch discriminator, in three phases: reconstruction alone, its warm-up, and its weight ramped in."""

    weight: float = 0.0
    """Weight of the generator's adversarial loss at the end of the ramp; 0 = no discriminator."""
    loss: Literal["hinge", "non-saturating", "vanilla"] = "hinge"
    """Discriminator: hinge, or softplus (the other two). Generator: -mean D(x_hat) (hinge, vanilla), or softplus."""
    adaptive: bool = True
    """Multiply the weight by |d reconstruction / dW| / |d adversarial / dW|, W the last weight (Esser 2021)."""
    adaptive_cap: float = 10.0
    """Largest value of that ratio."""
    start: str = "20%"
    """Where the warm-up starts: images, a share of the run, or "auto": when the validation curve flattens."""
    warmup: str = "5%"
    """How long the discriminator then trains on detached reconstructions: images, or a share of the run."""
    ramp: str = "5%"
    """How long the weight then takes to grow linearly from 0: images, or a share of the run."""
    auto_tolerance: float = 0.01
    """start = "auto": the least relative gain of the validation's loss over one validation that counts as progress."""
    auto_patience: int = 2
    """start = "auto": validations without progress before the warm-up starts."""
    channels: int = 64
    """Width of the discriminator's first layer; doubles per layer, up to 8 times."""
    layers: int = 3
    """Stride-2 layers: 3 sees patches of 70 pixels."""
    norm: Literal["group", "spectral", "none"] = "group"
    """Normalisation. No BatchNorm: it mixes the images of a batch and differs between ranks."""
    lr: float = 0.0
    """Peak learning rate of the discriminator, scheduled as the generator's; 0 = optim.lr."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay of the first and second moment of its AdamW."""
    r1_weight: float = 0.0
    """Weight of R1: squared gradient norm of D at real images, sum over C, H, W, mean over B; 0 = none."""
    r1_every: int = 1
    """Steps between R1 penalties, each multiplied by this many (lazy regularisation)."""
    lecam_weight: float = 0.0
    """Weight of LeCAM (Tseng et al. 2021, arXiv:2104.03310); 0 = none."""
    lecam_decay: float = 0.999
    """Decay per step of LeCAM's anchors."""
    round_fakes: bool = True
    """Show the discriminator reconstructions rounded to 8 bits: photographs are, and it must not go by that."""
    export: bool = True
    """Write it beside the exported model, for later fine-tuning."""

    def __post_init__(self) -> None:
        for name in ("weight", "lr", "r1_weight", "lecam_weight"):
            require(getattr(self, name) >= 0, f"adversarial.{name}", getattr(self, name), ">= 0")
        require(self.adaptive_cap > 0, "adversarial.adaptive_cap", self.adaptive_cap, "> 0")
        if self.start != "auto":
            check_moment("adversarial.start", self.start, 'or "auto"')
        check_moment("adversarial.warmup", self.warmup)
        check_moment("adversarial.ramp", self.ramp)
        require(self.auto_tolerance >= 0, "adversarial.auto_tolerance", self.auto_tolerance, ">= 0")
        for name in ("auto_patience", "layers", "r1_every"):
            require(getattr(self, name) >= 1, f"adversarial.{name}", getattr(self, name), ">= 1")
        require(self.channels >= 8 and self.channels % 8 == 0, "adversarial.channels", self.channels, "multiples of 8")
        require(all(0 <= beta < 1 for beta in self.betas), "adversarial.betas", self.betas, "0 <= beta < 1 each")
        require(0 <= self.lecam_decay < 1, "adversarial.lecam_decay", self.lecam_decay, "0 <= decay < 1")


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """What makes the latents serve those who use them; each part is off at 0."""

    equivariance: float = 0.0
    """Share of batches decoded from turned and shrunken latents, against the image treated alike (EQ-VAE)."""
    noise: float = 0.0
    """Largest deviation of the noise on normalized latents before the decoder, uniform per image."""
    anchor_weight: float = 0.0
    """Weight of the squared error of the latents against a frozen autoencoder's, both normalized as that one's are
    (mean over B, D, h, w): holds a full fine-tune to latents that others use."""
    anchor: str = ""
    """Folder or name of that autoencoder; empty = model.init_from."""
    anchor_deviation: bool = False
    """Hold on to the posterior's deviation too: its squared error, in the same units, is added (kl)."""
    alignment_weight: float = 0.0
    """Weight of the alignment to a vision network's features (VA-VAE)."""
    alignment: str = ""
    """Local folder of that network (transformers' AutoModel)."""
    alignment_margins: tuple[float, float] = (0.25, 0.5)
    """Margins of the distance and of the cosine part."""

    def __post_init__(self) -> None:
        require(0 <= self.equivariance <= 1, "latents.equivariance", self.equivariance, "0..1")
        for name in ("noise", "anchor_weight", "alignment_weight"):
            require(getattr(self, name) >= 0, f"latents.{name}", getattr(self, name), ">= 0")
        require(
            self.alignment_weight == 0 or self.alignment != "",
            "latents.alignment",
            self.alignment,
            "a folder, with alignment_weight > 0",
        )
        require(
            all(0 <= margin < 1 for margin in self.alignment_margins),
            "latents.alignment_margins",
            self.alignment_margins,
            "0 <= margin < 1 each",
        )


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """Rate-aware training: the quantiser's errors in place of the posterior's noise, and a price on the bits."""

    probability: float = 0.0
    """Share of images coded this way; the others draw from the posterior. 0 = none."""
    decoded: Literal["noisy", "rounded"] = "noisy"
    """What is decoded of these images: latents with uniform noise of one step, or rounded as the codec does it, with
    the gradient of no rounding. Bits are always counted of noisy ones."""
    weight: float = 0.1
    """Price of one bit per pixel at q = 0."""
    exponent: float = 1.0
    """The price at quality q is weight * 2^(-exponent * q / 16): 1 if errors grow as the step, 2 if as its square."""
    components: int = 4
    """Logistic components per channel of the latents' density."""
    lr_ratio: float = 10.0
    """Learning rate of steps and densities in units of optim.lr."""

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "rate.probability", self.probability, "0..1")
        for name in ("weight", "exponent"):
            require(getattr(self, name) >= 0, f"rate.{name}", getattr(self, name), ">= 0")
        require(self.components >= 1, "rate.components", self.components, ">= 1")
        require(self.lr_ratio > 0, "rate.lr_ratio", self.lr_ratio, "> 0")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """The monitor that reads the run and says in one line what is wrong."""

    act: bool = True
    """Also act on a diagnosis (the line says how); false = only report."""
    window: int = 500
    """Steps over which a symptom must last."""
    logit_gap: float = 0.01
    """Discriminator collapsed: mean logits of real and fake closer than this, with its weight on."""
    active_nats: float = 0.01
    """A channel is active when its KL is above this, nats per latent position."""
    min_active: float = 0.5
    """Posterior collapse: a smaller share of active channels than this."""
    min_usage: float = 0.2
    """Low codebook usage: a smaller share of the vectors is chosen on held-out images than this (vq)."""

    def __post_init__(self) -> None:
        require(self.window >= 1, "health.window", self.window, ">= 1")
        for name in ("logit_gap", "active_nats"):
            require(getattr(self, name) >= 0, f"health.{name}", getattr(self, name), ">= 0")
        for name in ("min_active", "min_usage"):
            require(0 <= getattr(self, name) <= 1, f"health.{name}", getattr(self, name), "0..1")
