"""Models for a rate-distortion run: those of the codec, and any other diffusers autoencoder with tables fitted here.

    folder with codec.json -> Codec
    folder without         -> training images -> codec.adopt -> tables in memory -> Codec; the folder is only read

Entry: `load_models`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from codec import images, model_folder
from codec.adopt import adopt
from codec.coding import Settings
from codec.console import error, progress, stderr
from codec.engine import EngineConfig, pick_device
from codec.errors import ImageError, ModelError, UsageError
from codec.files import Source
from codec.latent_model import load_latent_model
from codec.launch import Launch
from codec.model_folder import ModelFolder
from codec.runtime import Codec

DEFAULT_FIT_IMAGES = 200


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What tables are fitted to.

    Attributes:
        sources: training images; empty = none were given.
        test: the images that will be measured; none of them may be among `sources`.
        n_images: how many of the sources are used, drawn with a fixed seed.
    """

    sources: Sequence[Source] = ()
    test: Sequence[Source] = ()
    n_images: int = DEFAULT_FIT_IMAGES
    _chosen: list[Source] = field(default_factory=list, init=False, repr=False)

    def chosen(self) -> list[Source]:
        """Return the images to fit to, in random order.

        Raises:
            UsageError: one of them is a test image: the same file, or another one with the same bytes.
        """
        if not self._chosen:
            tested = {source.path.resolve() for source in self.test}
            for source in self.sources:
                if source.path.resolve() in tested:
                    raise UsageError(f"--fit-images: {source.path} is one of the images to measure")
            order = np.random.default_rng(0).permutation(len(self.sources))[: self.n_images]
            chosen = [self.sources[index] for index in order]
            digests = {_digest(source.path) for source in self.test}
            for source in chosen:
                if _digest(source.path) in digests - {""}:
                    raise UsageError(f"--fit-images: {source.path} has the bytes of one of the images to measure")
            self._chosen.extend(chosen)
        return self._chosen


class ForeignCodec(Codec):
    """A `Codec` whose tables were fitted for this run."""

    fitted: dict[str, Any]

    def description(self) -> dict[str, Any]:
        """Return what `Codec.description` does, and what the tables were fitted to."""
        return {**super().description(), "tables": self.fitted}


def load_models(
    names: Sequence[Path],
    config: EngineConfig,
    settings: Settings,
    fitting: Fitting,
    launch: Launch,
    notes: Callable[[str], None] = lambda _: None,
) -> list[Codec]:
    """Load the models of a run.

    Args:
        names: folders, or names of models that `codec models` lists.
        config: how networks run.
        settings: how images are coded.
        fitting: for autoencoders without a codec of their own.
        launch: the first process fits, for all.
        notes: takes what a user should hear, a line each.

    Raises:
        ModelError: missing, damaged, or of a class that is not supported.
        UsageError: tables must be fitted and there are no images for that.
    """
    codecs = []
    for name in names:
        folder = model_folder.resolve(name)
        if not model_folder.is_model_folder(folder) and model_folder.is_model_folder(folder / "vae"):
            folder = folder / "vae"
        how: dict[str, Any] = {"dtype": config.dtype, "local_rank": launch.local, "settings": settings, "notes": notes}
        if model_folder.is_model_folder(folder):
            codecs.append(Codec.load(folder, config.device, **how))
        else:
            tables, fitted = _fitted(folder, config, fitting, launch)
            codec = ForeignCodec.load(tables, config.device, **how)
            assert isinstance(codec, ForeignCodec)
            codec.fitted = fitted
            codecs.append(codec)
    return codecs


def _fitted(folder: Path, config: EngineConfig, fitting: Fitting, launch: Launch) -> tuple[ModelFolder, dict[str, Any]]:
    """Return tables for a foreign autoencoder and what they were fitted to, the same on every rank."""
    found: tuple[ModelFolder, dict[str, Any]] | None = None
    problem: tuple[bool, str] | None = None  # whether the model is to blame, and why
    if launch.index == 0:
        try:
            found = _fit(folder, config, fitting, launch)
        except (ModelError, UsageError) as exception:
            problem = isinstance(exception, ModelError), str(exception)
    found, problem = launch.gather((found, problem))[0]
    if problem is not None:
        raise (ModelError if problem[0] else UsageError)(problem[1])
    assert found is not None
    return found


def _fit(folder: Path, config: EngineConfig, fitting: Fitting, launch: Launch) -> tuple[ModelFolder, dict[str, Any]]:
    load_latent_model(folder)  # a folder that cannot be loaded is that, with images or without
    if not fitting.sources:
        raise UsageError(
            f"{folder}: no codec.json in it, so entropy tables must be fitted to its latents: "
            "give a folder of training images with --fit-images"
        )
    chosen = fitting.chosen()
    digest = hashlib.sha256()
    used: list[str] = []

    def read() -> Iterator[np.ndarray]:
        with progress(disable=not stderr.is_terminal) as bar:
            for source in bar.track(chosen, description="fit tables"):
                try:
                    image = images.load(source.path)
                except ImageError as exception:
                    error(f"{exception} (left out of the tables)")
                    continue
                digest.update(f"{image.shape}".encode() + image.tobytes())
                used.append(str(source.relative))
                yield image

    tables = adopt(folder, read(), len(chosen), pick_device(config.device, launch.local))
    fitted = {
        "fitted_to": "training images, for this run; the folder has no codec.json and was only read",
        "n_images": len(used),
        "sha256": digest.hexdigest(),
        "sha256_of": "shape and pixels of these images in this order",
    }
    return replace(tables, info={**tables.info, "tables": fitted}), fitted


def _digest(path: Path) -> str:
    """Return the hash of a file's bytes; "" where it cannot be read, which is said where it is used."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
