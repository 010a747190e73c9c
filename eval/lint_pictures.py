"""Pictures for `codec-eval lint` when nobody gives it any. Imports neither torch nor diffusers."""

import numpy as np

SIDE = 256  # pixels
N_PICTURES = 6


def built_in() -> list[np.ndarray]:
    """Return photograph-like pictures, (256, 256, 3) uint8, always the same ones.

    Dead leaves (Lee, Mumford and Huang 2001): discs over discs, their radii by an inverse power law, which gives the
    edges, the flat parts and the power spectrum of photographs; shaded, and with a little noise.
    """
    return [_dead_leaves(np.random.default_rng(seed)) for seed in range(N_PICTURES)]


def _dead_leaves(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    image = np.full((SIDE, SIDE, 3), 128.0, np.float32)
    light = rng.normal(0, 25, 2)
    for _ in range(400):
        radius = 4.0 / np.sqrt(1e-4 + rng.random() * (1 - 1e-4))  # density ~ radius ** -3, from 4 pixels on
        centre = rng.uniform(-0.2 * SIDE, 1.2 * SIDE, 2)
        colour = rng.normal(115, 50) + rng.normal(0, 18, 3)  # photographs vary in brightness more than in hue
        rows, columns = (slice(max(0, int(at - radius)), max(0, int(at + radius) + 2)) for at in centre)
        inside = (y[rows, columns] - centre[0]) ** 2 + (x[rows, columns] - centre[1]) ** 2 < radius**2
        image[rows, columns][inside] = colour
    shade = light[0] * (y / SIDE - 0.5) + light[1] * (x / SIDE - 0.5)
    image += shade[..., None] + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).round().astype(np.uint8)
