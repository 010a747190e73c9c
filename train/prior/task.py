"""The task of a prior: a class-conditional transformer learns the indices of images, one after the other.

    indices, label -> hidden labels, noise, what is left out (seed, position) -> PriorNetwork -> logits -> cross-entropy

Entry: `PriorTask`, for `train.trainer.Trainer`. The network knows nothing of images; the VQ model is not here, only its
codebook's vectors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train import draws
from train.prior.config import NetworkConfig
from train.prior.folder import write_folder
from train.prior.network import Grid, PriorNetwork
from train.prior.tokens import TokenData, TokenSet
from train.set_config import CardConfig
from train.task import Step, Terms, Values

LABEL, TOKEN, DROPOUT = 22, 24, 25  # streams of `train.draws`
_BATCH = 64  # of a measurement


class PriorTask:
    """Trains a prior; see `train.task.Task`.

    Batches are {"indices": (B, n) int64, "label": (B,) int64, "key", "bad"}, as `TokenFeed` gives them.
    """

    critic: nn.Module | None = None

    def __init__(self, config: NetworkConfig, data: TokenData, *, card: CardConfig, seed: int = 0) -> None:
        """Build the network.

        Args:
            config: its size and its training.
            data: what is learned from, for the frequencies that it starts with, and what is held out.
            card: for the model card.
            seed: of the weights.
        """
        self._config, self._data, self._card = config, data, card
        height, width = data.shape
        grid = Grid(
            codebook_size=data.codebook.size,
            channels=data.vectors.shape[1],
            height=height,
            width=width,
            n_classes=len(data.classes),
        )
        network = PriorNetwork(config, grid)
        frequencies = data.frequencies()
        network.initialise(data.vectors, frequencies, seed)
        self.module: nn.Module = network
        self._unigram_bits = -frequencies.log2()
        self._entropy = data.unigram_entropy()
        count = min(len(data.held_out), len(data.training))
        spread = np.unique(np.linspace(0, len(data.training) - 1, count).round().astype(int)).tolist()
        self._known = data.training.some(spread)  # to see how far training and held-out samples fall apart

    def to(self, device: torch.device) -> None:
        """See `train.task.Task.to`."""

    def compile(self) -> None:
        """See `train.task.Task.compile`."""
        self.module.compile()

    def describe(self) -> dict[str, str]:
        """See `train.task.Task.describe`."""
        config, data = self._config, self._data
        n_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        (height, width), codebook = data.shape, data.codebook
        return {
            "network": f"causal transformer, width {config.width}, depth {config.depth}, {height} x {width} indices of "
            f"{codebook.size}, {n_parameters / 1e6:.2f} M parameters, {len(data.classes)} classes",
            "loss": "cross-entropy of each index given those before it and the class (mean over B and indices, nats)"
            + (f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""),
            "held out": f"{len(data.held_out)} samples"
            + (f"; {data.n_dropped} training samples left out, whose images are among them" if data.n_dropped else ""),
            "unigram entropy": f"{self._entropy:.3f} bits an index in the training, {math.log2(codebook.size):.1f} if "
            "all were equally frequent",
        }

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """See `train.task.Task.parameter_groups`; weight decay is for matrices alone."""
        parameters = list(self.module.parameters())
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim == 1]
        return [{"params": matrices, "peak_lr": lr}, {"params": others, "peak_lr": lr, "weight_decay": 0.0}]

    def generator_step(self, module: nn.Module, batch: Mapping[str, Any], step: Step) -> Terms:
        """See `train.task.Task.generator_step`."""
        indices, labels = batch["indices"], batch["label"]
        hidden = draws.uniform(step.seed, LABEL, step.positions, ()) < self._config.label_dropout
        labels = labels.masked_fill(hidden.to(labels.device), len(self._data.classes))
        seen = self._noisy(indices, step)
        kept = self._kept(indices.shape[1], step, indices.device)
        with step.autocast():
            logits = module(seen, labels, kept)
        flat, targets = logits.float().flatten(0, 1), indices.flatten()
        loss = functional.cross_entropy(flat, targets, label_smoothing=self._config.label_smoothing)
        plain = functional.cross_entropy(flat.detach(), targets) if self._config.label_smoothing else loss.detach()
        return Terms(loss, {"loss": loss.detach(), "bits": plain / math.log(2)})

    def _noisy(self, indices: torch.Tensor, step: Step) -> torch.Tensor:
        """Return indices of which a share is random."""
        if not self._config.token_noise:
            return indices
        drawn = draws.uniform(step.seed, TOKEN, step.positions, (2, indices.shape[1])).to(indices.device)
        other = (drawn[:, 1] * self._data.codebook.size).long().clamp_max(self._data.codebook.size - 1)
        return torch.where(drawn[:, 0] < self._config.token_noise, other, indices)

    def _kept(self, n: int, step: Step, device: torch.device) -> torch.Tensor | None:
        """Return the factors of dropout, one draw per position, so that neither ranks nor batches change them."""
        config = self._config
        least = round(256 * config.dropout)  # in steps of 1 / 256: bytes are drawn ten times sooner than numbers
        if not least:
            return None
        shape = (2 * config.depth + 1, n, config.width)
        rows = [
            np.frombuffer(draws.rng(step.seed, DROPOUT, position).bytes(math.prod(shape)), np.uint8).reshape(shape)
            for position in step.positions
        ]
        kept = torch.from_numpy(np.stack(rows)).to(device) >= least
        return kept.float() * (256 / (256 - least))  # in bfloat16 the factor would be off by up to 0.4 %

    def critic_step(self, critic: nn.Module, batch: Mapping[str, Any], carry: Any, step: Step) -> Terms | None:
        """See `train.task.Task.critic_step`: there is no critic."""
        return None

    def after_step(self, values: Values, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """See `train.task.Task.after_step`."""
        return []

    def discard_step(self) -> None:
        """See `train.task.Task.discard_step`."""

    def after_validation(self, metrics: Mapping[str, float], step: Step) -> list[str]:
        """See `train.task.Task.after_validation`: the bits of an index, beside what they are to beat."""
        return [
            f"bits an index: held out {metrics['loss']:.3f} with the class, {metrics['bits_unlabelled']:.3f} without, "
            f"{metrics['unigram_bits']:.3f} by the training's frequencies (whose entropy is {self._entropy:.3f}); "
            f"training {metrics['train_bits']:.3f}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """See `train.task.Task.state_dict`: everything is in the module; what it was learned from is
        named, for a resume and an export."""
        data = self._data
        return {
            "codebook": data.codebook.codebook_id,
            "encoder": data.codebook.encoder_id,
            "classes": list(data.classes),
            "grid": list(data.shape),
            "training samples": data.training.digest(),
            "held-out samples": data.held_out.digest(),
            "labels of the training": data.training.label_digest(),
            "labels of the held-out samples": data.held_out.label_digest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `train.task.Task.load_state_dict`."""

    def evaluate(
        self, module: nn.Module, device: torch.device, rank: int, n_ranks: int
    ) -> tuple[list[dict[str, float]], np.ndarray | None]:
        """Measure this rank's held-out samples; see `train.task.Task.evaluate`.

        Rows, in bits an index, mean over those of a sample, nothing left out and no noise: "loss" with the class,
        "bits_unlabelled" without, "unigram_bits" by the training's smoothed frequencies, "gain_bits" of the first over
        the last; "train_bits" of a training sample; "unigram_entropy" of the training, the same in all rows.
        """
        held_out, hidden = self._data.held_out, len(self._data.classes)
        chosen = list(range(rank, len(held_out), n_ranks))
        known = [n % len(self._known) for n in chosen]
        mine, trained = held_out.some(chosen), self._known.some(known)
        columns = {
            "loss": bits_of(module, mine, mine.labels, device),
            "bits_unlabelled": bits_of(module, mine, torch.full_like(mine.labels, hidden), device),
            "train_bits": bits_of(module, trained, trained.labels, device),
            "unigram_bits": [float(self._unigram_bits[row[0].long()].mean()) for row in mine.indices],
        }
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row in rows:
            row |= {"gain_bits": row["unigram_bits"] - row["loss"], "unigram_entropy": self._entropy}
        return rows, None

    def export(self, module: nn.Module, out: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Write the prior's folder; see `train.prior.folder`."""
        assert isinstance(module, PriorNetwork)
        return write_folder(module, out, self._data, record, self._card)


@torch.inference_mode()
def bits_of(module: nn.Module, tokens: TokenSet, labels: torch.Tensor, device: torch.device) -> list[float]:
    """Return the bits an index of each sample, not mirrored, in float32: -log2 of its probability, over n.

    Args:
        module: a PriorNetwork on `device`.
        tokens: the samples.
        labels: (N,) classes that the network is told.
        device: where it is computed.
    """
    found: list[float] = []
    for start in range(0, len(tokens), _BATCH):
        indices = tokens.indices[start : start + _BATCH, 0].long().to(device)
        logits = module(indices, labels[start : start + _BATCH].to(device)).float()
        nats = functional.cross_entropy(logits.transpose(1, 2), indices, reduction="none").double().mean(1)
        found += (nats / math.log(2)).tolist()
    return found


def bits_of_sequences(network: PriorNetwork, indices: torch.Tensor, labels: Sequence[int]) -> torch.Tensor:
    """Return -log2 of the probability of whole grids, (B,) float64, of indices (B, n): the sum over their indices."""
    logits = network(indices, torch.tensor(labels, device=indices.device))
    nats = functional.cross_entropy(logits.double().transpose(1, 2), indices, reduction="none").sum(1)
    return nats / math.log(2)
