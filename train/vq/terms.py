"""A quantiser inside the autoencoder task: its losses, what it learns once per step, and what is said of its use.

network + recipe -> build_quantiser -> Quantiser, a part of `train.module.AutoencoderModule`
batches of a step -> CodebookTerms.terms -> after_step (sums over ranks, revival) | discard

A network of two levels has one of each for each level (`level`: the number of its map); what is logged and said of the
coarse one begins with its prefix.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from codec.adapters import CodebookModel
from codec.errors import UsageError
from train.loss_config import HealthConfig
from train.task import Step, Values
from train.vq.config import VQConfig
from train.vq.lattice import FSQ, LFQ, corners
from train.vq.learned import EMACodebook, LearnedCodebook, SimVQCodebook
from train.vq.quantiser import Codes, Quantiser
from train.vq.tokens import Reduce, StepTokens
from train.vq.usage import ENOUGH_TOKENS

_UNIT = 1e-4  # by which a vector's length may differ from 1
_PLAIN: dict[str, Any] = {
    "kind": "gradient",
    "cosine": False,
    "rotation_trick": False,
    "codebook_dim": 0,
    "fsq_levels": (),
}


def build_quantiser(
    config: VQConfig, model: CodebookModel, *, trained: bool, trains: bool, level: int = 0
) -> Quantiser:
    """Return the quantiser of a network, and set which of the network's own vectors an optimizer moves.

    Args:
        config: the recipe's.
        model: the network; of one from somebody's folder its K, d and lattice count, not the recipe's.
        trained: whether the network's vectors are a codebook already.
        trains: whether the quantiser learns; false where the decoder is trained alone.
        level: which of the network's maps it is for.

    Raises:
        UsageError: a network of one vector, or whose vectors are not those of the recipe's kind.
    """
    weight = model.codebooks[level]
    size, dim = weight.shape
    if size < 2:
        raise UsageError("model.init_from: a codebook of one vector: there is nothing to learn")
    kind = "fsq" if model.fsq_levels else config.kind
    if not trains and kind != "fsq":  # whatever the vectors were trained as, the nearest one counts
        return LearnedCodebook(replace(config, **_PLAIN), size, dim, trains=False, trained=trained)
    if trained and trains:
        _check_vectors(config, weight.detach(), model.fsq_levels)
    weight.requires_grad_(kind == "gradient" and trains)
    how = {"trains": trains, "trained": trained}
    if kind == "fsq":
        return FSQ(config, model.fsq_levels, size, trains=trains)
    if kind == "lfq":
        return LFQ(config, size, trains=trains)
    if kind == "simvq":
        return SimVQCodebook(config, size, dim, weight, **how)
    if kind == "ema":
        return EMACodebook(config, size, dim, weight, **how)
    return LearnedCodebook(config, size, dim, **how)


def _check_vectors(config: VQConfig, weight: torch.Tensor, fsq_levels: tuple[int, ...]) -> None:
    """Raise UsageError where a folder's vectors cannot go on as the recipe's kind."""
    kind = config.kind
    if fsq_levels:
        good, what = kind == "fsq" and config.fsq_levels in ((), fsq_levels), f"fsq, {list(fsq_levels)}"
    elif kind == "lfq":
        given = corners(weight.shape[1]) if len(weight) == 1 << weight.shape[1] else weight[:0]
        good, what = torch.equal(weight.cpu(), given), "another kind: its vectors are not the corners of a cube"
    elif kind == "fsq":
        good, what = False, "another kind: its config.json has no fsq_levels"
    else:
        unit = bool(((weight.norm(dim=1) - 1).abs() < _UNIT).all())
        good, what = unit or not config.cosine, "vq.cosine false: its vectors have other lengths than 1"
    if not good:
        raise UsageError(f"vq.kind = {kind}: the codebook of model.init_from is of {what}")


class CodebookTerms:
    """What the task does with a quantiser.

    Attributes:
        quantiser: the one that is trained.
        name: "codebook"; of a coarse level "coarse codebook".
    """

    def __init__(self, quantiser: Quantiser, model: CodebookModel, health: HealthConfig, level: int = 0) -> None:
        """Join the parts; `model`: of the network that holds the vectors, as those of its map `level`."""
        self.quantiser = quantiser
        self._model, self._level = model, level
        self._prefix = model.prefixes[level]
        self._words = self._prefix.replace("_", " ")
        self.name = f"{self._words}codebook"
        self._health = health
        self._tokens = StepTokens()

    def describe(self) -> str:
        """Return one line on the codebook."""
        quantiser, config = self.quantiser, self.quantiser.config
        kind = {FSQ: "fsq", LFQ: "lfq"}.get(type(quantiser), config.kind)
        text = f"{kind}, K {quantiser.size}, d {quantiser.dim}"
        if isinstance(quantiser, FSQ):
            text += f", levels {' x '.join(map(str, quantiser.levels))}"
        if isinstance(quantiser, LearnedCodebook):
            text += ", cosine" * config.cosine + ", rotation trick" * config.rotation_trick
            if not bool(quantiser.started):
                text += f", from {config.start} of the run on" if config.start.endswith("%") else ""
        return text + ("" if quantiser.trains else "; stays as it is")

    def loss(self) -> list[str]:
        """Return the terms with their weights."""
        config, quantiser = self.quantiser.config, self.quantiser
        if not quantiser.trains:
            return []
        scale = self._words + ("" if config.weight == 1 else f"{config.weight:g} ")
        if isinstance(quantiser, LFQ):
            return [f"{scale}({config.beta:g} commitment + {config.entropy_weight:g} entropy)"]
        if isinstance(quantiser, FSQ):
            return [f"{scale}({config.beta:g} commitment + {config.spread_weight:g} spread)"]
        learned = "" if isinstance(quantiser, EMACodebook) else "codebook + "
        return [f"{scale}({learned}{config.beta:g} commitment)"]

    def terms(self, codes: Codes, step: Step, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weighted terms of one batch, and take note of its latents; `values` takes what is to be logged."""
        self._tokens.add(codes.z, codes.indices, step.positions, codes.frequencies)
        error = (codes.z - codes.z_q.detach()).square().mean()
        spread = (codes.z - codes.z.mean((0, 2, 3), keepdim=True)).square().mean()
        values[f"{self._prefix}codebook_error"] = error / spread.clamp(min=1e-12)  # 0: exact; 1: as one vector for all
        return {f"{self._prefix}{name}": term for name, term in codes.terms.items()}

    def after_step(self, values: Values, step: Step, reduce: Reduce) -> list[str]:
        """Learn from the step, see `Quantiser.update`."""
        own: Values = {}
        lines = self.quantiser.update(self._weight, self._tokens, step, reduce, own)
        values.update({f"{self._prefix}{name}": value for name, value in own.items()})
        self._tokens.clear()
        return [f"{self._words}{line}" for line in lines]

    def discard(self) -> None:
        """Forget the step: it is left out."""
        self._tokens.clear()

    def after_validation(self, metrics: Mapping[str, float]) -> list[str]:
        """Return lines on a codebook that is hardly used, or of which too little was seen to tell."""
        own = {
            name.removeprefix(self._prefix): value for name, value in metrics.items() if name.startswith(self._prefix)
        }
        per_code, size = own.get("tokens_per_code", 0.0), self.quantiser.size
        if not per_code:
            return []
        if "usage" not in own:
            return [
                f"{self.name}: usage n/a, on {per_code:.3g} held-out tokens per vector at least "
                f"{own['usage_at_least']:.1%}; {ENOUGH_TOKENS} are needed: raise data.n_validation"
            ]
        usage, least = own["usage"], self._health.min_usage
        if usage >= least:
            return []
        return [
            f"low {self.name} usage: {usage:.1%} of {size} vectors, perplexity {own['perplexity']:.4g}, on "
            f"{per_code:.3g} held-out tokens per vector; below health.min_usage = {least:g}; nothing is done about it: "
            "see docs/vq.md"
        ]

    @property
    def _weight(self) -> torch.nn.Parameter:
        weight = self._model.codebooks[self._level]
        assert isinstance(weight, torch.nn.Parameter)
        return weight
