"""The model that a latent cache is made with: what identifies its encoder, and running it on pieces of images.

    folder -> CacheModel (ids, normalisation, constants), in the header
           -> Encoder: pieces (S, S, 3) uint8 -> Moments, or Tokens, of each piece and of its mirror

Imports torch and diffusers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import console, fast, model_folder
from codec.engine import AUTO, DTYPES, Engine, EngineConfig, pick_device
from codec.errors import ModelError, NonFiniteError, UsageError
from codec.latent_model import (
    CodebookModel,
    LatentModel,
    Normalisation,
    decoder_id,
    encoder_id,
    latent_model,
    load_network,
    normalisation_from_json,
    normalisation_to_json,
)
from codec.model_folder import ModelFolder
from codec.pixels import to_float
from train.cache.moments import Moments, Sides
from train.cache.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class CacheModel:
    """What a cache says about its model.

    Attributes:
        name: of the model, for messages.
        family: see `LatentModel`.
        encoder_id: 16 hex digits; other latents come from another one.
        decoder_id: 16 hex digits; latents stay right when only the decoder is trained further.
        stream_id: of the codec's newest tables, 16 hex digits; None for a folder without tables.
        f: downsampling factor.
        channels: D.
        has_std: whether there is a posterior with a variance.
        normalisation: raw to normalized latents.
        deviation: of raw latents over all channels, measured at export; else what `normalisation` says.
        posterior_std: per channel, root mean square, measured at export; empty where it was not, or there is none.
    """

    name: str
    family: str
    encoder_id: str
    decoder_id: str
    stream_id: str | None
    f: int
    channels: int
    has_std: bool
    normalisation: Normalisation
    deviation: float
    posterior_std: tuple[float, ...]

    @classmethod
    def of(cls, folder: Path) -> "tuple[CacheModel, ModelFolder | None]":
        """Read a model folder; return it and the tables of the codec where the folder has them.

        Args:
            folder: of a diffusers autoencoder, or of a pipeline with one in `vae/`.

        Raises:
            ModelError: missing, damaged, or of a class that is not supported.
        """
        tables = model_folder.read(folder) if model_folder.is_model_folder(folder) else None
        network = load_network(folder)
        model = latent_model(network)
        found = {} if tables is None else tables.info.get("statistics", {})
        has_std = model.family == "kl"
        measured = found.get("posterior_std", []) if has_std else []
        return cls(
            name=(folder.resolve().name if tables is None else tables.name),
            family=model.family,
            encoder_id=encoder_id(network),
            decoder_id=decoder_id(network),
            stream_id=None if tables is None else tables.stream_id,
            f=model.f,
            channels=model.channels,
            has_std=has_std,
            normalisation=model.normalisation,
            deviation=float(found.get("global_std") or _deviation(model)),
            posterior_std=tuple(float(value) for value in measured),
        ), tables

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("normalisation", "posterior_std")},
            "posterior_std": list(self.posterior_std),
            "normalized": normalisation_to_json(self.normalisation),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "CacheModel":
        """Undo `to_json`."""
        values = {name: found[name] for name in cls.__dataclass_fields__ if name not in ("normalisation",)}
        values["posterior_std"] = tuple(values["posterior_std"])
        return cls(**values, normalisation=normalisation_from_json(found["normalized"]))


def _deviation(model: LatentModel) -> float:
    z = torch.zeros(1, model.channels, 8, 8, dtype=torch.float64)
    return float((model.denormalize(z + 1) - model.denormalize(z)).square().mean().sqrt())


def require_same_encoder(cache: Path, made_with: CacheModel, model: "str | Path | torch.nn.Module") -> None:
    """Refuse a model whose encoder is not that of a cache.

    Args:
        cache: folder of the cache, for the message.
        made_with: what the cache says.
        model: a model folder, the name of a model, or a diffusers network.

    Raises:
        ModelError: another encoder, or no model.
    """
    if isinstance(model, torch.nn.Module):
        name, found = type(model).__name__, encoder_id(model)
    else:
        folder = model_folder.resolve(model)
        name, found = str(folder), encoder_id(load_network(folder))
    if found != made_with.encoder_id:
        raise ModelError(
            f"{cache}: made with encoder {made_with.encoder_id} (model {made_with.name}), not with {found} ({name})"
        )


def engine_config(device: str, dtype: str, local_rank: int = 0) -> EngineConfig:
    """Return how the network runs, its type resolved: a cache is not made half in one and half in another.

    Raises:
        UsageError: no such device or type.
    """
    config = EngineConfig(device=device, dtype=dtype)
    if dtype != AUTO:
        return config
    best = fast.best_dtype(pick_device(device, local_rank))
    return replace(config, dtype=next(name for name, kind in DTYPES.items() if kind == best))


class Encoder:
    """A network that is ready to encode pieces of one size."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        size: int,
        batch: int,
        local_rank: int = 0,
        *,
        as_indices: bool = False,
    ) -> None:
        """Load the network.

        Args:
            folder: of the model.
            config: how it runs.
            size: pixels a side of every piece, a multiple of f.
            batch: images that go through the network at once, 1 or an even number; always so many, since what else
                is in a batch must not change a bit, and its size may.
            local_rank: which GPU "auto" means.
            as_indices: give the indices of a model with a codebook, in place of latents.

        Raises:
            ModelError: the folder is missing or damaged.
            UsageError: no such device, or the pieces are too large for it.
        """
        self._folder, self._batch = folder, batch
        self._engine = Engine.load(folder, config, local_rank, console.note)
        self._careful: Engine | None = None
        self._as_indices = as_indices
        self.on_cpu = self._engine.device.type == "cpu"
        if not self._engine.fits(size, size, "encode"):
            raise UsageError(f"--size {size}: an image that large does not fit into the memory of {config.device}")
        self._posterior(np.zeros((batch, size, size, 3), np.uint8))  # derives weights: not for several threads at once

    def describe(self) -> str:
        """Return where and in which type the network runs, for the user."""
        return self._engine.describe()

    def __call__(self, pieces: Sequence[np.ndarray]) -> list[Sides] | list[tuple[Tokens, Tokens]]:
        """Encode pieces and their mirrors; several threads may do this at once.

        Args:
            pieces: (S, S, 3) uint8 each.

        Raises:
            NonFiniteError: even in float32 the latents are not finite.
        """
        images = [side for piece in pieces for side in (piece, piece[:, ::-1])]
        found: list[Moments] = []
        for first in range(0, len(images), self._batch):
            some = images[first : first + self._batch]
            filled = some + [some[-1]] * (self._batch - len(some))
            found += self._finite(np.stack(filled))[: len(some)]
        if self._as_indices:
            tokens = [self._quantised(moments) for moments in found]
            return list(zip(tokens[::2], tokens[1::2], strict=True))
        return list(zip(found[::2], found[1::2], strict=True))

    def _quantised(self, moments: Moments) -> Tokens:
        """Return the indices of one image's latents; one by one, so that no batch changes a choice."""
        model = self._engine.model
        assert isinstance(model, CodebookModel), "checked when the cache was begun"
        with torch.inference_mode():
            z = torch.from_numpy(moments.mean)[None].to(self._engine.device)
            return Tokens(model.quantise(z)[0].cpu().numpy())

    def _finite(self, images: np.ndarray) -> list[Moments]:
        found = self._posterior(images)
        for number, moments in enumerate(found):
            if not _is_finite(moments):
                found[number] = self._again(images[number])
        return found

    def _again(self, image: np.ndarray) -> Moments:
        """Encode in float32 what was not finite in the engine's type."""
        engine = self._engine
        if engine.dtype != torch.float32:
            if self._careful is None:
                console.note(f"note: {self._folder}: numbers beyond {engine.describe()}; those images in float32")
                config = replace(engine.config, dtype="float32", device=str(engine.device))
                self._careful = Engine.load(self._folder, config)
            found = _moments(self._careful, image[None])[0]
            if _is_finite(found):
                return found
        raise NonFiniteError("the latents are not finite")

    def _posterior(self, images: np.ndarray) -> list[Moments]:
        return _moments(self._engine, images)


def _moments(engine: Engine, images: np.ndarray) -> list[Moments]:
    with torch.inference_mode():
        posterior = engine.model.encode(to_float(images).to(engine.device))
        mean = posterior.mean.float().cpu().numpy()
        std = None if posterior.logvar is None else torch.exp(0.5 * posterior.logvar.float()).cpu().numpy()
    return [Moments(mean[n], None if std is None else std[n]) for n in range(len(images))]


def _is_finite(moments: Moments) -> bool:
    return all(part is None or bool(np.isfinite(part).all()) for part in (moments.mean, moments.std))
