"""The task of a denoiser: a class-conditional diffusion transformer that learns rectified flow on normalized latents.

    latents, label -> t, noise, dropped labels (seed, position) -> z_t -> diffusers.DiTTransformer2DModel -> velocity

Entry: `DenoiserTask`, for `train.trainer.Trainer`. The network knows nothing of images; the autoencoder is not here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from codec.files import write_atomic
from codec.rectified_flow import Velocity, guided, mix, training_times
from eval.draws import generator
from train import draws
from train.checks import require
from train.config import OptimConfig, RunConfig
from train.denoiser_feed import LatentSet
from train.denoiser_flow import N_BINS, marginal_velocity, measured_times
from train.loss_config import AdversarialConfig
from train.task import Step, Terms, Values

TIME, NOISE, LABEL = 20, 21, 22  # streams of `train.draws`
HEAD = 32  # channels of an attention head
DENOISER_JSON = "denoiser.json"
CONVENTION = "z_t = (1 - t) z + t noise; the network gets timestep = 1000 t and predicts noise - z"
_TIMESTEPS = 1000  # what diffusers' sinusoidal embedding expects t = 1 to be
_BATCH = 64  # of a measurement


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """The network: a diffusers.DiTTransformer2DModel."""

    width: int = 192
    """Channels of a token; a multiple of 32, the channels of an attention head."""
    depth: int = 6
    """Transformer blocks."""
    patch: int = 1
    """Latents along the side of a token's square."""
    label_dropout: float = 0.1
    """Share of the training samples whose class is hidden, for classifier-free guidance."""

    def __post_init__(self) -> None:
        require(self.width >= HEAD and self.width % HEAD == 0, "width", self.width, f"multiples of {HEAD}")
        require(self.depth >= 1, "depth", self.depth, ">= 1")
        require(self.patch >= 1, "patch", self.patch, ">= 1")
        require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "0 <= share < 1")


@dataclass(frozen=True, kw_only=True)
class DenoiserRun:
    """The config of a denoiser's run; see `train.task.LoopConfig`."""

    denoiser: DenoiserConfig
    optim: OptimConfig
    run: RunConfig

    @property
    def adversarial(self) -> AdversarialConfig:
        """There is no critic."""
        return AdversarialConfig()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"task": "denoiser", **asdict(self)}


def build_network(
    config: DenoiserConfig, shape: tuple[int, int, int], n_classes: int, seed: int
) -> DiTTransformer2DModel:
    """Build a denoiser with random weights.

    Each tensor's weights depend on (seed, its name, its shape) alone: networks for other latents differ in nothing but
    the first and last projection.

    Args:
        config: its size.
        shape: (D, h, w) of the latents, h = w, a multiple of `config.patch`.
        n_classes: labels are 0 .. n_classes - 1; n_classes stands for a hidden one.
        seed: of the weights.
    """
    network = DiTTransformer2DModel(
        num_attention_heads=config.width // HEAD,
        attention_head_dim=HEAD,
        in_channels=shape[0],
        num_layers=config.depth,
        sample_size=shape[1],
        patch_size=config.patch,
        num_embeds_ada_norm=n_classes,
    )
    for name, parameter in network.named_parameters():
        _initialise(name, parameter.data, seed)
    return network


def _initialise(name: str, weight: torch.Tensor, seed: int) -> None:
    """Fill one tensor as Peebles & Xie 2022, arXiv:2212.09748, do: every block starts as the identity (adaLN-Zero)."""
    if weight.ndim == 1 or any(part in name for part in (".norm1.linear.", "proj_out_1.", "proj_out_2.")):
        weight.zero_()
        return
    rng = torch.Generator().manual_seed(int(generator(seed, name, "weights").integers(2**62)))
    if "embedder" in name:  # of time and class
        nn.init.normal_(weight, std=0.02, generator=rng)
    else:
        nn.init.xavier_uniform_(weight.flatten(1), generator=rng)


