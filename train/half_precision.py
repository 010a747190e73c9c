"""Whether a network can run in float16: tried on real images and on extreme ones, not guessed.

    images, black, white, saturated noise -> encode, decode in float32 (largest activation, by module)
                                          -> the same in float16     (finite? PSNR between the two)

A GPU computes in float16 itself. A CPU may need a hundred times as long for it, so there it is emulated: weights and
what every module gives are rounded to float16, sums are float32, which is how float16 hardware adds too.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from codec import pixels
from codec.latent_model import LatentModel, latent_model
from codec.pixels import to_float
from eval.latent_fp16 import LARGEST, RISKY_SHARE, recording

MAX_IMAGES = 8
MAX_SIDE = 512  # pixels
_MAX_GRID_SIDE = 64  # latents; attention of a network of small f would take minutes on more
_LOWEST_PSNR_DB = 40.0  # float16 against float32; rounding to 8 bits alone gives 59
_EQUAL_DB = 120.0  # what stands for images that are equal


@dataclass(frozen=True, kw_only=True)
class Half:
    """What float16 does to a network. Plain values.

    Attributes:
        finite: whether float16 gave finite latents and images everywhere.
        largest: magnitude of the largest activation in float32.
        largest_at: the module that gave it.
        largest_on_images: the same on real images alone; 0 where there were none.
        psnr_db: between images of float16 and float32, mean over real images (over all where there were none); None
            where float16 was not finite.
        worst_psnr_db: the worst of all.
        n_images: real images.
        n_extremes: synthetic ones.
        how: "cuda", or "emulated".
    """

    finite: bool
    largest: float
    largest_at: str
    largest_on_images: float
    psnr_db: float | None
    worst_psnr_db: float | None
    n_images: int
    n_extremes: int
    how: str

    @property
    def verdict(self) -> str:
        """One of "safe", "imprecise", "at risk" (unusual images may overflow) and "overflows"."""
        if not self.finite:
            return "overflows"
        usual = self.largest_on_images if self.n_images else self.largest
        if usual > RISKY_SHARE * LARGEST:
            return "at risk"
        if self.psnr_db is None or self.psnr_db < _LOWEST_PSNR_DB:
            return "imprecise"
        return "safe"

    @property
    def force_upcast(self) -> bool:
        """What config.json has to say: whether pipelines shall decode in float32."""
        return self.verdict != "safe"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the verdict among them."""
        return {**asdict(self), "verdict": self.verdict}

    def describe(self) -> str:
        """Return one sentence with all figures."""
        if self.finite:
            assert self.psnr_db is not None
            assert self.worst_psnr_db is not None
            against = f"PSNR of float16 against float32 {self.psnr_db:.1f} dB, at worst {self.worst_psnr_db:.1f} dB"
        else:
            against = "in float16 it is not finite"
        how = "computed in float16 on a GPU" if self.how == "cuda" else "float16 emulated"
        return (
            f"{self.verdict}: largest activation {self.largest:.4g} of float16's {LARGEST:.0f}, at {self.largest_at}; "
            f"{against} ({self.n_images} images, {self.n_extremes} extremes, {how})"
        )


def from_json(document: dict[str, Any]) -> Half:
    """Return what `Half.to_json` described; raises TypeError or KeyError where it is something else."""
    return Half(**{name: document[name] for name in Half.__dataclass_fields__})


