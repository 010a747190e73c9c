"""One autoencoder in a race: its latents, a denoiser trained on them, what that predicts, and what it draws.

    pictures -> encode, image and mirror -> LatentSet (normalized) -> DenoiserTask in the Trainer -> RUN/model
             -> loss on held-out latents by time
    noise, classes -> sample -> decode -> pixels

Every step is shared over ranks. What is random depends on the seed and on names alone: all entrants get the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiTTransformer2DModel

from codec.engine import Engine
from codec.errors import ModelError, NonFiniteError
from codec.pixels import to_float
from codec.rectified_flow import sample
from eval.autoencoder import Autoencoder
from eval.draws import generator
from train.checkpoint import Checkpoints
from train.checks import require
from train.config import OptimConfig, RunConfig
from train.denoiser import HEAD, DenoiserConfig, DenoiserModule, DenoiserRun, DenoiserTask, measure, velocity_of
from train.denoiser_feed import LatentFeed, LatentSet
from train.race.data import Picture, Pictures
from train.ranks import Ranks
from train.trainer import Trainer

NORMALIZATIONS = ("model", "channels")
N_VALIDATIONS = 5  # of a run, on its way
_VALIDATED = 64  # held-out images of these validations; the last measurement takes all
_ENCODED = 16  # images in a call of the encoder
_SAMPLED = 64  # images that are drawn at once
_DEAD = 1e-6  # deviation below which a channel says nothing


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """What is the same for all entrants."""

    size: int
    """Side of the images, pixels."""
    stride: int
    """Pixels along the side of a token, a multiple of every f: all have (size / stride)^2 tokens."""
    n_images: int
    """Images that each denoiser sees."""
    minutes: float | None
    """What n_images was derived from, see `train.race.run.images_in`; None: it was given."""
    batch_size: int
    """Images in a step, over all ranks."""
    lr: float
    """Peak learning rate."""
    width: int
    """Channels of the denoiser's tokens."""
    depth: int
    """Its blocks."""
    n_samples: int
    """Images that are drawn."""
    n_steps: int
    """Euler steps of a drawing."""
    guidance: float
    """Weight of classifier-free guidance; 1 = none."""
    normalization: str
    """model: by the model's own config; channels: then each channel to mean 0, deviation 1 on the training images."""
    precision: str
    """Of training: bf16, fp16 or no."""
    seed: int
    """Of weights, order, noise, samples."""

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", self.size, ">= 1")
        require(self.stride >= 1 and self.size % self.stride == 0, "size", self.size, f"multiples of {self.stride}")
        allowed = " or ".join(NORMALIZATIONS)
        require(self.normalization in NORMALIZATIONS, "normalize", self.normalization, allowed)
        require(self.width % HEAD == 0, "width", self.width, f"multiples of {HEAD}")

    @property
    def n_tokens(self) -> int:
        """Tokens of an image."""
        return (self.size // self.stride) ** 2


def encode(
    engine: Engine,
    pictures: Sequence[Picture],
    labels: Sequence[int],
    ranks: Ranks,
    *,
    mirror: bool,
    advance: Callable[[int], None] = lambda _: None,
) -> LatentSet:
    """Return the latents of pictures, normalized as the model says.

    Args:
        engine: the autoencoder.
        pictures: of one size, a multiple of f.
        labels: their classes.
        ranks: each takes a share; all get the whole.
        mirror: whether those of the mirror images are wanted too.
        advance: called with the number of images that this rank has encoded.

    Raises:
        ModelError: latents that are not finite.
    """
    model = engine.model
    own = range(ranks.index, len(pictures), ranks.count)
    parts: list[tuple[int, np.ndarray, np.ndarray | None]] = []
    for start in range(0, len(own), _ENCODED):
        chosen = own[start : start + _ENCODED]
        x = to_float(np.stack([pictures[n].pixels for n in chosen])).to(engine.device)
        if mirror:
            x = torch.cat([x, x.flip(-1)])
        with torch.inference_mode():
            posterior = model.encode(x)
            mean = model.normalize(posterior.mean)
            std = None
            if posterior.logvar is not None:
                std = model.normalize(posterior.mean + torch.exp(0.5 * posterior.logvar)) - mean
        for at, n in enumerate(chosen):  # (M, D, h, w) each
            found = mean[at :: len(chosen)].float().cpu().numpy()
            parts.append((n, found, None if std is None else std[at :: len(chosen)].float().cpu().numpy()))
        advance(len(chosen))
    parts = sorted(ranks.gather(parts), key=lambda part: part[0])
    means = np.stack([part[1] for part in parts])
    if not np.isfinite(means).all():
        raise ModelError("the latents are not finite: try --dtype float32")
    stds = [part[2] for part in parts if part[2] is not None]
    return LatentSet(
        keys=[picture.key for picture in pictures],
        labels=torch.tensor(labels, dtype=torch.int64),
        mean=torch.from_numpy(means),
        std=torch.from_numpy(np.stack(stds)) if stds else None,
    )


class Entrant:
    """One autoencoder in a race.

    Attributes:
        name: what tables call it.
        folder: where its results go.
        moments: of its training latents, before `RaceConfig.normalization`: mean and deviation by channel, (D,) each.
    """

    def __init__(
        self, autoencoder: Autoencoder, pictures: Pictures, config: RaceConfig, folder: Path, accelerator: Accelerator
    ) -> None:
        """Take the pictures' latents up to `encode`."""
        self.name, self.folder = autoencoder.name, folder
        self._engine, self._config, self._pictures = autoencoder.engine, config, pictures
        self._accelerator, self._ranks = accelerator, Ranks(accelerator)
        self._denoiser = DenoiserConfig(
            width=config.width, depth=config.depth, patch=config.stride // autoencoder.engine.model.f
        )
        self._scale = (torch.zeros(0), torch.ones(0))  # what normalized latents are further shifted and divided by

    def encode(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Encode all pictures; raises ModelError, see `encode`."""
        pictures = self._pictures
        parts = ((pictures.training, True), (pictures.held_out, False))
        self._training, self._held_out = (
            encode(self._engine, part, pictures.labels(part), self._ranks, mirror=mirror, advance=advance)
            for part, mirror in parts
        )
        self.moments = self._training.moments()
        mean, std = self.moments
        self._scale = (torch.zeros_like(mean), torch.ones_like(std))
        if self._config.normalization == "channels":
            self._scale = (mean, std.clamp_min(_DEAD))
            self._training, self._held_out = (part.scaled(*self._scale) for part in (self._training, self._held_out))
        self._seen_moments = self._training.moments()

    def train(self) -> float:
        """Train the denoiser, or go on with it, and write it to FOLDER/run/model; return the seconds of training.

        Raises:
            TrainingError, Preempted, KeyboardInterrupt: see `train.trainer.Trainer.run`; what was done is kept.
        """
        config, out = self._config, self.folder / "run"
        run = self._run_config(out)
        set_seed(config.seed)
        task = DenoiserTask(
            self._denoiser,
            self._pictures.classes,
            self._held_out.some(_VALIDATED),
            self._seen_moments,
            seed=config.seed,
            about={"autoencoder": self.name, "race": asdict(config), **self._scaling()},
        )
        feed = LatentFeed(
            self._training,
            out,
            batch_size=run.optim.batch_size,
            seed=config.seed,
            rank=self._ranks.index,
            n_ranks=self._ranks.count,
        )
        trainer = Trainer(run, task, feed, self._accelerator)
        found = Checkpoints(out / "checkpoints", run.run.keep_last).newest()
        if found is not None:
            trainer.resume(found[1])
        trainer.run()
        self._ranks.wait()
        self._accelerator.free_memory()
        return trainer.progress.time_s

    def _run_config(self, out: Path) -> DenoiserRun:
        config = self._config
        every = max(1, config.n_images // N_VALIDATIONS)
        optim = OptimConfig(
            lr=config.lr, batch_size=config.batch_size // self._ranks.count, warmup_images=config.n_images // 20
        )
        run = RunConfig(
            out=str(out),
            n_images=config.n_images,
            seed=config.seed,
            precision=config.precision,  # type: ignore[arg-type]  # checked by the command
            validate_every=every,
            checkpoint_every=every,
            keep_last=1,
        )
        return DenoiserRun(denoiser=self._denoiser, optim=optim, run=run)

    def _scaling(self) -> dict[str, Any]:
        mean, std = self._scale
        return {
            "latents": "normalized by the autoencoder's config, then (latents - channel_mean) / channel_std",
            "channel_mean": mean.tolist(),
            "channel_std": std.tolist(),
        }

    def network(self) -> DenoiserModule:
        """Return the averaged denoiser that was trained."""
        network = DiTTransformer2DModel.from_pretrained(self.folder / "run" / "model", local_files_only=True)
        return DenoiserModule(network.requires_grad_(False)).to(self._accelerator.device)

    def measure(self) -> list[dict[str, float]]:
        """Measure the averaged denoiser on all held-out latents; return a row each, in their order, on every rank."""
        own = range(self._ranks.index, len(self._held_out), self._ranks.count)
        rows = measure(
            self.network(), self._held_out, own, self._seen_moments, self._config.seed, self._accelerator.device
        )
        numbered = sorted(self._ranks.gather(list(zip(own, rows, strict=True))), key=lambda pair: pair[0])
        return [row for _, row in numbered]

    def draw(self, labels: Sequence[int], advance: Callable[[int], None] = lambda _: None) -> list[np.ndarray]:
        """Draw images of classes; sample n has the same noise for every entrant with latents of this shape.

        Returns:
            (size, size, 3) uint8 each, on every rank.

        Raises:
            ModelError: samples that are not finite, on every rank.
        """
        network, config, device = self.network(), self._config, self._accelerator.device
        own = range(self._ranks.index, len(labels), self._ranks.count)
        drawn: list[tuple[int, np.ndarray | None]] = []
        mean, std = (values[:, None, None] for values in self._scale)
        shape = self._held_out.shape
        for start in range(0, len(own), _SAMPLED):
            chosen = own[start : start + _SAMPLED]
            rngs = [generator(config.seed, str(n), "sample") for n in chosen]
            noise = torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))
            classes = torch.tensor([labels[n] for n in chosen], device=device)
            velocity = velocity_of(network, classes, len(self._pictures.classes), config.guidance)
            z = sample(velocity, noise.to(device), config.n_steps).cpu() * std + mean
            drawn += zip(chosen, self._decode(z), strict=True)
            advance(len(chosen))
        images = [
            image for _, image in sorted(self._ranks.gather(drawn), key=lambda pair: pair[0]) if image is not None
        ]
        if len(images) < len(labels):
            raise ModelError(f"{self.name}: {len(labels) - len(images)} of {len(labels)} samples are not finite")
        return images

    def reconstruct(self, pictures: Sequence[Picture]) -> list[np.ndarray]:
        """Return what the autoencoder alone makes of pictures, (size, size, 3) uint8 each, on every rank."""
        engine, ranks = self._engine, self._ranks
        own = range(ranks.index, len(pictures), ranks.count)
        made = [(n, engine.decode(engine.encode(pictures[n].pixels), *pictures[n].pixels.shape[:2])) for n in own]
        return [image for _, image in sorted(ranks.gather(made), key=lambda pair: pair[0])]

    def _decode(self, z: torch.Tensor) -> list[np.ndarray | None]:
        """Return the images of normalized latents (B, D, h, w), (size, size, 3) uint8; None where not finite."""
        raw = self._engine.model.denormalize(z.to(self._engine.device)).float().cpu().numpy()
        return [self._decoded(one) for one in raw]

    def _decoded(self, z: np.ndarray) -> np.ndarray | None:
        try:
            return self._engine.decode(z, self._config.size, self._config.size)
        except NonFiniteError:  # told by all ranks together
            return None
