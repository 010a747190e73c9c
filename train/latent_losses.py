"""What makes latents serve a diffusion model: equivariance, a decoder that bears noise, alignment to vision features.

    z (raw) -> noisy_latents -> LatentTransform.latents -> decoder -> x_hat, against LatentTransform.image(x)
    z (raw), projection(z), x -> FeatureAlignment -> scalar loss
    z (raw), log-variance, x  -> LatentAnchor -> scalar loss

The transform and the noise act between encoder and decoder; alignment and anchor act on the encoder alone, before both.
Nothing here downloads anything.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from codec.errors import UsageError
from codec.latent_model import LatentModel, Posterior
from codec.latent_transform import resize
from train.inflate import image_channels_of

_MAX_POSITIONS = 1024  # of one image in the matrix of similarities, which grows with their square
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of pixels in [0, 1]
_DEFAULT_SIDE = 224
_HOW_TO_GET = "on a machine with a network: hf download facebook/dinov2-base --local-dir FOLDER"


def noisy_latents(z: torch.Tensor, deviation: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Add noise to latents before the decoder, so that it bears the errors of a diffusion model.

    Args:
        z: (B, D, h, w) raw.
        deviation: (B,) in raw units: the strength on normalized latents times `LatentScale.deviation`.
        noise: (B, D, h, w) standard normal.

    Returns:
        (B, D, h, w) raw, float32.
    """
    return z.float() + deviation.float()[:, None, None, None] * noise.float()


def latent_moments(z: torch.Tensor) -> torch.Tensor:
    """Return mean and mean square of (B, D, h, w) raw latents over all axes, (2,) float32, detached.

    Both are means over B, so that their mean over batches and ranks of equal size is that of all images.
    """
    flat = z.detach().float()
    return torch.stack([flat.mean(), flat.square().mean()])


@dataclass
class LatentScale:
    """A running estimate of the deviation of raw latents over all channels, which export makes 1 / scaling_factor.

    Plain numbers, updated once per optimizer step with moments that are averaged over batches and ranks already: every
    rank holds the same, and `dataclasses.asdict` is all that an exact resume needs. The deviation of the batch at hand
    would need none of this, but would make the noise of an image depend on which other images are on its rank.

    Attributes:
        mean: running mean.
        square: running mean square.
        updates: updates so far.
        decay: of the averages per update; the first 1 / (1 - decay) updates count alike.
    """

    mean: float = 0.0
    square: float = 0.0
    updates: int = 0
    decay: float = 0.99

    def update(self, mean: float, square: float) -> None:
        """Take in the moments of one step (`latent_moments`, averaged over batches and ranks)."""
        self.updates += 1
        rate = max(1.0 - self.decay, 1.0 / self.updates)
        self.mean += rate * (mean - self.mean)
        self.square += rate * (square - self.square)

    @property
    def deviation(self) -> float:
        """The estimate; 0 before the first update, which means no noise in the very first step."""
        return math.sqrt(max(0.0, self.square - self.mean**2))


class LatentAnchor:
    """How far latents are from those of a frozen autoencoder, which others have trained on.

    Attributes:
        model: that autoencoder.
    """

    def __init__(self, model: LatentModel, *, deviation: bool = False) -> None:
        """Hold on to a model.

        Args:
            model: the autoencoder, frozen, in evaluation mode, of the same f and D.
            deviation: hold on to the posterior's deviation too, where both have one.
        """
        self.model = model
        self._deviation = deviation
        self._image_channels = image_channels_of(model.network)

    def target(self, x: torch.Tensor) -> Posterior:
        """Return the frozen model's raw posterior of x, (B, C, H, W) in [-1, 1]: of the channels that it knows."""
        with torch.no_grad():
            return self.model.encode(x[:, : self._image_channels])

    def __call__(self, mean: torch.Tensor, logvar: torch.Tensor | None, target: Posterior) -> torch.Tensor:
        """Return the squared error of normalized latents, mean over B, D, h, w; a scalar.

            mean over B, D, h, w of (n(mean) - n(target mean))^2, plus, if asked for, of (s - target s)^2

        n is the frozen model's normalisation, s the posterior's deviation in the same units: errors then are in units
        of what a diffusion model sees, whose deviation is 1.

        Args:
            mean: (B, D, h, w) raw.
            logvar: the same shape, or None.
            target: of `target`.
        """
        error = (self.model.normalize(mean.float()) - self.model.normalize(target.mean)).square().mean()
        if self._deviation and logvar is not None and target.logvar is not None:
            unit = self.model.normalisation.deviation(mean)
            s, wanted = (torch.exp(0.5 * each.float()) for each in (logvar, target.logvar))
            error = error + ((s - wanted) / unit).square().mean()
        return error


