"""A codec for an autoencoder that has none: its latents are measured on training images, tables fitted to them.

    network + training images -> latent statistics, steps -> entropy tables -> ModelFolder, in memory
    VQModel + training images -> statistics, codebook indices -> index tables -> ModelFolder, in memory or written

`codec-train export` measures with the same functions. Entries: `measure`, `adopt`; of a VQ model `measure_indices`,
`write_vq`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codec import index_tables, model_folder, tables
from codec.errors import UsageError
from codec.index_tables import IndexTables
from codec.latent_model import CodebookModel, LatentModel, decoder_id, load_latent_model
from codec.model_folder import ModelFolder
from codec.pixels import middle, to_float
from codec.search_limit import N_IMAGES, search_below
from codec.statistics import LatentStatistics, LatentSummary

_COARSEST_BPP = 0.08  # the rate at q = 0
_MAX_TABLE_LATENTS = 1_000_000  # positions per channel that tables are fitted to
_MIN_GRID_SIDE = 16  # latents; a smaller part of an image says too little of neighbours
_MAX_RATE_LATENTS = 200_000  # positions that the coarsest rate is measured on
_LARGEST_SIDE = 512  # pixels of an image that `adopt` looks at; more costs memory and says little more


@dataclass(frozen=True)
class Measured:
    """What the training images say about a model.

    Attributes:
        summary: moments of the raw latents.
        step: (D,) float32, the quantiser's steps at q = 0.
        grids: (D, h, w) float32 each, parts of the images' raw latents, in the order of the images.
        largest_activation: the largest magnitude inside the network, on the images that were decoded too; 0 = none was.
    """

    summary: LatentSummary
    step: np.ndarray
    grids: list[np.ndarray]
    largest_activation: float


def measure(
    model: LatentModel,
    images: Iterable[np.ndarray],
    n_images: int,
    *,
    step: np.ndarray | None = None,
    n_decoded: int = 0,
    watch: Callable[[np.ndarray, np.ndarray], None] = lambda _z, _image: None,
) -> Measured | None:
    """Encode training images, whole, and measure their latents.

    Args:
        model: the network, in float32, wherever it lies.
        images: (H, W, 3) uint8 each, sides multiples of f, in random order: the context is fitted to the first.
        n_images: how many there are at most.
        step: (D,) float32, steps at q = 0 that are known already; None = measured.
        n_decoded: how many are decoded too, for the largest activation.
        watch: called with each image's raw latents, (D, h, w) float32, and the image.

    Returns:
        None where there was no image.

    Raises:
        UsageError: the latents do not vary.
    """
    statistics = LatentStatistics(model.channels)
    device = next(model.network.parameters()).device
    rng = np.random.default_rng(0)
    per_image = max(1, _MAX_TABLE_LATENTS // n_images)
    kept: list[np.ndarray] = []
    largest = 0.0
    for n, image in enumerate(images):
        x = to_float(image)[None].to(device)
        with torch.inference_mode():
            if n < n_decoded:
                with _activations(model.network) as seen:
                    posterior = model.encode(x)
                    model.decode(posterior.mean)
                largest = max(largest, *seen)
            else:
                posterior = model.encode(x)
        statistics.update(posterior)
        grid = posterior.mean[0].cpu().numpy()
        watch(grid, image)
        kept.append(random_part(grid, per_image, rng))
    if not kept:
        return None
    summary = statistics.summary()
    _check_variation(summary)
    if step is None:
        z = np.concatenate([grid.reshape(model.channels, -1) for grid in kept], axis=1)
        step = coarsest_step(z, summary, model.f)
    assert step.shape == (model.channels,)
    assert (step > 0).all()
    return Measured(summary, step.astype(np.float32), kept, largest)


@dataclass(frozen=True)
class MeasuredIndices:
    """What the training images say about a VQ model.

    Attributes:
        summary: moments of the raw latents, before they are quantised.
        grids: (h, w) int32 codebook indices each, parts of the images', in the order of the images.
        counts: (K,) int64, how often each code stands in the whole images.
    """

    summary: LatentSummary
    grids: list[np.ndarray]
    counts: np.ndarray

    def usage(self) -> dict[str, Any]:
        """Return how the codebook is used, for codec.json: K, tokens seen, codes used, their share, perplexity."""
        n_tokens, n_used = int(self.counts.sum()), int((self.counts > 0).sum())
        p = self.counts[self.counts > 0] / n_tokens
        return {
            "size": self.counts.size,
            "n_tokens": n_tokens,
            "n_used": n_used,
            "usage": n_used / self.counts.size,
            "perplexity": float(np.exp(-(p * np.log(p)).sum())),
        }

    def fit(self, model: CodebookModel) -> IndexTables:
        """Return tables fitted to the indices."""
        return index_tables.fit(self.grids, model.codebook.detach().float().cpu().numpy())


def measure_indices(
    model: CodebookModel,
    images: Iterable[np.ndarray],
    n_images: int,
    *,
    watch: Callable[[np.ndarray, np.ndarray], None] = lambda _z, _image: None,
) -> MeasuredIndices | None:
    """Encode training images, whole, and count the codebook indices that they become; see `measure`.

    Args:
        model: the network, in float32, wherever it lies.
        images: (H, W, 3) uint8 each, sides multiples of f, in random order.
        n_images: how many there are at most.
        watch: called with each image's raw latents, (D, h, w) float32, and the image.

    Returns:
        None where there was no image.

    Raises:
        UsageError: the latents do not vary.
    """
    statistics = LatentStatistics(model.channels)
    device = next(model.network.parameters()).device
    rng = np.random.default_rng(0)
    per_image = max(1, _MAX_TABLE_LATENTS // n_images)
    counts = np.zeros(model.codebook_size, np.int64)
    kept: list[np.ndarray] = []
    for image in images:
        with torch.inference_mode():
            posterior = model.encode(to_float(image)[None].to(device))
            grid = model.quantise(posterior.mean).cpu().numpy().astype(np.int32)  # (1, h, w)
        statistics.update(posterior)
        watch(posterior.mean[0].cpu().numpy(), image)
        counts += np.bincount(grid.reshape(-1), minlength=counts.size)
        kept.append(random_part(grid, per_image, rng)[0])
    if not kept:
        return None
    summary = statistics.summary()
    _check_variation(summary)
    return MeasuredIndices(summary, kept, counts)


def write_vq(
    folder: Path, model: CodebookModel, measured: MeasuredIndices, info: Mapping[str, Any] | None = None
) -> ModelFolder:
    """Make a folder that diffusers has saved a VQModel to a model folder: write codec.json and codec.safetensors.

    Args:
        folder: the folder.
        model: its network.
        measured: on training images.
        info: what else codec.json is to hold, or to hold instead; None = nothing. The name is the folder's otherwise.

    Returns:
        The folder, read back.
    """
    document = {"name": folder.resolve().name, **vq_info(model, measured), **(info or {})}
    return model_folder.write_vq(folder, info=document, index_tables=[measured.fit(model)])


def vq_info(model: CodebookModel, measured: MeasuredIndices) -> dict[str, Any]:
    """Return what codec.json says of a VQ model and its codebook, all but the name."""
    return {
        "family": model.family,
        "f": model.f,
        "latent_channels": model.channels,
        "receptive_field": model.receptive_field,
        "decoder_id": decoder_id(model.network),
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        "codebook_size": model.codebook_size,
        "codebook": measured.usage(),
        "statistics": measured.summary.to_json(),
    }


def _check_variation(summary: LatentSummary) -> None:
    if not summary.std.max() > 1e-8:  # not the global one, which constants that differ by channel would pass
        raise UsageError("the latents of the training images do not vary: the model has collapsed")


def random_part(z: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random rectangle of about `limit` positions, as wide for its height as the whole, out of (D, h, w)."""
    height, width = z.shape[1:]
    share = min(1.0, float(np.sqrt(limit / (height * width))))
    sides = [min(side, max(_MIN_GRID_SIDE, round(side * share))) for side in (height, width)]
    top, left = (int(rng.integers(whole - side + 1)) for whole, side in zip((height, width), sides, strict=True))
    return z[:, top : top + sides[0], left : left + sides[1]].copy()


