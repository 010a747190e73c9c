"""latent-codec, the library: images in, compressed files out, and back.

Vocabulary of the whole project (letters in code, comments and documentation):

    B batch    C image channels    H, W pixels    f downsampling factor    h = H/f, w = W/f latent grid
    D latent channels    K codebook size    x image    x_hat reconstruction    posterior q(z|x)    z latent
    z_q quantised latent    indices integer latents (or codebook indices)    payload coded bytes

Pixels are uint8 (H, W, 3) sRGB outside and float32 (B, 3, H, W) in [-1, 1] inside. Latents are *raw* (what the
autoencoder emits) or *normalized*, (z - shift_factor) * scaling_factor; every function says which.
bpp = 8 * bytes of the whole file / (H * W of the original image).

This package never imports `eval` or `train`. Importing it loads neither torch nor diffusers: `Codec` comes lazily.
"""

from typing import TYPE_CHECKING, Any

from codec.version import __version__

if TYPE_CHECKING:
    from codec.runtime import Codec

__all__ = ["Codec", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Codec":  # torch and diffusers take seconds to import, so only on use
        from codec.runtime import Codec

        return Codec
    raise AttributeError(f"module 'codec' has no attribute {name!r}")