class FeatureAlignment(nn.Module):
    """How unlike the features of a frozen vision network the latents are (VA-VAE).

    Yao et al. 2025, arXiv:2501.01423. As in the paper the matrix of similarities is that of z itself; their
    code takes the projected latents there too.

    It holds no trainable parameter: `projection` makes the one that belongs into the module that DDP wraps. Always in
    evaluation mode, float32, without gradient and autocast for the network.

    Attributes:
        channels: of the features.
        name: class of the network and its grid, for the log.
    """

    def __init__(self, folder: str | Path, margins: tuple[float, float]) -> None:
        """Load the network.

        Args:
            folder: of a network for images that transformers' AutoModel can load, with preprocessor_config.json if its
                pixels are not normalised as ImageNet's.
            margins: of the distance and of the cosine part, each 0 <= margin < 1.

        Raises:
            UsageError: transformers is not installed, or the folder holds no such network.
        """
        super().__init__()
        folder = Path(folder)
        self._network = _load_network(folder)
        pixels = _read_json(folder / "preprocessor_config.json")
        self._size = _input_size(pixels, self._network.config)
        for name, default in (("image_mean", _IMAGENET[0]), ("image_std", _IMAGENET[1])):
            values = pixels.get(name) or default
            if not pixels.get("do_normalize", True):
                values = (float(name == "image_std"),) * 3
            # Not persistent: they belong to the folder, not to a checkpoint.
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        self._margins = margins
        self.eval()
        self.requires_grad_(False)
        try:  # what a network returns is only known by asking it
            shape = self.features(torch.zeros(1, 3, *self._size)).shape
        except Exception as exception:
            raise UsageError(
                f"{folder}: {type(self._network).__name__} gives no grid of image features: {_first_line(exception)}"
            ) from exception
        self.channels = shape[1]
        self.name = f"{type(self._network).__name__} {shape[2]}x{shape[3]}x{shape[1]}"

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a trainer's model.train() must not switch on dropout here."""
        return super().train(False)

    def projection(self, latent_channels: int) -> nn.Conv2d:
        """Return a new bias-free 1x1 convolution from D latent channels to the features', trainable."""
        return nn.Conv2d(latent_channels, self.channels, kernel_size=1, bias=False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the network's last features of images.

        Args:
            x: (B, 3, H, W) in [-1, 1]; resized to what the network takes.

        Returns:
            (B, channels, rows, columns) float32, without gradient.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            pixels = (resize(x.float(), *self._size) + 1.0) / 2.0
            pixels = (pixels - self.get_buffer("image_mean")) / self.get_buffer("image_std")
            return _as_grid(self._network(pixel_values=pixels).last_hidden_state, self._network.config, self._size)

    def forward(self, z: torch.Tensor, projected: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the alignment loss, a scalar.

            mean over B, h, w of relu(1 - m_cosine - cos(z'_i, f_i))
          + mean over B, i, j of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m_distance)

        i and j are positions of the latent grid, to which the features are interpolated; of grids with more than 1,024
        positions the second part takes every second (third, ...) row and column.

        Args:
            z: (B, D, h, w) raw latents of x, not transformed.
            projected: z' = projection(z), (B, channels, h, w).
            x: (B, 3, H, W) in [-1, 1].
        """
        features = resize(self.features(x), *z.shape[-2:])
        m_distance, m_cosine = self._margins
        with torch.autocast(z.device.type, enabled=False):
            aligned = (_unit(projected) * _unit(features)).sum(dim=1)
            cosine = F.relu(1.0 - m_cosine - aligned).mean()
            stride = math.ceil(math.sqrt(z.shape[-2] * z.shape[-1] / _MAX_POSITIONS))
            of_z, of_features = (_similarities(t[..., ::stride, ::stride]) for t in (z, features))
            return cosine + F.relu((of_z - of_features).abs() - m_distance).mean()


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Scale (B, C, h, w) to unit length over C; shorter than 1e-3 stays short, or its gradient would have no bound."""
    return F.normalize(vectors.float(), dim=1, eps=1e-3)


def _similarities(vectors: torch.Tensor) -> torch.Tensor:
    """Return the cosines between all positions of (B, C, h, w): (B, h*w, h*w)."""
    unit = _unit(vectors).flatten(2)
    return unit.transpose(1, 2) @ unit


def _load_network(folder: Path) -> nn.Module:
    """Load the vision part of a transformers network in float32; raises UsageError as FeatureAlignment says."""
    try:
        from transformers import AutoModel
    except ImportError as exception:
        raise UsageError(
            f"latents.alignment = {folder}: reading it needs transformers; pip install transformers"
        ) from exception
    # Without this check AutoModel would take the name for one on a hub, and find another copy in its cache.
    if not (folder / "config.json").is_file():
        raise UsageError(f"latents.alignment = {folder}: not the folder of a network (no config.json); {_HOW_TO_GET}")
    try:
        network, report = AutoModel.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except Exception as exception:  # each network and file format has its own exceptions
        raise UsageError(
            f"latents.alignment = {folder}: cannot be loaded: {_first_line(exception)}; {_HOW_TO_GET}"
        ) from exception
    # What transformers does not find it makes up, with a warning. Only a pooler, which is not used here, may lack.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing or report["mismatched_keys"]:
        what = missing[0] if missing else sorted(report["mismatched_keys"])[0]
        raise UsageError(f"latents.alignment = {folder}: weights do not fit the config: {what}; {_HOW_TO_GET}")
    vision: nn.Module = getattr(network, "vision_model", network)  # of a pair for images and text, the former
    return vision.float()


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} when there is no such file; raises UsageError when it is something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exception:
        raise UsageError(f"{path}: {exception}") from exception
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected an object")
    return content


def _input_size(pixels: dict[str, Any], config: Any) -> tuple[int, int]:
    """Return height and width that a network takes: its preprocessor's, else its config's, else 224."""
    size = pixels.get("crop_size") if pixels.get("do_center_crop", True) else None
    size = size or pixels.get("size") or getattr(config, "image_size", None) or _DEFAULT_SIDE
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge", _DEFAULT_SIDE)
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _as_grid(states: torch.Tensor, config: Any, size: tuple[int, int]) -> torch.Tensor:
    """Turn tokens (B, prefix + rows*columns, C) into (B, C, rows, columns); feature maps pass as they are.

    Class and register tokens come first in every network of transformers. How many there are follows from the patch
    size, or, for networks that merge patches, from the largest square.
    """
    if states.ndim == 4:
        return states
    n_tokens = states.shape[1]
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    rows, columns = (side // patch for side in size) if patch else (n_tokens, n_tokens)
    if rows * columns > n_tokens:
        rows = columns = math.isqrt(n_tokens)
    grid = states[:, n_tokens - rows * columns :].transpose(1, 2)  # (B, C, rows*columns)
    return grid.reshape(*grid.shape[:2], rows, columns)


def _first_line(exception: Exception) -> str:
    return (str(exception).strip() or type(exception).__name__).splitlines()[0]
