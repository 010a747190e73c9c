"""The one pair of functions between uint8 pixels and the networks' float32. Imports torch."""

import numpy as np
import torch


def to_float(image: np.ndarray) -> torch.Tensor:
    """Convert uint8 pixels to what the networks take.

    Args:
        image: (H, W, C) or (B, H, W, C) uint8.

    Returns:
        (C, H, W) or (B, C, H, W) float32 in [-1, 1], contiguous.

    Raises:
        ValueError: another dtype or rank.
    """
    if image.dtype != np.uint8 or image.ndim not in (3, 4):
        raise ValueError(f"expected uint8 (H, W, C) or (B, H, W, C), got {image.dtype} {image.shape}")
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, -3)))
    return x.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Convert the networks' output to uint8 pixels: round((x + 1) * 127.5), clamped to 0..255.

    Args:
        x: (C, H, W) or (B, C, H, W) float, nominally in [-1, 1].

    Returns:
        (H, W, C) or (B, H, W, C) uint8.

    Raises:
        ValueError: a value that is not finite, or another rank.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"expected (C, H, W) or (B, C, H, W), got {tuple(x.shape)}")
    x = x.detach().to(torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the image holds values that are not finite")
    pixels = ((x + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()
    return np.ascontiguousarray(np.moveaxis(pixels, -3, -1))


def round_to_8_bit(x: torch.Tensor) -> torch.Tensor:
    """Round float pixels in [-1, 1] to the 256 values that uint8 pixels have there, clamped; no gradient passes."""
    return ((x.detach() + 1.0) * 127.5).round().clamp(0, 255) / 127.5 - 1.0


def middle(image: np.ndarray, f: int, side: int) -> np.ndarray:
    """Cut the middle out of an image, at most `side` pixels a side, multiples of f; empty where a side is below f.

    Args:
        image: (H, W, C).
        f: downsampling factor.
        side: pixels, at least f.
    """
    height, width = (min(side // f * f, length // f * f) for length in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
