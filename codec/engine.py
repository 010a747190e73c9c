"""Runs a model's network on images of any size: which precision, whole or tiled, and what to do when that fails.

    image (H, W, 3) uint8 -> encode -> z, raw (D, h, w) float32 -> decode -> image
                             VQ: encode_for_coder -> codebook indices (C, h, w) int32 -> decode

What decides about tiles is the size of the image and the machine, never what happens to be free at the moment: the
two ways differ in the last bits, and encoding twice must give the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import fast, memory, tiled
from codec.errors import ModelError, NonFiniteError, UsageError, ran_out_of_memory
from codec.latent_model import CodebookModel, LatentModel, Posterior, decoder_id, latent_model, load_network
from codec.pixels import to_float, to_uint8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
# Of the device's memory: beyond the first share an image goes through in tiles, which use up to the second. On a CPU
# tiles take no longer than the whole.
_WHOLE_SHARE = {"cpu": 0.2, "cuda": 0.5}
_TILED_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a network runs.

    Attributes:
        device: a torch device, or "auto": the first GPU where there is one.
        dtype: "bfloat16", "float16", "float32", or "auto": bfloat16 where the hardware computes in it, else float32.
        compile: with torch.compile; the first image of each size takes long.
        memory_bytes: what the network may take for one image, in tiles if need be; 0 = 40 % of the device's memory, and
            tiles from 20 % on (50 % on a GPU).
    """

    device: str = AUTO
    dtype: str = AUTO
    compile: bool = False
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (AUTO, *DTYPES):
            raise UsageError(f"dtype {self.dtype}, expected one of {AUTO} {' '.join(DTYPES)}")


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that a user's word stands for; "auto" is this rank's GPU, or the CPU.

    Raises:
        UsageError: there is no such device.
    """
    if name == AUTO:
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank % n_gpus) if n_gpus else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exception:  # what torch raises for devices that it does not have
        raise UsageError(f"device {name}: {exception}") from exception
    return device


@dataclass
class Engine:
    """One network, ready to encode and decode images one by one.

    Attributes:
        config: how the network runs.
        device: where.
        dtype: what it computes in; its weights stay in float32.
        model: its adapter. Accelerated: for inference only.
        decoder_id: of the weights as they were loaded, 16 hex digits.
        notes: takes what a user should hear, a line each.
    """

    config: EngineConfig
    device: torch.device
    dtype: torch.dtype
    model: LatentModel
    decoder_id: str
    notes: Callable[[str], None]

    @classmethod
    def load(
        cls, folder: Path, config: EngineConfig, local_rank: int = 0, notes: Callable[[str], None] = lambda _: None
    ) -> "Engine":
        """Load the network of a model folder; see `Engine`.

        Raises:
            ModelError: the folder or its weights are missing or damaged, or its class is not supported.
            UsageError: there is no such device, or it does not compute in the type that was asked for.
        """
        device = pick_device(config.device, local_rank)
        dtype = fast.best_dtype(device) if config.dtype == AUTO else DTYPES[config.dtype]
        if dtype == torch.float16 and device.type == "cpu":
            raise UsageError("dtype float16 is for GPUs; on a CPU use bfloat16 or float32")
        network = load_network(folder).requires_grad_(False)
        its_id = decoder_id(network)
        model = latent_model(fast.accelerate(network.to(device), dtype, compile=config.compile))
        return cls(config, device, dtype, model, its_id, notes)

    @property
    def budget_bytes(self) -> int:
        """What the network may take for one image."""
        return self.config.memory_bytes or int(_TILED_SHARE * memory.total(self.device))

    def fits(self, height: int, width: int, what: memory.What) -> bool:
        """Whether an image of height x width pixels goes through whole."""
        share = _WHOLE_SHARE.get(self.device.type, _TILED_SHARE)
        most_bytes = self.config.memory_bytes or int(share * memory.total(self.device))
        return memory.estimate(self.model, height, width, what, tiled=False, dtype=self.dtype) <= most_bytes

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Return the raw latents of an image, the posterior's mean.

        Args:
            image: (H, W, 3) uint8; padded right and bottom by edge pixels to a multiple of f.

        Returns:
            (D, h, w) float32.

        Raises:
            NonFiniteError: even in float32 the latents are not finite.
        """
        height, width = image.shape[:2]

        def in_tiles(dtype: torch.dtype) -> np.ndarray:
            return tiled.encode(self.model, image, budget_bytes=self.budget_bytes, dtype=dtype)

        if not self.fits(height, width, "encode"):
            return self._careful("encode", None, in_tiles)
        return self._careful("encode", lambda model: _encode_whole(model, image, self.device), in_tiles)

    def encode_for_coder(self, image: np.ndarray) -> np.ndarray:
        """Return what `codec.coding.Coder` takes: the raw latents of an image, see `encode`.

        Of a VQModel its codebook indices instead, (1, h, w) int32, whatever the type that its encoder computes in
        found in float32; of a model with several maps of indices their planes, (C, h, w), see `codec.index_maps`.
        """
        z = self.encode(image)
        return self.indices(z) if isinstance(self.model, CodebookModel) else z

    def indices(self, z: np.ndarray) -> np.ndarray:
        """Return the codebook indices, (C, h, w) int32, that raw latents of a VQ model become, (D, h, w) float32."""
        assert isinstance(self.model, CodebookModel), "the others have none"
        with torch.inference_mode():
            indices: np.ndarray = self.model.quantise(torch.from_numpy(z)[None].to(self.device)).cpu().numpy()
        return indices.astype(np.int32).reshape(-1, *z.shape[1:])  # the batch of one goes, or is the only plane

    def posterior(self, image: np.ndarray) -> Posterior:
        """Return the raw posterior of an image that goes through whole, see `fits`: neither tiles nor second tries.

        Args:
            image: (H, W, 3) uint8; padded as by `encode`.

        Returns:
            (1, D, h, w) each, on the engine's device; no variance where the family has none.
        """
        with torch.inference_mode():
            return _posterior_whole(self.model, image, self.device)

    def decode(
        self, z: np.ndarray, height: int, width: int, region: tuple[int, int, int, int] | None = None
    ) -> np.ndarray:
        """Return the image of raw latents.

        Args:
            z: (D, h, w) float32, or of a VQ model the indices of `encode_for_coder`; its raw latents are quantised.
            height: pixels of the image that was encoded.
            width: pixels.
            region: (left, top, width, height) in pixels, inside the image; None = all of it.

        Returns:
            (H, W, 3) uint8, or the region's size.

        Raises:
            NonFiniteError: even in float32 the image is not finite.
        """
        z = self._vectors(self.model, z) if isinstance(self.model, CodebookModel) else z

        def in_tiles(dtype: torch.dtype) -> np.ndarray:
            return tiled.decode(
                self.model, z, height, width, region=region, budget_bytes=self.budget_bytes, dtype=dtype
            )

        local = region is not None and self.model.receptive_field is not None
        if local or not self.fits(height, width, "decode"):
            return self._careful("decode", None, in_tiles)
        return self._careful(
            "decode", lambda model: _crop(_decode_whole(model, z, height, width, self.device), region), in_tiles
        )

    def _vectors(self, model: CodebookModel, z: np.ndarray) -> np.ndarray:
        indices = z if np.issubdtype(z.dtype, np.integer) else self.indices(z)
        batch = torch.from_numpy(indices.astype(np.int64)).to(self.device)
        with torch.inference_mode():
            z_q: np.ndarray = model.vectors(batch if len(model.maps) == 1 else batch[None])[0].cpu().numpy()
        return z_q

    def _careful(
        self,
        verb: str,
        whole: Callable[[LatentModel], np.ndarray] | None,
        in_tiles: Callable[[torch.dtype], np.ndarray],
    ) -> np.ndarray:
        """Run whole or in tiles; in tiles after running out of memory, in float32 after numbers beyond the type."""
        with torch.inference_mode():
            try:
                if whole is not None:
                    try:
                        return whole(self.model)
                    except (MemoryError, RuntimeError) as exception:
                        if not ran_out_of_memory(exception):
                            raise
                    self.notes(f"out of memory: {verb} again in tiles; the last bits of the result may differ")
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
                return in_tiles(self.dtype)
            except NonFiniteError:
                if self.dtype == torch.float32:
                    raise
                self.notes(f"{verb}: numbers beyond {self._dtype_name}; done again in float32")
                try:
                    return in_tiles(torch.float32)
                except ModelError:  # a network that cannot be run in stripes
                    if whole is None:
                        raise
                    return whole(latent_model(fast.plain(self.model.network)))  # other images may be in the other

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def describe(self) -> str:
        """Return where and in which type the network runs, for the user."""
        told = self.description()
        return f"on {told['device']}, {told['dtype']}{', compiled' if told['compiled'] else ''}"

    def description(self) -> dict[str, Any]:
        """Return device and type as plain JSON values."""
        name = str(self.device)
        if self.device.type == "cuda":
            name = f"{name} ({torch.cuda.get_device_name(self.device)})"
        return {"device": name, "dtype": self._dtype_name, "compiled": self.config.compile}


def _posterior_whole(model: LatentModel, image: np.ndarray, device: torch.device) -> Posterior:
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % model.f), (0, -width % model.f), (0, 0)), mode="edge")
    return model.encode(to_float(padded)[None].to(device))


def _encode_whole(model: LatentModel, image: np.ndarray, device: torch.device) -> np.ndarray:
    z: np.ndarray = _posterior_whole(model, image, device).mean[0].float().cpu().numpy()
    if not np.isfinite(z).all():
        raise NonFiniteError("the latents are not finite")
    return z


def _decode_whole(model: LatentModel, z: np.ndarray, height: int, width: int, device: torch.device) -> np.ndarray:
    decode = model.decode_vectors if isinstance(model, CodebookModel) else model.decode
    x_hat = decode(torch.from_numpy(z)[None].to(device))[0]
    if not bool(torch.isfinite(x_hat).all()):
        raise NonFiniteError("the image is not finite")
    return np.ascontiguousarray(to_uint8(x_hat)[:height, :width])


def _crop(image: np.ndarray, region: tuple[int, int, int, int] | None) -> np.ndarray:
    if region is None:
        return image
    left, top, width, height = region
    return np.ascontiguousarray(image[top : top + height, left : left + width])
