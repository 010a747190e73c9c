"""One image through every probe of `codec-eval latents`, and the part of the work that one rank does.

crop -> encode -> tally, samples, spectra -> noise, equivariance, locality, drift -> ImageRecord
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import images
from codec.engine import Engine
from codec.errors import ImageError, NonFiniteError
from codec.latent_model import LatentModel
from codec.pipeline import FAILURES
from codec.pixels import to_float, to_uint8
from eval import latent_fp16, latent_probes
from eval.draws import generator
from eval.latent_grid import measure_colour
from eval.latent_locality import CellReach, cell_reaches
from eval.latent_posterior import PosteriorTally, Samples
from eval.latent_spectrum import radial_power, shrink

N_FP16_IMAGES = 8
N_SAMPLES = 4096
"""Positions kept of all images together."""


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """What is measured.

    Attributes:
        size: side in pixels of the centre crop of every image.
        seed: of noise, of the positions and of the cells that are drawn.
        sigmas: strengths of noise on normalized latents.
        n_trips: of the drift, at least 2.
        n_cells: random cells per image whose reach is measured, besides the one of largest norm.
    """

    size: int = 256
    seed: int = 0
    sigmas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    n_trips: int = 10
    n_cells: int = 3

    def __post_init__(self) -> None:
        if self.size < 1 or self.n_trips < 2 or self.n_cells < 1:
            raise ValueError(f"size {self.size}, n_trips {self.n_trips}, n_cells {self.n_cells}: too small")
        if not self.sigmas or self.sigmas[0] != 0 or min(self.sigmas) < 0:
            raise ValueError(f"sigmas {self.sigmas}, expected 0 first and none below")


@dataclass(frozen=True)
class Job:
    """One image of the whole list.

    Attributes:
        index: its place in the list.
        path: of the file.
        name: its key: in rows, and for random draws.
    """

    index: int
    path: Path
    name: str


@dataclass
class ImageRecord:
    """What was measured on one image; everything beside it is in the tally.

    Attributes:
        index: its place in the list of images.
        row: of the JSON.
        sha256: of the crop.
        samples: drawn positions.
        image_power: (size // 2,) of the crop, all three channels.
        coarse_power: (h // 2,) of the crop averaged onto the latent grid.
        latent_power: (D, h // 2) of each channel, raw.
        reaches: of its cells.
    """

    index: int
    row: dict[str, Any]
    sha256: str
    samples: Samples
    image_power: np.ndarray
    coarse_power: np.ndarray
    latent_power: np.ndarray
    reaches: list[CellReach]


@dataclass(frozen=True)
class Example:
    """The first image, for the picture.

    Attributes:
        index: its place in the list of images.
        image: (size, size, 3) uint8.
        x_hat: the same, reconstructed.
        z: (D, h, w) normalized.
    """

    index: int
    image: np.ndarray
    x_hat: np.ndarray
    z: np.ndarray


@dataclass
class Share:
    """What one rank measured; picklable.

    Attributes:
        tally: of its images.
        records: of its images, in their order.
        failed: {"image", "path", "reason"} of images that could not be measured.
        colours: rows of the constant colours, with their place in `latent_grid.COLOURS`.
        blocks: largest activation of each block.
        example: its first image.
    """

    tally: PosteriorTally
    records: list[ImageRecord] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    colours: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    blocks: dict[str, float] = field(default_factory=dict)
    example: Example | None = None


def load_crop(path: Path, size: int) -> np.ndarray:
    """Return the centre crop of an image, (size, size, 3) uint8.

    Raises:
        ImageError: it cannot be read, or a side is shorter than size.
    """
    image = images.load(path)
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ImageError(f"{path}: {width} x {height} pixels, smaller than --size {size}")
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def measure_share(
    engine: Engine,
    jobs: Sequence[Job],
    colours: Sequence[tuple[int, tuple[int, int, int]]],
    n_images: int,
    config: LatentsConfig,
    advance: Callable[[], None],
) -> Share:
    """Measure one rank's images and colours. The network is a plain one afterwards, not accelerated.

    Args:
        engine: its network.
        jobs: this rank's images.
        colours: this rank's constant colours, numbered.
        n_images: of all ranks together.
        config: what is measured.
        advance: called after each image and colour.
    """
    from codec import fast

    model = engine.model
    share = Share(PosteriorTally.empty(model.channels))
    n_samples = max(1, min(256, N_SAMPLES // n_images))
    kept: list[torch.Tensor] = []
    with torch.inference_mode():
        for job in jobs:
            try:
                image = load_crop(job.path, config.size)
                x = to_float(image)[None].to(engine.device)
                record, example = measure_image(model, x, job, config, n_samples, share.tally)
            except FAILURES as exception:
                reason = str(exception) if str(exception).startswith(str(job.path)) else f"{job.path}: {exception}"
                share.failed.append({"index": job.index, "image": job.name, "path": str(job.path), "reason": reason})
            else:
                record.sha256 = hashlib.sha256(image.tobytes()).hexdigest()
                share.records.append(record)
                share.example = share.example or example
                if job.index < N_FP16_IMAGES:
                    kept.append(x)
            advance()
        for number, colour in colours:
            share.colours.append((number, _colour(model, colour, config.size, engine.device)))
            advance()
        network = fast.restore(model.network)  # the hooks see nothing of an accelerated one
        with latent_fp16.recording(network) as share.blocks:
            for x in kept:
                model.decode(model.encode(x).mean)
    return share


def _colour(model: LatentModel, colour: tuple[int, int, int], size: int, device: torch.device) -> dict[str, Any]:
    try:
        return measure_colour(model, colour, size, device)
    except NonFiniteError as exception:
        return {"colour": list(colour), "failed": str(exception)}


def measure_image(
    model: LatentModel,
    x: torch.Tensor,
    job: Job,
    config: LatentsConfig,
    n_samples: int,
    tally: PosteriorTally,
) -> tuple[ImageRecord, Example]:
    """Put one image through every probe.

    Args:
        model: the autoencoder.
        x: (1, 3, size, size) in [-1, 1].
        job: its name and place.
        config: what is measured.
        n_samples: positions to draw.
        tally: gets its posterior, once everything else has succeeded.

    Raises:
        NonFiniteError: latents or decoded pixels are not finite.
    """
    posterior = latent_probes.encode(model, x)
    z = posterior.mean
    x_hat = latent_probes.decode(model, z)

    def rng(purpose: str) -> np.random.Generator:
        return generator(config.seed, job.name, purpose)

    reaches = cell_reaches(model, z, config.n_cells, rng("cells"))
    own = PosteriorTally.empty(model.channels)
    own.update(posterior)
    psnr = latent_probes.psnr_db(x, x_hat)
    planes, latents = x[0].cpu().numpy(), z[0].double().cpu().numpy()
    row = {
        "image": job.name,
        "kl_nats": None
        if posterior.logvar is None
        else float(own.statistics.summary().kl_nats.sum()) * latents[0].size,
        "psnr_db": psnr,
        "noise_db": [psnr, *latent_probes.noise_curve(model, x, z, config.sigmas[1:], rng("noise"))],
        "equivariance": latent_probes.equivariance(model, x, z, x_hat),
        "locality": [_reach_row(reach, model.f) for reach in reaches],
        "drift": latent_probes.drift(model, x, x_hat, config.n_trips),
    }
    record = ImageRecord(
        index=job.index,
        row=row,
        sha256="",
        samples=Samples.draw(posterior, n_samples, rng("positions")),
        image_power=radial_power(planes),
        coarse_power=radial_power(shrink(planes, model.f)),
        latent_power=np.stack([radial_power(plane[None]) for plane in latents]),
        reaches=reaches,
    )
    tally.merge(own)
    normalized = (latents - model.shift_factor) * model.scaling_factor
    return record, Example(job.index, to_uint8(x[0]), to_uint8(x_hat[0]), normalized.astype(np.float32))


def _reach_row(reach: CellReach, f: int) -> dict[str, Any]:
    return {
        "row": reach.row,
        "column": reach.column,
        "largest": reach.largest,
        "share_within": {str(distance): reach.share_within(distance) for distance in (f, 2 * f, 4 * f)},
        "reach_px": reach.reach_px,
        "visible_px": reach.visible_px,
    }
