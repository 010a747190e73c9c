"""What a recipe with `task = "prior"` can set; `train.recipe` reads it. Must not import torch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from train.checks import require
from train.config import OptimConfig, RunConfig
from train.loss_config import AdversarialConfig
from train.set_config import CardConfig, SetDataConfig

HEAD = 32
"""Channels of an attention head."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network: a transformer that predicts each index from those before it, in raster order, and the class."""

    width: int = 192
    """Channels of a token; a multiple of 32, the channels of an attention head."""
    depth: int = 6
    """Transformer blocks."""
    dropout: float = 0.1
    """Share of what each half of a block adds that is left out in training, and of the embeddings."""
    label_dropout: float = 0.1
    """Share of the training samples whose class is hidden, for classifier-free guidance and an unconditional prior."""
    token_noise: float = 0.0
    """Share of the indices that the network sees in training, never of those that it predicts, that are replaced by
    random ones."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all indices in training."""

    def __post_init__(self) -> None:
        require(self.width >= HEAD and self.width % HEAD == 0, "prior.width", self.width, f"multiples of {HEAD}")
        require(self.depth >= 1, "prior.depth", self.depth, ">= 1")
        for name in ("dropout", "label_dropout", "token_noise", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, f"prior.{name}", getattr(self, name), "0 <= share < 1")
        require(self.dropout <= 0.99, "prior.dropout", self.dropout, "<= 0.99")


@dataclass(frozen=True, kw_only=True)
class TokenDataConfig(SetDataConfig):
    """What is trained on: indices."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """A whole recipe of a prior."""

    task: Literal["prior"] = "prior"
    """What is trained."""
    prior: NetworkConfig = field(default_factory=NetworkConfig)
    data: TokenDataConfig = field(default_factory=TokenDataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export: CardConfig = field(default_factory=CardConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.run.refuse_goes(self.task)

    @property
    def adversarial(self) -> AdversarialConfig:
        """There is no critic."""
        return AdversarialConfig()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)