class DenoiserModule(nn.Module):
    """What the loop wraps: one forward is one call of the network."""

    def __init__(self, network: DiTTransformer2DModel) -> None:
        super().__init__()
        self.network = network.eval()

    def train(self, mode: bool = True) -> "DenoiserModule":
        """Stay in evaluation mode: diffusers' label embeddings hide labels by themselves, each block others."""
        return super().train(False)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the predicted velocity, (B, D, h, w) float32, of z_t (B, D, h, w), t (B,) in [0, 1], labels (B,)."""
        velocity: torch.Tensor = self.network(z_t, timestep=_TIMESTEPS * t, class_labels=labels).sample
        return velocity.float()


def velocity_of(network: nn.Module, labels: torch.Tensor, n_classes: int, guidance: float = 1.0) -> Velocity:
    """Return what `codec.rectified_flow.sample` follows.

    Args:
        network: a DenoiserModule.
        labels: (B,) classes of the samples.
        n_classes: stands for a hidden label.
        guidance: weight of classifier-free guidance; 1 = none.
    """
    hidden = torch.full_like(labels, n_classes)
    return guided(lambda z, t: network(z, t, labels), lambda z, t: network(z, t, hidden), guidance)


class DenoiserTask:
    """Trains a denoiser of latents; see `train.task.Task`.

    Batches are {"latents": (B, D, h, w) normalized, "label": (B,) int64, "key", "bad"}, as `LatentFeed` gives them.
    """

    critic: nn.Module | None = None

    def __init__(
        self,
        config: DenoiserConfig,
        classes: Sequence[str],
        held_out: LatentSet,
        moments: tuple[torch.Tensor, torch.Tensor],
        *,
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the network.

        Args:
            config: its size.
            classes: names of the labels 0, 1, ...
            held_out: what validation measures.
            moments: mean and deviation of each channel of the training latents, (D,) each.
            seed: of the weights and of the noise of measurements.
            about: what else denoiser.json shall say about the latents.
        """
        self._config, self._classes, self._about = config, list(classes), dict(about or {})
        self._held_out, self._moments, self._seed = held_out, moments, seed
        self.module: nn.Module = DenoiserModule(build_network(config, held_out.shape, len(classes), seed))

    def to(self, device: torch.device) -> None:
        """See `train.task.Task.to`."""

    def compile(self) -> None:
        """See `train.task.Task.compile`."""
        _network(self.module).compile()

    def describe(self) -> dict[str, str]:
        """See `train.task.Task.describe`."""
        network, (_, height, width) = _network(self.module), self._held_out.shape
        n_tokens = height * width // self._config.patch**2
        n_parameters = sum(parameter.numel() for parameter in network.parameters())
        return {
            "network": f"{type(network).__name__}, width {self._config.width}, depth {self._config.depth}, patch "
            f"{self._config.patch}, {n_tokens} tokens, {n_parameters / 1e6:.2f} M parameters, "
            f"{len(self._classes)} classes",
            "loss": "squared error of the velocity (mean over B, D, h, w), t logit-normal",
        }

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """See `train.task.Task.parameter_groups`."""
        return [{"params": list(self.module.parameters()), "peak_lr": lr}]

    def generator_step(self, module: nn.Module, batch: Mapping[str, Any], step: Step) -> Terms:
        """See `train.task.Task.generator_step`."""
        z, labels, at = batch["latents"], batch["label"], step.positions
        t = training_times(draws.normal(step.seed, TIME, at, ())).to(z.device)
        noise = draws.normal(step.seed, NOISE, at, tuple(z.shape[1:])).to(z.device)
        hidden = (draws.uniform(step.seed, LABEL, at, ()) < self._config.label_dropout).to(z.device)
        z_t, velocity = mix(z, noise, t)
        with step.autocast():
            predicted = module(z_t, t, labels.masked_fill(hidden, len(self._classes)))
        loss = (predicted.float() - velocity).square().mean()
        return Terms(loss, {"loss": loss.detach()})

    def critic_step(self, critic: nn.Module, batch: Mapping[str, Any], carry: Any, step: Step) -> Terms | None:
        """See `train.task.Task.critic_step`: there is no critic."""
        return None

    def after_step(self, values: Values, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """See `train.task.Task.after_step`."""
        return []

    def discard_step(self) -> None:
        """See `train.task.Task.discard_step`."""

    def after_validation(self, metrics: Mapping[str, float], step: Step) -> list[str]:
        """See `train.task.Task.after_validation`."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """See `train.task.Task.state_dict`: everything is in the module."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `train.task.Task.load_state_dict`."""

    def evaluate(
        self, module: nn.Module, device: torch.device, rank: int, n_ranks: int
    ) -> tuple[list[dict[str, float]], np.ndarray | None]:
        """Measure this rank's held-out latents; see `train.task.Task.evaluate` and `measure`."""
        indices = range(rank, len(self._held_out), n_ranks)
        return measure(module, self._held_out, indices, self._moments, self._seed, device), None

    def export(self, module: nn.Module, out: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Write the network as a diffusers folder, with denoiser.json: classes, convention, whose latents."""
        network = _network(module)
        network.save_pretrained(out)
        about = {"classes": self._classes, "convention": CONVENTION, **self._about, "record": dict(record)}
        write_atomic(out / DENOISER_JSON, (json.dumps(about, indent=2) + "\n").encode())
        return {"n_parameters": sum(parameter.numel() for parameter in network.parameters())}


def _network(module: nn.Module) -> DiTTransformer2DModel:
    assert isinstance(module, DenoiserModule)
    return module.network


@torch.inference_mode()
def measure(
    module: nn.Module,
    latents: LatentSet,
    indices: Sequence[int],
    moments: tuple[torch.Tensor, torch.Tensor],
    seed: int,
    device: torch.device,
) -> list[dict[str, float]]:
    """Measure a denoiser on held-out latents, each at one time of every bin of t, with noise of its own.

    Args:
        module: a DenoiserModule, on `device`.
        latents: held out.
        indices: which of them.
        moments: mean and deviation of each channel of the training latents, (D,) each.
        seed: with the image's key it decides times and noise.
        device: where it is computed, in float32.

    Returns:
        A row per latent: "loss" and "marginal" (squared error of the velocity, mean over D, h, w and bins; of the
        network and of `marginal_velocity`), and "loss_0" ..., "marginal_0" ... of each bin.
    """
    mean, std = (values.to(device) for values in moments)
    rows = []
    per_batch = max(1, _BATCH // N_BINS)
    for start in range(0, len(indices), per_batch):
        chosen = list(indices[start : start + per_batch])
        parts = [_at_all_times(latents, index, seed) for index in chosen]
        z, noise, t = (torch.cat(part).to(device) for part in zip(*parts, strict=True))  # (n * N_BINS, ...)
        labels = latents.labels[chosen].repeat_interleave(N_BINS).to(device)
        z_t, velocity = mix(z, noise, t)
        of_network = (module(z_t, t, labels) - velocity).square().mean((1, 2, 3))
        of_marginal = (marginal_velocity(z_t, t, mean, std) - velocity).square().mean((1, 2, 3))
        both = torch.stack([of_network, of_marginal]).reshape(2, len(chosen), N_BINS).double().cpu().numpy()
        for ours, marginal in zip(*both, strict=True):
            row = {"loss": float(ours.mean()), "marginal": float(marginal.mean())}
            row |= {f"loss_{n}": float(value) for n, value in enumerate(ours)}
            rows.append(row | {f"marginal_{n}": float(value) for n, value in enumerate(marginal)})
    return rows


def _at_all_times(latents: LatentSet, index: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one latent N_BINS times, (N_BINS, D, h, w), as much noise, and the times, (N_BINS,)."""
    rng = generator(seed, latents.keys[index], "flow")
    t = measured_times(torch.from_numpy(rng.random(N_BINS, dtype=np.float32)))
    noise = torch.from_numpy(rng.standard_normal((N_BINS, *latents.shape), dtype=np.float32))
    return latents.one(index, seed).expand(N_BINS, *latents.shape), noise, t
