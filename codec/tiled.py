"""Encode and decode an image of any size in bounded memory; the result equals that of the whole image. Imports torch.

    (H, W, 3) uint8 -> stripes -> encoder -> raw latents (D, h, w) float32 -> decoder -> stripes -> (H, W, 3) uint8

Neither the image nor any other map of 3 channels is ever whole in float. See `memory` for what it needs.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny

from codec import memory, plan, tiled_kl, tiled_tiny
from codec.errors import ModelError, NonFiniteError
from codec.latent_model import LatentModel
from codec.pixels import to_float, to_uint8
from codec.rows import KL_STRIPE_BYTES, TINY_STRIPE_BYTES, Convolution, Rows, Stripes
from codec.two_level import SCALE, TwoLevelModel

Region = tuple[int, int, int, int]
"""(left, top, width, height) in pixels."""


@torch.inference_mode()
def encode(
    model: LatentModel,
    image: np.ndarray,
    *,
    budget_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    stripe_rows: int | None = None,
) -> np.ndarray:
    """Return the raw latents of an image, the posterior's mean; of a VQModel, before they are quantised.

    Args:
        model: its network may be of any float type and on any device.
        image: (H, W, 3) uint8; padded right and bottom by edge pixels to a multiple of f.
        budget_bytes: what may be used beyond the loaded network, if it is possible with that (`memory.estimate`); with
            less, more is computed twice; the last bits may differ. None: as much as is fastest.
        dtype: what to compute in, but for the first and the last layers; None: the type of the network's weights.
        stripe_rows: rows of a piece of each map; None: by size. For tests.

    Returns:
        (D, h, w) float32.

    Raises:
        ValueError: another dtype or rank, or an empty image.
        ModelError: the network has a part that cannot be run in stripes.
        NonFiniteError: the latents are not finite.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    f = model.f
    h, w = -(-image.shape[0] // f), -(-image.shape[1] // f)
    z = np.empty((model.channels, h, w), np.float32)
    stripes = _stripes(model, dtype, stripe_rows)
    top = 0
    for piece in _encoded(model, image, stripes, budget_bytes):
        mean = piece[0, : model.channels].float()
        if not bool(torch.isfinite(mean).all()):
            raise NonFiniteError(f"latents that are not finite in {_name(stripes)}")
        z[:, top : top + mean.shape[1]] = mean.cpu().numpy()
        top += mean.shape[1]
    assert top == h, f"{top} rows of latents, not {h}"
    return z


@torch.inference_mode()
def decode(
    model: LatentModel,
    z: np.ndarray,
    height: int,
    width: int,
    *,
    region: Region | None = None,
    budget_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    stripe_rows: int | None = None,
) -> np.ndarray:
    """Decode raw latents to the pixels of the whole image or of a region of it.

    Args:
        model: its network may be of any float type and on any device.
        z: (D, h, w) float32, h = ceil(height / f), w = ceil(width / f); of a VQModel codebook vectors, which are not
            quantised again.
        height: H of the image.
        width: W of the image.
        region: (left, top, width, height); None: all of it. An `AutoencoderTiny` decodes only what the region needs;
            the others decode the whole image, whose statistics every pixel depends on.
        budget_bytes: what may be used beyond the loaded network, if it is possible with that (`memory.estimate`); with
            less, more is computed twice; the last bits may differ. None: as much as is fastest.
        dtype: what to compute in, but for the first and the last layers; None: the type of the network's weights.
        stripe_rows: rows of a piece of each map; None: by size. For tests.

    Returns:
        (H, W, 3) uint8, or the region's height and width.

    Raises:
        ValueError: latents or a region that do not fit the size.
        ModelError: the network has a part that cannot be run in stripes.
        NonFiniteError: the image is not finite; nothing is returned.
    """
    left, top, n_columns, n_rows = region or (0, 0, width, height)
    inside = min(left, top) >= 0 and min(n_columns, n_rows) > 0 and left + n_columns <= width and top + n_rows <= height
    if not inside:
        raise ValueError(f"region {region} is not inside an image of {width} x {height}")
    grid = (model.channels, -(-height // model.f), -(-width // model.f))
    if z.shape != grid:
        raise ValueError(f"latents {z.shape}, expected {grid} for an image of {width} x {height}")
    image = np.empty((n_rows, n_columns, 3), np.uint8)
    stripes = _stripes(model, dtype, stripe_rows)
    first_row, first_column, pieces = _decoded(model, z, (left, top, n_columns, n_rows), stripes, budget_bytes)
    columns = slice(left - first_column, left - first_column + n_columns)
    at = first_row - top  # row of the region where the next piece begins
    for piece in pieces:
        low, high = max(at, 0), min(at + piece.shape[2], n_rows)
        if low < high:
            x_hat = piece[0, :, low - at : high - at, columns].float()
            if not bool(torch.isfinite(x_hat).all()):
                raise NonFiniteError(f"an image that is not finite in {_name(stripes)}")
            image[low:high] = to_uint8(x_hat)
        at += piece.shape[2]
        if at >= n_rows:
            break
    assert at >= n_rows, f"{at} rows of {n_rows}"
    return image


def _encoded(model: LatentModel, image: np.ndarray, stripes: Stripes, budget_bytes: int | None) -> Rows:
    """Return the rows of the moments (KL) or the latents (Tiny) of an image."""
    network: Any = model.network
    height, width = (-(-side // model.f) * model.f for side in image.shape[:2])
    if isinstance(model, TwoLevelModel):  # beyond the fine level's factor maps are small, and whole
        steps = _steps(model.f // SCALE, network.encoder, height * width, stripes, budget_bytes)
        features = torch.cat(list(tiled_kl.run(steps, _pixels(image, model, stripes), height, stripes)), dim=2)
        return iter([model.latents(features.to(next(network.parameters()).dtype))])
    if isinstance(network, plan.CLASSES):
        steps = _steps(model.f, network.encoder, height * width, stripes, budget_bytes)
        rows = tiled_kl.run(steps, _pixels(image, model, stripes), height, stripes)
        if network.quant_conv is not None:
            rows = Convolution(network.quant_conv, stripes.exact).stream(rows, height // model.f)
        return rows
    pixels = _pixels(image, model, stripes)
    return tiled_tiny.run(_layers(network, "encoder"), (x.add_(1).div_(2) for x in pixels), height, stripes)


def _decoded(
    model: LatentModel, z: np.ndarray, region: Region, stripes: Stripes, budget_bytes: int | None
) -> tuple[int, int, Rows]:
    """Return the first row and column, and the rows, of an image that holds the region."""
    network: Any = model.network
    f = model.f
    if isinstance(model, TwoLevelModel):
        steps = _steps(f // SCALE, network.decoder, z[0].size * f * f, stripes, budget_bytes)
        joined = model.joined(_tensor(z, model).to(next(network.parameters()).dtype))
        return 0, 0, tiled_kl.run(steps, iter([joined]), joined.shape[2], stripes)
    if isinstance(network, plan.CLASSES):
        steps = _steps(f, network.decoder, z[0].size * f * f, stripes, budget_bytes)
        rows = iter([_tensor(z, model)])
        if network.post_quant_conv is not None:
            rows = Convolution(network.post_quant_conv, stripes.exact).stream(rows, z.shape[1])
        return 0, 0, tiled_kl.run(steps, rows, z.shape[1], stripes)
    layers = _layers(network, "decoder")
    left, top, width, height = region
    (low, high), (start, stop) = (tiled_tiny.seen(layers, at, at + n) for at, n in ((top, height), (left, width)))
    low, high, start, stop = max(low, 0), min(high, z.shape[1]), max(start, 0), min(stop, z.shape[2])
    needed = _tensor(z[:, low:high, start:stop], model)
    needed = torch.tanh(needed / 3) * 3  # as DecoderTiny does before its layers
    rows = tiled_tiny.run(layers, iter([needed]), high - low, stripes)
    return low * f, start * f, (x.mul_(2).sub_(1) for x in rows)


def _steps(
    f: int, coder: torch.nn.Module, n_pixels: int, stripes: Stripes, budget_bytes: int | None
) -> list[plan.Step]:
    most = memory.for_maps(budget_bytes, n_pixels)
    return plan.fit(plan.read(coder, f), n_pixels, stripes.dtype.itemsize, most)


def _layers(network: torch.nn.Module, part: str) -> list[torch.nn.Module]:
    if not isinstance(network, AutoencoderTiny):
        name = type(network).__name__
        raise ModelError(f"a {name} cannot be run in stripes, as an image beyond the memory or the dtype has to be")
    layers = list(getattr(network, part).layers)
    tiled_tiny.check(layers)
    return layers


def _pixels(image: np.ndarray, model: LatentModel, stripes: Stripes) -> Rows:
    """Return an image's rows as the network takes them, padded by edge pixels to a multiple of f."""
    height, width = image.shape[:2]
    n_rows = stripes.rows(width * 64 * stripes.dtype.itemsize)  # about the channels of the first feature map
    padded = height + -height % model.f
    device = next(model.network.parameters()).device
    for top in range(0, padded, n_rows):
        rows = np.minimum(np.arange(top, min(top + n_rows, padded)), height - 1)
        piece = np.pad(image[rows], ((0, 0), (0, -width % model.f), (0, 0)), mode="edge")
        yield to_float(piece)[None].to(device)


def _tensor(z: np.ndarray, model: LatentModel) -> torch.Tensor:
    device = next(model.network.parameters()).device
    x = torch.from_numpy(np.ascontiguousarray(z, dtype=np.float32))[None].to(device)
    return x.contiguous(memory_format=torch.channels_last)


def _stripes(model: LatentModel, dtype: torch.dtype | None, n_rows: int | None) -> Stripes:
    dtype = dtype or next(model.network.parameters()).dtype
    size_bytes = TINY_STRIPE_BYTES if isinstance(model.network, AutoencoderTiny) else KL_STRIPE_BYTES
    return Stripes(dtype=dtype, size_bytes=size_bytes, n_rows=n_rows)


def _name(stripes: Stripes) -> str:
    return str(stripes.dtype).removeprefix("torch.")