@torch.no_grad()
def measure_half(network: nn.Module, images: Sequence[np.ndarray] = ()) -> Half:
    """Run a network in float32 and in float16.

    Args:
        network: a diffusers autoencoder, float32, evaluation mode, its config with the scaling it shall have; wherever
            it lies.
        images: (H, W, C) uint8 each, real ones; the first 8 are used, of each at most 512 x 512 pixels from its middle.
            None: extremes alone.
    """
    model = latent_model(network)
    device = next(network.parameters()).device
    real = [middle(image, model.f) for image in images[:MAX_IMAGES]]
    extremes = _extremes(model, real[0].shape[2] if real else int(_config(network).in_channels))
    noise = model.denormalize(_normal_latents(model).to(device))
    on_cuda = device.type == "cuda"
    narrow = copy.deepcopy(network)
    if on_cuda:
        narrow.half()
    else:
        for tensor in (*narrow.parameters(), *narrow.buffers()):
            tensor.data = _rounded(tensor.data)
    finite, rows = True, []
    seen: dict[str, float] = {}
    largest_on_images = 0.0
    for n, picture in enumerate([*real, *extremes, None]):
        x = None if picture is None else to_float(picture)[None].to(device)
        with recording(network, name_of=str) as now:
            wide = _round_trip(model, x, noise)
        with _nothing() if on_cuda else _rounding(narrow):
            x_small = None if x is None else _cast(x, on_cuda)
            small = _round_trip(latent_model(narrow), x_small, _cast(noise, on_cuda))
        seen = {name: max(value, seen.get(name, 0.0)) for name, value in now.items()}
        largest_on_images = max(largest_on_images, *now.values()) if n < len(real) else largest_on_images
        finite &= bool(torch.isfinite(small).all())
        rows.append(_psnr(wide, small))
    worst_at = max(seen, key=lambda name: seen[name])
    usual = rows[: len(real)] or rows
    return Half(
        finite=finite,
        largest=seen[worst_at],
        largest_at=worst_at,
        largest_on_images=largest_on_images,
        psnr_db=float(np.mean(usual)) if finite else None,
        worst_psnr_db=float(min(rows)) if finite else None,
        n_images=len(real),
        n_extremes=len(extremes) + 1,
        how="cuda" if on_cuda else "emulated",
    )


def _round_trip(model: LatentModel, x: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor:
    """Return decode(encode(x)) in float32, or decode(z) where there is no x, in the type of the network."""
    if x is not None:
        z = model.encode(x).mean.to(x.dtype)
    return model.decode(z).float()


def _cast(tensor: torch.Tensor, on_cuda: bool) -> torch.Tensor:
    return tensor.half() if on_cuda else _rounded(tensor)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Round to what float16 can hold; beyond it is infinity."""
    return tensor.half().float() if tensor.is_floating_point() else tensor


@contextmanager
def _rounding(network: nn.Module) -> Iterator[None]:
    """Round what every module gives to float16 while the context lasts."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return _rounded(output) if isinstance(output, torch.Tensor) else output

    handles = [module.register_forward_hook(hook) for module in network.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _psnr(wide: torch.Tensor, small: torch.Tensor) -> float:
    error = float((wide.clamp(-1, 1) - small.clamp(-1, 1)).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return min(_EQUAL_DB, 10 * math.log10(4 / max(error, 1e-20)))


def middle(image: np.ndarray, f: int) -> np.ndarray:
    """Cut the middle out of an image, its sides multiples of f; one that is smaller than f is repeated."""
    rows, columns = (-(-f // side) if side < f else 1 for side in image.shape[:2])
    image = np.tile(image, (rows, columns, 1))
    return pixels.middle(image, f, min(MAX_SIDE, _MAX_GRID_SIDE * f))


def _extremes(model: LatentModel, channels: int) -> list[np.ndarray]:
    """Return black, white, and noise whose every value is 0 or 255."""
    side = max(min(MAX_SIDE, _MAX_GRID_SIDE * model.f) // 2 // model.f, 1) * model.f
    noise = np.random.default_rng(0).integers(2, size=(side, side, channels)) * 255
    return [np.full((side, side, channels), value, np.uint8) for value in (0, 255)] + [noise.astype(np.uint8)]


def _normal_latents(model: LatentModel) -> torch.Tensor:
    """Return what a sampler starts from: normalized latents that are nothing but noise."""
    return torch.randn((1, model.channels, 16, 16), generator=torch.Generator().manual_seed(0))


def _config(network: Any) -> Any:
    return network.config
