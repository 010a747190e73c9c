"""The codec as a Python object: `Codec.load(folder).encode(image) -> bytes`, `.decode(bytes) -> image`.

image (H, W, 3) uint8 -> pad to a multiple of f -> network -> raw latents -> indices -> payload -> file bytes
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import bitstream, model_folder, tables
from codec.errors import ModelError
from codec.latent_model import LatentModel, decoder_id, load_latent_model
from codec.model_folder import ModelFolder
from codec.pixels import to_float, to_uint8


class Codec:
    """One model, ready to encode and decode. Images are coded one by one, so batching can never change the bytes."""

    def __init__(self, folder: ModelFolder, model: LatentModel) -> None:
        """Join the torch-free part of a folder and its network; `load` does both."""
        if (folder.f, folder.channels) != (model.f, model.channels):
            raise ModelError(
                f"{folder.path}: codec.json says f {folder.f}, {folder.channels} channels; "
                f"the network has f {model.f}, {model.channels} channels"
            )
        self._folder = folder
        self._decoder_id = decoder_id(model.network)
        self.model = model
        self.device = next(model.network.parameters()).device

    @classmethod
    def load(cls, model: str | Path, device: str | torch.device = "cpu") -> "Codec":
        """Load a model folder.

        Args:
            model: a path, or the name of a model found as `codec models` lists them.
            device: where the network runs.

        Raises:
            ModelError: missing or damaged.
            UsageError: there is no such device.
        """
        folder = model_folder.read(model_folder.resolve(model))
        return cls(folder, load_latent_model(folder.path, device))

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
        return self._decoder_id

    def description(self) -> dict[str, Any]:
        """Return what a report should say about the model, as plain JSON values."""
        return {
            "name": self.name,
            "family": self._folder.info.get("family"),
            "f": self._folder.f,
            "latent_channels": self._folder.channels,
            "stream_id": self.stream_id,
            "decoder_id": self.decoder_id,
            "dtype": "float32",
            "device": str(self.device),
        }

    def encode(self, image: np.ndarray, quality: int = bitstream.DEFAULT_QUALITY) -> bytes:
        """Code one image into the bytes of a whole file (FORMAT.md).

        Args:
            image: (H, W, 3) uint8 sRGB; padded right and bottom by edge pixels to a multiple of f.
            quality: 0 (coarsest) .. 100 (finest).

        Raises:
            ValueError: another dtype, rank or quality.
            FormatError: larger than the format can hold.
        """
        return self.encode_many(image, [quality])[0]

    def encode_many(self, image: np.ndarray, qualities: Sequence[int]) -> list[bytes]:
        """Code one image at several qualities; the network runs once. See `encode`."""
        for quality in qualities:
            if not 0 <= quality <= 100:
                raise ValueError(f"quality {quality}, expected 0..100")
        z = self.latents(image)
        return [self._code(z, image.shape, quality) for quality in qualities]

    def latents(self, image: np.ndarray) -> np.ndarray:
        """Return the raw latents of one image: (H, W, 3) uint8 -> (D, h, w) float32, the posterior's mean."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        bitstream.check_size(width, height)
        f = self._folder.f
        padded = np.pad(image, ((0, -height % f), (0, -width % f), (0, 0)), mode="edge")
        with torch.inference_mode():
            posterior = self.model.encode(to_float(padded)[None].to(self.device))
        z: np.ndarray = posterior.mean[0].cpu().numpy()
        return z

    def _code(self, z: np.ndarray, shape: tuple[int, ...], quality: int) -> bytes:
        folder = self._folder
        indices = tables.to_indices(z, folder.mean, folder.step, quality)
        header = bitstream.Header(
            stream_id=folder.stream_id,
            decoder_id=self.decoder_id,
            quality=quality,
            width=shape[1],
            height=shape[0],
        )
        return bitstream.pack(header, folder.table_sets[folder.stream_id].encode(indices, quality))

    def indices(self, data: bytes) -> tuple[bitstream.Header, np.ndarray]:
        """Read header and integer latents, (D, h, w) int32, of a file; no network runs.

        Raises:
            FormatError: the bytes are damaged.
            ModelError: the file was made with a stream that this model does not know.
        """
        header, payload = bitstream.unpack(data)
        table_set = self._folder.table_sets.get(header.stream_id)
        if table_set is None:
            raise ModelError(
                f"made with another model: it needs stream {header.stream_id}, {self.name} has {self.stream_id}"
            )
        f = self._folder.f
        grid = (-(-header.height // f), -(-header.width // f))
        return header, table_set.decode(payload, grid, header.quality)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the bytes of a file to (H, W, 3) uint8, the size of the image that was encoded.

        Raises:
            FormatError: the bytes are damaged.
            ModelError: made with a stream that this model does not know.
        """
        header, indices = self.indices(data)
        z_q = tables.from_indices(indices, self._folder.mean, self._folder.step, header.quality)
        return self._pixels(z_q, header.height, header.width)

    def reconstruct(self, image: np.ndarray) -> np.ndarray:
        """Return the autoencoder's own reconstruction, latents not quantised: what no quality can exceed."""
        return self._pixels(self.latents(image), *image.shape[:2])

    def _pixels(self, z: np.ndarray, height: int, width: int) -> np.ndarray:
        with torch.inference_mode():
            x_hat = self.model.decode(torch.from_numpy(z)[None].to(self.device))
        return np.ascontiguousarray(to_uint8(x_hat[0])[:height, :width])
