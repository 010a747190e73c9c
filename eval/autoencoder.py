"""A folder of any diffusers autoencoder as evaluation sees it: an image in, its reconstruction out.

    x (H, W, 3) uint8 -> Engine: encode -> posterior's mean, or a sample of it -> Engine: decode -> x_hat, 8 bits
                                            VQ: codebook indices of the same latents

Entry: `load_all`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codec import images
from codec.engine import Engine, EngineConfig
from codec.errors import ModelError, NonFiniteError, UsageError
from codec.index_maps import IndexMap, to_grids
from codec.latent_model import CodebookModel
from codec.model_folder import CODEC_JSON, resolve, state_maps
from eval.draws import generator
from eval.protocol import POSTERIORS

PADDING = "right and bottom by edge pixels to a multiple of f, cropped away again"


@dataclass(frozen=True)
class Reconstruction:
    """What became of one image.

    Attributes:
        x_hat: (H, W, 3) uint8.
        indices: (h*s, w*s) codebook indices of each index map of a VQ model; empty for the others.
    """

    x_hat: np.ndarray
    indices: Sequence[np.ndarray] = ()


class PngRoundTrip:
    """The identity control: stands where an autoencoder stands, and loses nothing."""

    name = "identity (PNG)"
    maps: tuple[IndexMap, ...] = ()

    def __call__(self, key: str, x: np.ndarray) -> Reconstruction:
        """Return x, (H, W, 3) uint8, as it comes back from a PNG file."""
        return Reconstruction(images.load(images.save_png(x, compress_level=1), name=key))


class Autoencoder:
    """One model folder, ready to reconstruct images one by one.

    Attributes:
        name: what tables call it.
        maps: the index maps of a VQ model; empty for the others.
    """

    def __init__(self, name: str, folder: Path, engine: Engine, posterior: str = "mode", seed: int = 0) -> None:
        """Wrap a loaded network.

        Args:
            name: what tables call it.
            folder: where it is.
            engine: the network.
            posterior: "mode", or "sample": the mean plus noise of the posterior's own size.
            seed: of the noise, together with each image's key; nothing else decides it.

        Raises:
            UsageError: a sample of a model without a variance, or another word.
        """
        if posterior not in POSTERIORS:
            raise UsageError(f"--posterior: {posterior!r}, expected {' or '.join(POSTERIORS)}")
        if posterior == "sample" and engine.model.family != "kl":
            raise UsageError(f"{folder}: a {engine.model.family} model has no variance: --posterior mode only")
        self.name = name
        self.folder = folder
        self.engine = engine
        self.posterior = posterior
        self.seed = seed
        model = engine.model
        self.maps = model.maps if isinstance(model, CodebookModel) else ()

    def __call__(self, key: str, x: np.ndarray) -> Reconstruction:
        """Return the reconstruction of an image.

        Args:
            key: of the image; seeds the noise of a sample.
            x: (H, W, 3) uint8; padded as PADDING says.

        Raises:
            ValueError: values that are not finite, or an image that does not fit into memory: others may fare better.
        """
        try:
            z = self.engine.encode(x) if self.posterior == "mode" else self._sample(key, x)
            x_hat = self.engine.decode(z, *x.shape[:2])
        except (ModelError, NonFiniteError) as exception:  # of the model: it cannot be run in tiles
            raise ValueError(f"{self.name}: {exception}") from exception
        return Reconstruction(x_hat, to_grids(self.engine.indices(z), self.maps) if self.maps else ())

    def _sample(self, key: str, x: np.ndarray) -> np.ndarray:
        engine = self.engine
        height, width = x.shape[:2]
        if not engine.fits(height, width, "encode"):
            raise ValueError(f"{width} x {height} pixels need tiles, and those give no variance: --posterior mode only")
        posterior = engine.posterior(x)
        assert posterior.logvar is not None, "checked when it was made"
        mean, logvar = (part[0].float().cpu().numpy() for part in (posterior.mean, posterior.logvar))
        z: np.ndarray = mean + np.exp(0.5 * logvar) * noise(self.seed, key, mean.shape)
        if not np.isfinite(z).all():
            raise NonFiniteError("the latents are not finite")
        return z

    def description(self) -> dict[str, Any]:
        """Return what a report should say about the model, as plain JSON values."""
        model = self.engine.model
        return {
            "folder": str(self.folder),
            "weights": file_hashes(self.folder),
            "class": type(model.network).__name__,
            "family": model.family,
            "f": model.f,
            "latent_channels": model.channels,
            **(state_maps(self.maps) if self.maps else {"codebook_size": None}),
            "scaling_factor": model.scaling_factor,
            "shift_factor": model.shift_factor,
            "n_parameters": sum(parameter.numel() for parameter in model.network.parameters()),
            "decoder_id": self.engine.decoder_id,
            **self.engine.description(),
        }


def noise(seed: int, key: str, shape: Sequence[int]) -> np.ndarray:
    """Return float32 normal noise that depends on the seed and the image's key alone, not on order, rank or device."""
    return generator(seed, key, "posterior").standard_normal(tuple(shape), dtype=np.float32)


def posterior_text(posterior: str, seed: int) -> str:
    """Return what a protocol says about the latents that are decoded."""
    if posterior == "mode":
        return "mode (the mean)"
    return f"sample: mean + std * noise, numpy PCG64 seeded by SHA-256 of seed {seed} and of each name"


def load_all(
    folders: Sequence[Path],
    config: EngineConfig,
    local_rank: int = 0,
    notes: Callable[[str], None] = lambda _: None,
    *,
    posterior: str = "mode",
    seed: int = 0,
) -> list[Autoencoder]:
    """Load models, ours or anyone's, by folder or name; see `Autoencoder`, `model_folder.resolve` and `Engine.load`.

    Raises:
        ModelError: a folder is missing, damaged or of an unsupported class.
        UsageError: there is no such device or type, or a sample of a model without a variance.
    """
    folders = [resolve(folder) for folder in folders]
    names = names_of(folders)
    return [
        Autoencoder(name, folder, Engine.load(folder, config, local_rank, notes), posterior, seed)
        for name, folder in zip(names, folders, strict=True)
    ]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder: codec.json's or the folder's, else as much of the paths as tells them apart.

    Raises:
        UsageError: a folder is there twice.
    """
    every = [folder.resolve().parts for folder in folders]
    stated = [_stated_name(folder) or parts[-1] for folder, parts in zip(folders, every, strict=True)]
    if len(set(stated)) == len(stated):
        return stated
    for n_parts in range(1, max(map(len, every), default=0) + 1):
        names = ["/".join(parts[-n_parts:]) for parts in every]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"the same model twice among {', '.join(map(str, folders))}")


def _stated_name(folder: Path) -> str | None:
    """Return the name that the codec has for a model of its own; None for those of others."""
    try:
        return str(json.loads((folder / CODEC_JSON).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the config and of every weights file in a diffusers folder, by name."""
    if not (folder / "config.json").exists():
        folder = folder / "vae"
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    weights = [path for path in paths if path.name.startswith("diffusion_pytorch_model")]
    hashes = {}
    for path in [folder / "config.json", *weights]:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
