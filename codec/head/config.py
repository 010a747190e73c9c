"""What a head's network is: its sizes, and the latents and conditions that it is for. Must not import torch."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

WIDTH_UNIT = 16
"""Channels of a group that is normalised together."""
_COARSEST = 4  # latents along the longer side of the coarsest grid, at most
_LARGE = 16  # from this shorter side on the second level lies two halvings below the latents, else one


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network; see `codec.head.network`."""

    units: int = 64
    """U, numbers that describe an image as a whole, beside the condition."""
    levels: Literal[1, 2] = 1
    """2: below these units a grid of further ones, which say what is where."""
    spatial_units: int = 4
    """Units at each position of that grid (levels = 2)."""
    width: int = 96
    """Channels at the finest grid, a multiple of 16; coarser grids have twice as many."""
    depth: int = 2
    """Residual blocks at each grid."""
    posterior: Literal["gaussian", "iaf"] = "gaussian"
    """q(u|z, c) of the first level. iaf: an inverse autoregressive flow after the Gaussian."""
    prior: Literal["conditional", "standard", "vamp", "conditional-vamp", "flow"] = "conditional"
    """p(u|c) of the first level. conditional: a Gaussian that c decides; standard: N(0, I); vamp: the mean of the
    posteriors of learned latents, whatever c, or (conditional-vamp) under c; flow: a coupling flow that c decides."""
    components: int = 32
    """Learned latents of a vamp prior. Under c every sample of a batch encodes all of them: slow."""
    flow_steps: int = 4
    """Steps of each flow (iaf, flow)."""
    flow_width: int = 128
    """Width of their hidden layers."""
    decoder: Literal["flow-matching", "gaussian"] = "flow-matching"
    """p(z|u, c). flow-matching: drawn from noise by a velocity that u and c decide, sharp; gaussian: a mean, and one
    variance for each channel: one pass, and smooth."""

    def __post_init__(self) -> None:
        for name in ("units", "spatial_units", "depth", "components", "flow_steps", "flow_width"):
            _require(getattr(self, name) >= 1, f"head.{name}", getattr(self, name), ">= 1")
        at_least = self.width >= WIDTH_UNIT and self.width % WIDTH_UNIT == 0
        _require(at_least, "head.width", self.width, f"multiples of {WIDTH_UNIT}")
        _require(self.units >= 2 or self.prior != "flow", "head.units", self.units, ">= 2 with prior flow")

    @property
    def has_plain_units(self) -> bool:
        """Whether q(u|z, c) and p(u|c) of the first level are Gaussians, so that each unit has a KL of its own."""
        return self.posterior == "gaussian" and self.prior in ("conditional", "standard")


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a head is for.

    Attributes:
        channels: D of the latents.
        height: h.
        width: w.
        n_classes: labels are 0 .. n_classes - 1; 0 = none, with embeddings and without a condition.
        embedding_width: numbers of an embedding that is the condition; 0 = the condition is a class, or none.
    """

    channels: int
    height: int
    width: int
    n_classes: int = 0
    embedding_width: int = 0

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        both = self.n_classes > 0 and self.embedding_width > 0
        _require(not both, "embedding_width", self.embedding_width, "0 with classes")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, h, w)."""
        return self.channels, self.height, self.width

    @property
    def n(self) -> int:
        """Numbers of an image's latents."""
        return self.channels * self.height * self.width

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Sizes (rows, columns) of the networks' grids: that of the latents, then each half the one before."""
        found = [(self.height, self.width)]
        while max(found[-1]) > _COARSEST:
            found.append((-(-found[-1][0] // 2), -(-found[-1][1] // 2)))
        return found

    @property
    def second(self) -> int:
        """Number of the grid in `grids` that the units of a second level lie on."""
        return min(2 if min(self.height, self.width) >= _LARGE else 1, len(self.grids) - 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)
