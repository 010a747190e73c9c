"""The codec as a Python object: `Codec.load(folder).encode(image) -> bytes`, `.decode(bytes) -> image`.

    image (H, W, 3) uint8 -> Engine: network -> z, raw -> Coder: indices, payload, container -> file bytes, and back
                             VQ: codebook indices -> Coder: payload, container

And the same networks' speed for others: `accelerate(pipeline)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from codec import bitstream, fast, map_tables, model_folder, pictures
from codec.coding import Coder, Settings
from codec.engine import AUTO, Engine, EngineConfig
from codec.errors import ModelError
from codec.latent_model import CodebookModel, LatentModel
from codec.model_folder import ModelFolder
from codec.pictures import Picture
from codec.regions import Region

_PLACES = ("vae", "vqvae", "movq", "vqgan")  # what diffusers' pipelines call their autoencoders

Pipeline = TypeVar("Pipeline")


def accelerate(pipeline: Pipeline, dtype: torch.dtype | None = None, *, compile: bool = False) -> Pipeline:
    """Make the autoencoder of a diffusers pipeline fast, in place; see `codec.fast.accelerate`.

    What the pipeline sees of it stays: dtype, names and values of the weights, config, tiling and slicing.

    Args:
        pipeline: a pipeline with an autoencoder in `vae`, `vqvae`, `movq` or `vqgan`; or an autoencoder itself.
        dtype: what is computed in; None = bfloat16 where the hardware multiplies it, else float32.
        compile: see there.

    Returns:
        pipeline.

    Raises:
        ValueError: no autoencoder in it, one that cannot be accelerated, or a dtype that is not for its device.
    """
    network: Any = pipeline
    if not isinstance(pipeline, torch.nn.Module):
        found = [getattr(pipeline, name, None) for name in _PLACES]
        network = next((part for part in found if isinstance(part, torch.nn.Module)), None)
        if network is None:
            raise ValueError(f"{type(pipeline).__name__}: no autoencoder in it, expected one of {', '.join(_PLACES)}")
    fast.accelerate(network, dtype, compile=compile)
    return pipeline


class Codec:
    """One model, ready to encode and decode. Images are coded one by one, so batching can never change the bytes."""

    def __init__(self, folder: ModelFolder, engine: Engine, settings: Settings | None = None) -> None:
        """Join the torch-free part of a folder and its network; `load` does both.

        Args:
            folder: the torch-free part.
            engine: the network.
            settings: how images are coded when `encode` is not told; None = the defaults.
        """
        model = engine.model
        maps = model.maps if isinstance(model, CodebookModel) else ()
        if folder.maps != maps:
            says, has = map_tables.describe(folder.maps), map_tables.describe(maps)
            raise ModelError(f"{folder.path}: codec.json says {says}, the network has {has}: export or import it again")
        if (folder.f, folder.channels) != (model.f, model.channels):
            raise ModelError(
                f"{folder.path}: codec.json says f {folder.f}, {folder.channels} channels; "
                f"the network has f {model.f}, {model.channels} channels"
            )
        if folder.info.get("receptive_field", model.receptive_field) != model.receptive_field:
            raise ModelError(f"{folder.path}: codec.json says another receptive field than the network has")
        self._folder = folder
        self.engine = engine
        self.settings = settings or Settings()
        self.coder = Coder(folder, engine.decoder_id)

    @classmethod
    def load(
        cls,
        model: str | Path | ModelFolder | None = None,
        device: str | torch.device = AUTO,
        *,
        dtype: str = AUTO,
        compile: bool = False,
        memory_bytes: int = 0,
        local_rank: int = 0,
        settings: Settings | None = None,
        notes: Callable[[str], None] = lambda _: None,
    ) -> "Codec":
        """Load a model folder.

        Args:
            model: a path, the name of a model found as `codec models` lists them, or a folder that was read; None =
                the default model, see `codec.model_folder.resolve`.
            device: where the network runs; "auto" takes the first GPU, or else the CPU.
            dtype: see `codec.engine.EngineConfig`, as are the next two.
            compile: with torch.compile.
            memory_bytes: 0 = 40 % of the device's.
            local_rank: which GPU "auto" means.
            settings: how images are coded when `encode` is not told; None = the defaults.
            notes: takes what a user should hear while the network runs, a line each.

        Raises:
            ModelError: missing or damaged.
            UsageError: there is no such device, or it has no such type, or no default model.
        """
        folder = model if isinstance(model, ModelFolder) else model_folder.read(model_folder.resolve(model))
        config = EngineConfig(device=str(device), dtype=dtype, compile=compile, memory_bytes=memory_bytes)
        return cls(folder, Engine.load(folder.path, config, local_rank, notes), settings)

    @property
    def model(self) -> LatentModel:
        """The network's adapter."""
        return self.engine.model

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.engine.device

    @property
    def name(self) -> str:
        """Short name of the model."""
        return self._folder.name

    @property
    def folder(self) -> Path:
        """The model folder, which is a diffusers folder too."""
        return self._folder.path

    @property
    def stream_id(self) -> str:
        """Stream id of new files, 16 hex digits."""
        return self._folder.stream_id

    @property
    def decoder_id(self) -> str:
        """Decoder id of the loaded weights, 16 hex digits; codec.json's goes stale when somebody changes them."""
        return self.engine.decoder_id

    @property
    def has_quality(self) -> bool:
        """Whether a quality can be asked for; that of a VQ model is its own."""
        return not self._folder.maps

    def description(self) -> dict[str, Any]:
        """Return what a report should say about the model, as plain JSON values."""
        return {
            "name": self.name,
            "family": self._folder.info.get("family"),
            "f": self._folder.f,
            "latent_channels": self._folder.channels,
            **({"effort": self.settings.effort} if self.has_quality else model_folder.state_maps(self._folder.maps)),
            "stream_id": self.stream_id,
            "decoder_id": self.decoder_id,
            **self.engine.description(),
        }

    def encode(
        self, image: np.ndarray | Picture, quality: int | None = None, settings: Settings | None = None
    ) -> bytes:
        """Code one image into the bytes of a whole file (FORMAT.md).

        Args:
            image: (H, W, 3) uint8 sRGB, padded right and bottom by edge pixels to a multiple of f; or a picture, whose
                alpha, profile and metadata are kept.
            quality: 0 (coarsest) .. 100 (finest); None = that of the settings, or of a VQ model its own.
            settings: quality, effort, tiles and entropy modes; None = the codec's own.

        Raises:
            ValueError: another dtype, rank or quality, or any quality of a VQ model.
            FormatError: larger than the format can hold.
        """
        return self.encode_many(image, [quality], settings)[0]

    def encode_many(
        self, image: np.ndarray | Picture, qualities: Sequence[int | None], settings: Settings | None = None
    ) -> list[bytes]:
        """Code one image at several qualities; the network runs once. See `encode`."""
        settings = settings or self.settings
        all_settings = [settings if quality is None else replace(settings, quality=quality) for quality in qualities]
        if not self.has_quality and any(quality is not None for quality in qualities):
            raise ValueError(f"{self.name} is a VQ model: its quality is its own, none can be asked for")
        picture = image if isinstance(image, Picture) else Picture(pixels=_checked(image))
        height, width = picture.pixels.shape[:2]
        bitstream.check_size(width, height)
        z = self.engine.encode_for_coder(_checked(picture.pixels))
        chunks = pictures.to_chunks(picture)
        return [self.coder.code(z, width, height, how, chunks).data for how in all_settings]

    def latents(self, image: np.ndarray) -> np.ndarray:
        """Return the raw latents of one image: (H, W, 3) uint8 -> (D, h, w) float32, the posterior's mean.

        Those of a VQ model are not quantised yet.
        """
        height, width = _checked(image).shape[:2]
        bitstream.check_size(width, height)
        return self.engine.encode(image)

    def indices(self, data: bytes) -> tuple[bitstream.Header, np.ndarray]:
        """Read header and integer latents, (D, h, w) int32, of a file, every sum checked; no network runs.

        Of a VQ model they are its codebook indices, (C, h, w), see `codec.index_maps`.

        Raises:
            FormatError: the bytes are damaged.
            ModelError: the file was made with a stream that this model does not know.
        """
        contents = bitstream.unpack(data)
        return contents.header, self.coder.read(contents)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the bytes of a file to its pixels, (H, W, 3) uint8, the size of the image that was encoded.

        Raises:
            FormatError: the bytes are damaged.
            ModelError: made with a stream that this model does not know.
        """
        header, indices = self.indices(data)
        return self.engine.decode(self.coder.dequantise(header, indices), header.height, header.width)

    def decode_picture(self, data: bytes, region: Region | None = None) -> Picture:
        """Decode the bytes of a file with its alpha, profile and metadata; see `decode`.

        Args:
            data: the file.
            region: what of it; None = all.

        Raises:
            ValueError: the region is not inside the image.
        """
        contents = bitstream.unpack(data)
        header, wanted = contents.header, None
        if region is not None:
            region.check(header.width, header.height)
            wanted = region.latents(header, self.model.receptive_field)
        z = self.coder.dequantise(header, self.coder.read(contents, wanted))
        box = None if region is None else region.box
        return pictures.from_chunks(
            self.engine.decode(z, header.height, header.width, box), contents.chunks, header, box
        )

    def rescue(self, data: bytes) -> tuple[Picture, list[str]]:
        """Decode what is whole of a damaged file; return it and what is lost, a line each. See `Coder.rescue`."""
        rescued = self.coder.rescue(data)
        header, damage = rescued.header, [*rescued.damage, *rescued.losses]
        pixels = self.engine.decode(rescued.z, header.height, header.width)
        return pictures.from_chunks(pixels, rescued.chunks, header, damage=damage), damage

    def reconstruct(self, image: np.ndarray) -> np.ndarray:
        """Return the autoencoder's own reconstruction, latents not quantised: what no quality can exceed.

        Latents of a VQ model are quantised: it is what its files decode to.
        """
        return self.engine.decode(self.latents(image), *image.shape[:2])


def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    return image
