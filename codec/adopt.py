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

from codec import map_tables, model_folder, tables
from codec.errors import UsageError
from codec.index_maps import IndexMap, to_grids
from codec.latent_model import CodebookModel, LatentModel, Posterior, decoder_id, load_latent_model
from codec.map_tables import CodeTables
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
    rng = np.random.default_rng(0)
    kept: list[np.ndarray] = []
    largest = [0.0]

    def encode(x: torch.Tensor) -> Posterior:
        if len(kept) >= n_decoded:
            return model.encode(x)
        with _activations(model.network, largest):
            posterior = model.encode(x)
            model.decode(posterior.mean)
        return posterior

    for posterior in _posteriors(model, images, statistics, watch, encode):
        kept.append(random_part(posterior.mean[0].cpu().numpy(), _per_image(n_images), rng))
    if not kept:
        return None
    summary = _varying(statistics)
    if step is None:
        z = np.concatenate([grid.reshape(model.channels, -1) for grid in kept], axis=1)
        step = coarsest_step(z, summary, model.f)
    assert step.shape == (model.channels,)
    assert (step > 0).all()
    return Measured(summary, step.astype(np.float32), kept, max(largest))


def _posteriors(
    model: LatentModel,
    images: Iterable[np.ndarray],
    statistics: LatentStatistics,
    watch: Callable[[np.ndarray, np.ndarray], None],
    encode: Callable[[torch.Tensor], Posterior],
) -> Iterator[Posterior]:
    """Yield the posterior of each image, after it was counted and watched."""
    device = next(model.network.parameters()).device
    for image in images:
        with torch.inference_mode():
            posterior = encode(to_float(image)[None].to(device))
        statistics.update(posterior)
        watch(posterior.mean[0].cpu().numpy(), image)
        yield posterior


def _per_image(n_images: int) -> int:
    return max(1, _MAX_TABLE_LATENTS // n_images)


def _varying(statistics: LatentStatistics) -> LatentSummary:
    summary = statistics.summary()
    if not summary.std.max() > 1e-8:  # not the global one, which constants that differ by channel would pass
        raise UsageError("the latents of the training images do not vary: the model has collapsed")
    return summary


@dataclass(frozen=True)
class MeasuredIndices:
    """What the training images say about a VQ model.

    Attributes:
        summary: moments of the raw latents, before they are quantised.
        maps: the model's index maps, most often one.
        grids: for each map (h*s, w*s) int32 codebook indices, parts of the images', in the order of the images.
        counts: for each map (K,) int64, how often each code stands in the whole images.
    """

    summary: LatentSummary
    maps: tuple[IndexMap, ...]
    grids: tuple[list[np.ndarray], ...]
    counts: tuple[np.ndarray, ...]

    def usage(self) -> list[dict[str, Any]]:
        """Return how each map's codebook is used: K, tokens seen, codes used, their share, perplexity."""
        return [_usage(counts) for counts in self.counts]

    def about(self) -> dict[str, Any]:
        """Return what codec.json says of `usage`: `codebook` of a single map, `codebooks` of several."""
        usage = self.usage()
        return {"codebook": usage[0]} if len(usage) == 1 else {"codebooks": usage}

    def fit(self, model: CodebookModel) -> CodeTables:
        """Return tables fitted to the indices: `IndexTables`, or `MapTables`, which has them for each map."""
        codebooks = [codebook.detach().float().cpu().numpy() for codebook in model.codebooks]
        return map_tables.fit(self.maps, self.grids, codebooks)


def _usage(counts: np.ndarray) -> dict[str, Any]:
    n_tokens, n_used = int(counts.sum()), int((counts > 0).sum())
    p = counts[counts > 0] / n_tokens
    return {
        "size": counts.size,
        "n_tokens": n_tokens,
        "n_used": n_used,
        "usage": n_used / counts.size,
        "perplexity": float(np.exp(-(p * np.log(p)).sum())),
    }


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
    rng = np.random.default_rng(0)
    counts = tuple(np.zeros(each.codebook_size, np.int64) for each in model.maps)
    kept: tuple[list[np.ndarray], ...] = tuple([] for _ in model.maps)
    for posterior in _posteriors(model, images, statistics, watch, model.encode):
        for grid, counted, parts in zip(_grids(model, posterior), counts, kept, strict=True):
            counted += np.bincount(grid.reshape(-1), minlength=counted.size)
            parts.append(random_part(grid[None], _per_image(n_images), rng)[0])
    if not kept[0]:
        return None
    return MeasuredIndices(_varying(statistics), model.maps, kept, counts)


def _grids(model: CodebookModel, posterior: Posterior) -> list[np.ndarray]:
    """Return the indices of one image, for each map (h*s, w*s) int32."""
    with torch.inference_mode():
        indices = model.quantise(posterior.mean).cpu().numpy().astype(np.int32)
    return to_grids(indices.reshape(-1, *indices.shape[-2:]), model.maps)


def write_vq(
    folder: Path, model: CodebookModel, measured: MeasuredIndices, info: Mapping[str, Any] | None = None
) -> ModelFolder:
    """Make a folder that a VQ model was saved to a model folder: write codec.json and codec.safetensors.

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
    """Return what codec.json says of a VQ model and its codebooks, all but the name."""
    return {
        "family": model.family,
        "f": model.f,
        "latent_channels": model.channels,
        "receptive_field": model.receptive_field,
        "decoder_id": decoder_id(model.network),
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        **model_folder.state_maps(model.maps),
        **measured.about(),
        "statistics": measured.summary.to_json(),
    }


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
def _activations(network: nn.Module, seen: list[float]) -> Iterator[None]:
    """Add the largest magnitude of every module's output to a list while the context is open."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen.append(float(output.abs().max()))

    hooks = [module.register_forward_hook(hook) for module in network.modules()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
