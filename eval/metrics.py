"""Full-reference metrics of one pair of 8-bit RGB images.

Every function takes the image x and the reconstruction x_hat, both (H, W, 3) uint8 sRGB, and returns a float, or None
where the metric is not defined for so small an image. ValueError if shapes differ or the dtype is not uint8.
"""

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from eval.features import Distance


@dataclass(frozen=True)
class Metric:
    """How a metric is named and read."""

    key: str  # in the JSON
    label: str  # in tables and plots
    unit: str  # "" without one
    higher_is_better: bool
    digits: int  # after the decimal point, in tables


METRICS = (
    Metric("psnr", "PSNR", "dB", True, 2),
    Metric("ssim", "SSIM", "", True, 4),
    Metric("ms_ssim", "MS-SSIM", "", True, 4),
    Metric("ssimulacra2", "SSIMULACRA2", "", True, 1),
    Metric("lpips_sqz10", "lpips-sqz10", "", False, 3),
)

SETTINGS = {
    "psnr": "10 log10(255^2 / MSE), MSE over all pixels and channels of 8-bit RGB; null if infinite",
    "ssim": "pytorch-msssim ssim, RGB, data_range 255, window 11, sigma 1.5, float32; sides >= 11",
    "ms_ssim": "pytorch-msssim ms_ssim, RGB, data_range 255, 5 scales, window 11, sigma 1.5, float32; sides > 160",
    "ssimulacra2": "ssimulacra2 compute_ssimulacra2, sRGB; sides >= 8",
    "lpips_sqz10": "uncalibrated LPIPS, 7 slices of torchvision squeezenet1_0.features, sum over slices; sides >= 21",
}


def _check(x: np.ndarray, x_hat: np.ndarray) -> None:
    for image in (x, x_hat):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if x.shape != x_hat.shape:
        raise ValueError(f"image and reconstruction differ in shape: {x.shape} and {x_hat.shape}")


def _tensor(image: np.ndarray) -> "Tensor":
    import torch

    return torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]  # (1, 3, H, W) in [0, 255]


def psnr(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Return the PSNR in dB over all pixels and channels; inf for identical images."""
    _check(x, x_hat)
    mse = float(np.mean((x.astype(np.float64) - x_hat) ** 2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def ssim(x: np.ndarray, x_hat: np.ndarray) -> float | None:
    """Return pytorch-msssim's SSIM (mean over RGB); None below 11 pixels a side, its window."""
    _check(x, x_hat)
    if min(x.shape[:2]) < 11:
        return None
    from pytorch_msssim import ssim as function

    return float(function(_tensor(x), _tensor(x_hat), data_range=255))


def ms_ssim(x: np.ndarray, x_hat: np.ndarray) -> float | None:
    """Return pytorch-msssim's MS-SSIM with 5 scales; None if a side is not above 160 pixels, which these need."""
    _check(x, x_hat)
    if min(x.shape[:2]) <= 160:
        return None
    from pytorch_msssim import ms_ssim as function

    return float(function(_tensor(x), _tensor(x_hat), data_range=255))


def ssimulacra2(x: np.ndarray, x_hat: np.ndarray) -> float | None:
    """Return SSIMULACRA2: 100 identical, 90 visually lossless, below 10 very poor; None below 8 pixels a side.

    Costs about 0.3 s per 768x512 pair.
    """
    _check(x, x_hat)
    if min(x.shape[:2]) < 8:
        return None
    from ssimulacra2 import compute_ssimulacra2

    files = []
    for image in (x, x_hat):  # the package takes files only
        files.append(io.BytesIO())
        Image.fromarray(image).save(files[-1], "PPM")
    return float(compute_ssimulacra2(*files))


class Metrics:
    """All metrics of a pair.

    Args:
        features: the `lpips-sqz10` distance, on any device; None leaves that metric None.
    """

    def __init__(self, features: "Distance | None" = None) -> None:
        self.features = features

    def __call__(self, x: np.ndarray, x_hat: np.ndarray) -> dict[str, float | None]:
        """Return one value for each key of METRICS; None where a metric cannot be computed."""
        return {
            "psnr": psnr(x, x_hat),
            "ssim": ssim(x, x_hat),
            "ms_ssim": ms_ssim(x, x_hat),
            "ssimulacra2": ssimulacra2(x, x_hat),
            "lpips_sqz10": self._lpips(x, x_hat),
        }

    def _lpips(self, x: np.ndarray, x_hat: np.ndarray) -> float | None:
        if self.features is None:
            return None
        import torch

        from codec.pixels import to_float
        from eval.features import MIN_SIDE

        if min(x.shape[:2]) < MIN_SIDE:
            return None
        device = next(self.features.parameters()).device
        with torch.inference_mode():
            pair = [to_float(image)[None].to(device) for image in (x, x_hat)]
            return float(self.features(*pair))
