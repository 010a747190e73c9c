"""What a recipe with `task = "head"` can set; `train.recipe` reads it. Must not import torch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from codec.head.config import NetworkConfig
from train.checks import require
from train.config import OptimConfig, RunConfig
from train.loss_config import AdversarialConfig
from train.schedules import check_moment
from train.set_config import CardConfig, SetDataConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """error + w * beta * KL / (D h w), mean over B, in nats per number of a latent; w as the schedule says.

    error: -log p(z|u, c) of a Gaussian decoder, so that beta = 1 is the ELBO; of a flow-matching one the squared error
    of the velocity, which the ELBO weighs by (1 - t) / t: with the times that are drawn, beta = 1.6 balances the two at
    t = 1/2.
    """

    kind: Literal["beta", "tcvae", "factor"] = "beta"
    """beta: as above; tcvae: the KL in three parts, of which the total correlation of the first level's units has a
    weight of its own (Chen et al. 2018); factor: that correlation, as a critic sees it, is added (Kim & Mnih 2018)."""
    beta: float = 0.3
    """Weight of the KL."""
    total_correlation: float = 6.0
    """Weight of the total correlation, in units of beta (tcvae, factor)."""
    free_bits: float = 0.0
    """KL in nats that each unit has for free (of a second level: each channel; with iaf, vamp and flow: all units
    together); Kingma et al. 2016. The mean over one batch of one rank decides."""
    schedule: Literal["constant", "linear", "sigmoid", "exponential", "cyclical"] = "linear"
    """How w comes to 1; cyclical: Fu et al. 2019."""
    ramp: str = "20%"
    """How long linear, sigmoid and exponential take: images, or a share of the run."""
    cycles: int = 4
    """Cycles in the run (cyclical)."""
    cycle_ramp: float = 0.5
    """The part of a cycle that grows (cyclical), 0..1."""
    condition_dropout: float = 0.1
    """Share of the training samples whose condition is hidden from all parts, for guidance and samples without one."""
    independence: float = 0.0
    """Weight, in units of beta, of what the first level's units say about the class, in nats, as a critic reads it that
    the loop trains beside the head (as Lample et al. 2017 do for attributes): what the condition says is left to it."""
    critic_width: int = 256
    """Width of the critic's layers (factor: six; independence: three)."""
    critic_lr: float = 1e-4
    """Peak learning rate of the critic (factor, independence)."""
    active_nats: float = 0.01
    """KL in nats, mean over the held-out images, below which a unit counts as collapsed."""

    def __post_init__(self) -> None:
        for name in ("beta", "total_correlation", "free_bits", "active_nats", "independence"):
            require(getattr(self, name) >= 0, f"objective.{name}", getattr(self, name), ">= 0")
        check_moment("objective.ramp", self.ramp)
        require(self.cycles >= 1, "objective.cycles", self.cycles, ">= 1")
        require(0 < self.cycle_ramp <= 1, "objective.cycle_ramp", self.cycle_ramp, "0 < part <= 1")
        dropout = self.condition_dropout
        require(0 <= dropout < 1, "objective.condition_dropout", dropout, "0 <= share < 1")
        require(self.critic_width >= 1, "objective.critic_width", self.critic_width, ">= 1")
        require(self.critic_lr > 0, "objective.critic_lr", self.critic_lr, "> 0")


@dataclass(frozen=True, kw_only=True)
class LatentDataConfig(SetDataConfig):
    """What is trained on: latents."""

    n_validation: int = 200
    """Images of `cache` that are held out without `validation_cache`, chosen by a hash of their bytes."""
    condition: Literal["class", "embedding", "none"] = "class"
    """What a sample's condition is: its class in the cache, a vector of `embeddings`, or nothing."""
    embeddings: str = ""
    """NumPy .npz file with `keys`, (N,) names of images as the cache has them, and `vectors`, (N, E) (embedding)."""
    codec: str = ""
    """Model folder of the autoencoder: for a picture and PSNR in pixels at each validation; empty = none."""

    least_validation = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        given, wanted = self.embeddings != "", self.condition == "embedding"
        allowed = "a file with data.condition embedding" if wanted else f"empty with data.condition {self.condition}"
        require(given == wanted, "data.embeddings", self.embeddings, allowed)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A whole recipe of a head."""

    task: Literal["head"] = "head"
    """What is trained."""
    head: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export: CardConfig = field(default_factory=CardConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.run.refuse_goes(self.task)
        objective = self.objective
        if objective.kind == "tcvae":
            allowed = "gaussian with prior conditional or standard, for the parts of objective.kind tcvae"
            what = f"{self.head.posterior} with prior {self.head.prior}"
            require(self.head.has_plain_units, "head.posterior", what, allowed)
            require(objective.free_bits == 0, "objective.free_bits", objective.free_bits, "0 with objective.kind tcvae")
        if objective.independence:
            fits = objective.kind != "factor" and self.data.condition == "class"
            allowed = f"0 with objective.kind {objective.kind} and data.condition {self.data.condition}"
            require(fits, "objective.independence", objective.independence, allowed)
        if objective.kind != "beta":
            require(self.optim.batch_size >= 4, "optim.batch_size", self.optim.batch_size, ">= 4 of this objective")

    @property
    def adversarial(self) -> AdversarialConfig:
        """How the critic of `objective.kind` factor learns; not looked at without one."""
        return AdversarialConfig(lr=self.objective.critic_lr, betas=(0.5, 0.9))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)