def coarsest_step(z: np.ndarray, summary: LatentSummary, f: int) -> np.ndarray:
    """Return the steps at q = 0: proportional to each channel's posterior deviation, scaled to the coarsest rate.

    The posterior's standard deviation is the noise that the decoder was trained to bear; uniform quantisation with
    step s adds noise of deviation s / sqrt(12), so equal ratios serve every channel alike. Where the
    family has no variance, the standard deviation of the latents serves.

    Args:
        z: (D, N) raw latents.
        summary: their moments.
        f: downsampling factor; z has one column per f * f pixels.

    Returns:
        (D,) float32; the order-0 entropy of z at these steps is 0.08 bits per pixel, within 1 %.
    """
    noise = summary.posterior_std if summary.posterior_std.any() else summary.std
    shape = np.maximum(noise, 1e-6 * summary.global_std) * np.sqrt(12.0)
    mean = summary.mean.astype(np.float32)
    spread = z[:, :: max(1, z.shape[1] // _MAX_RATE_LATENTS)]
    low, high = 1e-6, 1e6  # bisection on a logarithmic scale: the rate falls as the steps grow
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        bpp = tables.entropy_bits(spread, mean, (shape * middle).astype(np.float32), 0) / f**2
        low, high = (middle, high) if bpp > _COARSEST_BPP else (low, middle)
        if high / low < 1.001:
            break
    step: np.ndarray = (shape * high).astype(np.float32)
    return step


def adopt(folder: Path, images: Iterable[np.ndarray], n_images: int, device: torch.device | str = "cpu") -> ModelFolder:
    """Fit steps and entropy tables, or index tables, to the latents of an autoencoder; its folder is only read.

    Args:
        folder: of a diffusers autoencoder, or of a pipeline with one in `vae/`.
        images: (H, W, 3) uint8 each, training images, in random order; at most 512 x 512 from their middle are used.
        n_images: how many there are at most.
        device: where the network runs meanwhile, in float32.

    Returns:
        What `Codec.load` takes: `path` is `folder`, and nothing is written.

    Raises:
        ModelError: not an autoencoder that is supported and that the codec can code.
        UsageError: no image is large enough, or the latents do not vary.
    """
    model = load_latent_model(folder, device)
    kept: list[np.ndarray] = []
    middles = (middle(image, model.f, _LARGEST_SIDE) for image in images)
    usable = keep_first((image for image in middles if image.size), kept)
    if isinstance(model, CodebookModel):
        return _adopt_vq(folder, model, measure_indices(model, usable, n_images))
    measured = measure(model, usable, n_images)
    if measured is None:
        raise _no_images(folder, model)
    mean, step = measured.summary.mean.astype(np.float32), measured.step
    table_set = tables.fit(measured.grids, mean, step)
    its_id = decoder_id(model.network)
    info: dict[str, Any] = {
        "family": model.family,
        "receptive_field": model.receptive_field,
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        "statistics": measured.summary.to_json(),
        "search_below": search_below(model, kept, table_set, mean, step),
    }
    return ModelFolder(
        path=folder,
        name=_name(folder),
        f=model.f,
        channels=model.channels,
        mean=mean,
        step=step,
        table_sets={table_set.digest(mean, step): table_set},
        decoder_id=its_id,
        info=info,
    )


def keep_first(images: Iterable[np.ndarray], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass images on; `kept` takes the first ones, as many as `codec.search_limit` wants."""
    for image in images:
        if len(kept) < N_IMAGES:
            kept.append(image)
        yield image


def _adopt_vq(folder: Path, model: CodebookModel, measured: MeasuredIndices | None) -> ModelFolder:
    if measured is None:
        raise _no_images(folder, model)
    fitted, info = measured.fit(model), vq_info(model, measured)
    return ModelFolder(
        path=folder,
        name=_name(folder),
        f=model.f,
        channels=model.channels,
        mean=np.empty(0, np.float32),
        step=np.empty(0, np.float32),
        table_sets={},
        index_tables={fitted.digest(): fitted},
        decoder_id=info["decoder_id"],
        info=info,
    )


def _no_images(folder: Path, model: LatentModel) -> UsageError:
    return UsageError(f"{folder}: no training image of at least {model.f} x {model.f} pixels to fit tables to")


def _name(folder: Path) -> str:
    path = folder.resolve()
    return path.parent.name if path.name == "vae" else path.name


@contextmanager
def _activations(network: nn.Module) -> Iterator[list[float]]:
    """Yield a list that takes the largest magnitude of every module's output while the context is open."""
    seen = [0.0]

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen.append(float(output.abs().max()))

    hooks = [module.register_forward_hook(hook) for module in network.modules()]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()
