"""`codec-eval lint`, the network at work: what its latents are like, what comes back, and whether float16 holds it.

pictures -> encode, mode -> moments (LatentStatistics) -> decode -> PSNR, mean colour
the first pictures again, weights rounded to float16 -> the largest magnitude that every module takes or gives
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from codec.errors import ran_out_of_memory
from codec.latent_model import CodebookModel, LatentModel, latent_model
from codec.pixels import round_to_8_bit, to_float
from codec.statistics import LatentStatistics, LatentSummary
from eval import latent_fp16
from eval.lint_config import SMALLEST_TILE
from eval.lint_findings import Findings

_ROOM = latent_fp16.RISKY_SHARE * latent_fp16.LARGEST  # beyond it none is left for unusual images
_FLOAT16_PICTURES = 2
_MAX_GRID_SIDE = 64  # latents; attention in a network of small f would take minutes on more
_PSNR_FLOOR_DB = {False: 20.0, True: 15.0}  # by whether the pictures are the built-in ones
_COLOUR_LEVELS = 3.0  # of 255
_USAGE = 0.2  # of the codebook, or of the vectors that so few latents can name


@dataclass(frozen=True)
class Measured:
    """What running the network on pictures said.

    Attributes:
        summary: moments of the raw latents.
        psnr_db: mean over pictures, not quantised, rounded to 8 bits.
        colour_levels: (3,) mean of x_hat - x by channel, in levels of 255.
        n_indices: different codebook vectors that were named; None without a codebook.
        largest: magnitude of the largest activation with the weights rounded to float16; inf where one overflowed.
        largest_at: the module that gave it.
    """

    summary: LatentSummary
    psnr_db: float
    colour_levels: np.ndarray
    n_indices: int | None
    largest: float
    largest_at: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "latents": self.summary.to_json(),
            "psnr_db": self.psnr_db,
            "colour_levels": self.colour_levels.tolist(),
            "n_indices": self.n_indices,
            "largest_activation": self.largest,
            "largest_activation_at": self.largest_at,
        }


@torch.inference_mode()
def measure(
    network: torch.nn.Module,
    pictures: Sequence[np.ndarray],
    findings: Findings,
    step: Callable[[], None] = lambda: None,
) -> Measured | None:
    """Run the network on pictures; None, and a finding, where it fails or its numbers are not finite.

    Args:
        network: float32, evaluation mode, for three channels.
        pictures: (H, W, 3) uint8 each; cut to multiples of f.
        findings: takes what is wrong.
        step: called after each picture.
    """
    model = latent_model(network)
    statistics, errors, shifts = LatentStatistics(model.channels), [], []
    named: set[int] = set()
    try:
        for picture in pictures:
            x = _cut(picture, model.f).to(next(network.parameters()).device)
            posterior = model.encode(x)
            x_hat = model.decode(posterior.mean)
            if not (torch.isfinite(posterior.mean).all() and torch.isfinite(x_hat).all()):
                where = "the latents" if not torch.isfinite(posterior.mean).all() else "the image"
                what = f"{where} of an ordinary picture are NaN or infinite in float32"
                findings.add("nonfinite", "weights", what, "go back to an earlier checkpoint: these weights are broken")
                return None
            statistics.update(posterior)
            if isinstance(model, CodebookModel):
                named |= set(model.quantise(posterior.mean).flatten().tolist())
            difference = 127.5 * (round_to_8_bit(x_hat.float()) - x)
            errors.append(float(difference.square().mean()))
            shifts.append(difference.mean(dim=(0, 2, 3)).cpu().numpy())
            step()
        _check_odd_size(model, pictures[0], findings)
        largest, largest_at = _largest_in_float16(network, pictures[:_FLOAT16_PICTURES])
    except Exception as exception:  # whatever a network that does not fit together raises is a finding
        if ran_out_of_memory(exception):
            raise
        what = f"encode or decode of an ordinary picture fails: {type(exception).__name__}: {exception}"
        findings.add("run", "config.json", what, "correct the fields that it names")
        return None
    psnr_db = float(np.mean([10 * math.log10(255**2 / max(error, 1e-12)) for error in errors]))
    n_indices = len(named) if isinstance(model, CodebookModel) else None
    return Measured(statistics.summary(), psnr_db, np.mean(shifts, axis=0), n_indices, largest, largest_at)


def _cut(picture: np.ndarray, f: int) -> torch.Tensor:
    """Return a picture as (1, 3, H, W), cut to a multiple of f; one that is smaller is padded by edge pixels."""
    height, width = (min(max(side // f, 1), _MAX_GRID_SIDE) * f for side in picture.shape[:2])
    rows, columns = (max(0, f - side) for side in picture.shape[:2])
    picture = np.pad(picture, ((0, rows), (0, columns), (0, 0)), mode="edge")
    return to_float(picture[:height, :width])[None]


def _check_odd_size(model: LatentModel, picture: np.ndarray, findings: Findings) -> None:
    """Send 257 x 255 pixels, padded to multiples of f, there and back; less where f is small."""
    sides = [min(256, _MAX_GRID_SIDE // 2 * model.f) + odd for odd in (1, -1)]
    height, width = (-(-side // model.f) * model.f for side in sides)
    rows, columns = np.arange(height) % picture.shape[0], np.arange(width) % picture.shape[1]
    x = to_float(picture[rows][:, columns])[None].to(next(model.network.parameters()).device)
    z = model.encode(x).mean
    x_hat = model.decode(z)
    grid = (1, model.channels, height // model.f, width // model.f)
    if tuple(z.shape) != grid or x_hat.shape != x.shape or not bool(torch.isfinite(x_hat).all()):
        what = (
            f"{sides[0]} x {sides[1]} pixels, padded to {height} x {width}: latents {tuple(z.shape)}, expected {grid}; "
            f"image {tuple(x_hat.shape)}, expected {tuple(x.shape)}"
        )
        mend = "state as many blocks as the network has, so that f is 2 ** (blocks - 1)"
        findings.add("odd-size", "block_out_channels", what, mend)


def _largest_in_float16(network: torch.nn.Module, pictures: Sequence[np.ndarray]) -> tuple[float, str]:
    """Return the largest magnitude inside the network and the module it leaves, the weights rounded to float16.

    The arithmetic stays float32: so it shows how far beyond float16 the numbers go, on any machine.
    """
    narrow = copy.deepcopy(network)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.half().float()
    model = latent_model(narrow)
    with latent_fp16.recording(narrow, name_of=str) as seen:
        for picture in pictures:
            model.decode(model.encode(_cut(picture, model.f).to(next(narrow.parameters()).device)).mean)
    name = max(seen, key=lambda name: seen[name])
    return seen[name], name


def check_measured(measured: Measured, network: Any, rough: bool, findings: Findings) -> None:
    """Judge what was measured, but for the normalisation.

    Args:
        measured: see `measure`.
        network: that was measured.
        rough: whether the pictures were the built-in ones.
        findings: takes what is wrong.
    """
    summary = measured.summary
    where = f"on {summary.n_images} " + ("built-in pictures" if rough else "images")
    floor = _PSNR_FLOOR_DB[rough]
    if not summary.std.max() > 1e-6:
        what = f"every picture has the same latents (measured standard deviation {summary.std.max():.2g} {where})"
        findings.add("collapsed", "weights", what, "train again: the encoder has collapsed")
    elif measured.psnr_db < floor:
        what = f"reconstructions reach {measured.psnr_db:.1f} dB, expected {floor:.0f} at least (measured {where})"
        mend = "train it further, or look whether encoder and decoder belong together and the weights are those meant"
        findings.add("psnr", "weights", what, mend)
    elif np.abs(measured.colour_levels).max() > _COLOUR_LEVELS:
        shifts = ", ".join(f"{level:+.1f}" for level in measured.colour_levels)
        what = f"reconstructions differ on average by {shifts} levels of 255 in red, green, blue (measured {where})"
        findings.add("colour-shift", "weights", what, "train the decoder further with a loss on pixels")
    size = getattr(network.config, "num_vq_embeddings", None)
    if measured.n_indices is not None and size is not None:
        within = min(size, summary.n_positions // 4)  # so few latents cannot name more, usually
        if measured.n_indices < _USAGE * within:
            what = f"{measured.n_indices} of {size} vectors serve {summary.n_positions} latents (measured {where})"
            mend = "train again with restarts of dead vectors, or publish a smaller codebook"
            findings.add("codebook-usage", "num_vq_embeddings", what, mend)


def check_float16(measured: Measured, config: Mapping[str, Any], kind: str, rough: bool, findings: Findings) -> None:
    """Judge force_upcast by the largest activation."""
    upcast = config.get("force_upcast", kind == "AutoencoderKL")  # the classes' defaults
    if kind == "AutoencoderTiny":
        upcast = False  # it ignores the field
    finite = math.isfinite(measured.largest)
    size = f"{measured.largest:.4g} at {measured.largest_at}" if finite else f"infinite at {measured.largest_at}"
    mend = "write true: pipelines then decode in float32"
    if kind != "AutoencoderKL":
        mend = "publish no fp16 variant and say so in the model card: pipelines do not upcast this class by themselves"
    if measured.largest > latent_fp16.LARGEST and not upcast:
        what = f"false, and float16 ends at {latent_fp16.LARGEST:.0f}: black images (measured {size})"
        findings.add("fp16", "force_upcast", what, mend)
    elif measured.largest > _ROOM and not upcast:
        what = f"false, and little room is left below float16's {latent_fp16.LARGEST:.0f} (measured {size})"
        findings.add("fp16", "force_upcast", what, mend, level="warning")
    elif config.get("force_upcast") and measured.largest <= _ROOM and not rough:
        what = f"true, but float16 holds everything (measured {size}): pipelines take twice the memory for nothing"
        findings.add("upcast-needless", "force_upcast", what, "write false, after a look at images made in float16")


@torch.inference_mode()
def check_tiles(network: Any, config: Mapping[str, Any], picture: np.ndarray | None, findings: Findings) -> None:
    """Judge a small sample_size by what `enable_tiling` makes of a picture with it.

    Args:
        network: an AutoencoderKL; None where it could not be built.
        config: config.json.
        picture: (H, W, 3) uint8; None where the network cannot run.
        findings: takes what is wrong.
    """
    size = config.get("sample_size", 32)
    if findings.has("sample-size") or not isinstance(size, int) or size >= SMALLEST_TILE:
        return
    stated = str(size) if "sample_size" in config else f"missing: diffusers takes {size}"
    measured = ""
    if network is not None and picture is not None:
        psnr_db = _tiled_psnr(network, picture, size)
        measured = f" (measured {psnr_db:.1f} dB between an image decoded in tiles and whole)"
    what = f"{stated}, so that enable_tiling works on tiles of {size} x {size} pixels{measured}"
    findings.add("sample-size", "sample_size", what, "write the crop that it was trained on, e.g. 256 or 512")


def _tiled_psnr(network: Any, picture: np.ndarray, size: int) -> float:
    """Return the PSNR between a picture decoded in diffusers' tiles of `size` pixels and whole."""
    model = latent_model(network)
    x = _cut(picture[: 2 * size, : 2 * size], model.f).to(next(network.parameters()).device)
    z = model.encode(x).mean
    whole = model.decode(z)
    before = network.tile_sample_min_size, network.tile_latent_min_size
    network.tile_sample_min_size, network.tile_latent_min_size = size, max(1, size // model.f)
    network.enable_tiling()
    try:
        tiled = model.decode(z)
    finally:
        network.disable_tiling()
        network.tile_sample_min_size, network.tile_latent_min_size = before
    error = float((127.5 * (round_to_8_bit(tiled) - round_to_8_bit(whole))).square().mean())
    return 10 * math.log10(255**2 / max(error, 1e-12))
