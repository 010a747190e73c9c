"""What a decoder does to latents that are not exactly the encoder's: noise, scale and rotation, ten round trips.

Every probe takes a `LatentModel` and one image, x (1, 3, H, W) in [-1, 1], and returns plain numbers. PSNR is of 8-bit
rounded images. Nothing here is random unless a generator is passed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from codec.errors import NonFiniteError
from codec.latent_model import LatentModel, Posterior
from codec.latent_transform import LatentTransform
from codec.pixels import round_to_8_bit, to_uint8
from eval.metrics import psnr

_BATCH_PIXELS = 4 * 256 * 256
SCALES = {"half": 0.5, "three_quarters": 0.75}
TURNS = {"quarter_turn": 1, "half_turn": 2, "three_quarter_turn": 3}


def encode(model: LatentModel, x: torch.Tensor) -> Posterior:
    """Return the posterior of x.

    Raises:
        NonFiniteError: it holds values that are not finite.
    """
    posterior = model.encode(x)
    for part in (posterior.mean, posterior.logvar):
        if part is not None and not bool(torch.isfinite(part).all()):
            raise NonFiniteError("the latents are not finite")
    return posterior


def decode(model: LatentModel, z: torch.Tensor) -> torch.Tensor:
    """Return the images, (B, 3, H, W) float32, of raw latents (B, D, h, w), a few at a time.

    Raises:
        NonFiniteError: they hold values that are not finite.
    """
    n_at_once = max(1, _BATCH_PIXELS // (z.shape[-2] * z.shape[-1] * model.f**2))
    x_hat = torch.cat([model.decode(part).float() for part in torch.split(z, n_at_once)])
    if not bool(torch.isfinite(x_hat).all()):
        raise NonFiniteError("the decoded image is not finite")
    return x_hat


def psnr_db(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Return the PSNR in dB of two (1, 3, H, W), rounded to 8 bits; inf when they are equal."""
    return psnr(to_uint8(x[0]), to_uint8(x_hat[0]))


def noise_curve(
    model: LatentModel, x: torch.Tensor, z: torch.Tensor, sigmas: Sequence[float], rng: np.random.Generator
) -> list[float]:
    """Return the PSNR in dB of decode(z + noise) against x at each strength.

    Args:
        model: the autoencoder.
        x: the image.
        z: (1, D, h, w) raw latents of x.
        sigmas: deviations of the noise on normalized latents, with the model's scaling_factor.
        rng: one draw serves all strengths.
    """
    noise = torch.from_numpy(rng.standard_normal(tuple(z.shape), dtype=np.float32)).to(z.device)
    # One by one: which strengths are asked for must not change a bit of the others.
    return [psnr_db(x, decode(model, z + sigma / model.scaling_factor * noise)) for sigma in sigmas]


def transforms(h: int, w: int) -> dict[str, LatentTransform]:
    """Return the named transforms of a latent grid of h x w."""
    scaled = {name: LatentTransform(max(1, round(h * s)), max(1, round(w * s)), 0) for name, s in SCALES.items()}
    return scaled | {name: LatentTransform(h, w, turns) for name, turns in TURNS.items()}


def equivariance(
    model: LatentModel, x: torch.Tensor, z: torch.Tensor, x_hat: torch.Tensor
) -> dict[str, dict[str, float | None]]:
    """Return how far decoding and encoding are from commuting with scale and rotation (EQ-VAE, arXiv:2502.09509).

    Args:
        z: (1, D, h, w) raw latents of x.
        x_hat: decode(z).

    Returns:
        For each transform T: psnr_db of decode(T(z)) against T(x); drop_db, how much that is below T(x_hat) against
        T(x), which is what an equivariant decoder reaches; latent_error, the RMS of encode(T(x)) - T(z) over that of
        encode(T(x)) about its channels' means, None where encode(T(x)) is constant.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, transform in transforms(*z.shape[-2:]).items():
        z_turned, x_turned = transform.latents(z), transform.image(x, model.f)
        value = psnr_db(x_turned, decode(model, z_turned))
        reached = psnr_db(x_turned, transform.image(x_hat, model.f))
        drop = 0.0 if value == reached else reached - value  # both may be infinite
        z_of_turned = encode(model, x_turned.clamp(-1, 1)).mean
        spread = float((z_of_turned - z_of_turned.mean(dim=(2, 3), keepdim=True)).square().mean().sqrt())
        error = float((z_of_turned - z_turned).square().mean().sqrt())
        found[name] = {"psnr_db": value, "drop_db": drop, "latent_error": error / spread if spread > 0 else None}
    return found


def drift(model: LatentModel, x: torch.Tensor, x_hat: torch.Tensor, n_trips: int) -> dict[str, Any]:
    """Encode and decode again and again, with 8-bit rounding in between.

    Args:
        model: the autoencoder.
        x: the image.
        x_hat: of the first trip.
        n_trips: in all, at least 2.

    Returns:
        original_db: (n_trips,) PSNR against x after each trip. first_db: (n_trips - 1,) against the first trip's image,
        from the second on. rgb_shift: (n_trips, 3) mean of the image minus that of x, in 8-bit levels.
    """
    original, first, shift = [], [], []
    now = x_first = round_to_8_bit(x_hat)
    for trip in range(n_trips):
        if trip > 0:
            now = round_to_8_bit(decode(model, encode(model, now).mean))
            first.append(psnr_db(x_first, now))
        original.append(psnr_db(x, now))
        shift.append(((now.double() - x.double()).mean(dim=(0, 2, 3)) * 127.5).tolist())
    return {"original_db": original, "first_db": first, "rgb_shift": shift}
