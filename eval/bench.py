"""What `codec.fast` gains on this machine: diffusers' encode and decode against ours, by turns in one process.

networks x sides (diffusers float32, ours in each dtype, ...) -> rounds: every side once -> median times, ratio
                                                              -> PSNR and largest difference to diffusers float32
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from codec import fast
from codec.engine import DTYPES
from codec.errors import UsageError
from codec.latent_model import latent_model, load_network
from codec.model_folder import resolve
from eval.environment import commit, hardware, versions


@dataclass(frozen=True, kw_only=True)
class VaeBench:
    """What `run_vae` measures.

    Attributes:
        model: folder of an autoencoder; None = Stable Diffusion's configuration and diffusers' default
            AutoencoderTiny, both with seeded random weights.
        size: height and width in pixels; a multiple of the downsampling factor.
        batch: images in a call.
        dtypes: that ours computes in, names of `DTYPES`; () = float32 and the device's best.
        compiled: also with torch.compile: ours, and on a GPU diffusers in bfloat16.
        repeats: timed calls of each side, which take turns.
        device: torch device.
    """

    model: Path | None = None
    size: int = 512
    batch: int = 1
    dtypes: tuple[str, ...] = ()
    compiled: bool = False
    repeats: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("size", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}: {getattr(self, name)}, expected 1 or more")
        for name in self.dtypes:
            if name not in DTYPES:
                raise UsageError(f"--dtypes: {name!r}, expected {', '.join(DTYPES)}")


@dataclass(frozen=True)
class _Side:
    """One way to compute: its name, dtype of the products, and the network, which takes its own dtype."""

    name: str
    dtype: str
    network: Any


def run_vae(bench: VaeBench, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure encode and decode of whole images.

    Args:
        bench: what is measured.
        say: told what is being measured.

    Returns:
        versions, hardware, commit, settings and rows, one for each network, operation and side: its `times_s`, their
        median, `speedup` = the median of diffusers in float32 by its own, and `psnr_db` (peak 2) and `max_difference`
        of its output to that of diffusers in float32 (None for that one, and where there is no difference at all).

    Raises:
        UsageError: there is no such device, or the size does not fit.
        ModelError: the model's folder is not one.
    """
    rows: list[dict[str, Any]] = []
    for name, network in _networks(bench):
        f = latent_model(network).f
        if bench.size % f:
            raise UsageError(f"--size: {bench.size}, expected a multiple of {f} for {name}")
        sides = list(_sides(bench, network))
        x = smooth_image(bench.size).repeat(bench.batch, 1, 1, 1).to(bench.device)
        with torch.no_grad():
            z = _encode(network, x)
            for operation, call, given in (("encode", _encode, x), ("decode", _decode, z)):
                say(f"{name}: {operation}")
                rows += [{"network": name, **row} for row in _measured(operation, call, given, sides, bench.repeats)]
        del sides
    settings = {
        **{name: getattr(bench, name) for name in ("size", "batch", "compiled", "repeats", "device")},
        "image": "smooth: sums of low-frequency waves",
        "weights": "random, torch's initialisation, seed 0" if bench.model is None else "the model's",
    }
    about = {"versions": versions(), "hardware": hardware(), "commit": commit()}
    return {"benchmark": "vae", **about, "settings": settings, "rows": rows}


def smooth_image(size: int) -> torch.Tensor:
    """Return (1, 3, size, size) float32 of low-frequency waves in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    waves = (0.6 * torch.sin(3 * x + y), 0.6 * torch.cos(2 * y - x), 0.5 * x * y + 0.2 * torch.sin(9 * x))
    return torch.stack(waves)[None]


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return the PSNR between two tensors for values in [-1, 1], peak 2; None if they are equal."""
    mse = float((a.double() - b.double()).pow(2).mean())
    return 10 * math.log10(4 / mse) if mse else None


def _networks(bench: VaeBench) -> Iterator[tuple[str, Any]]:
    try:
        torch.empty(1, device=bench.device)
    except (RuntimeError, AssertionError) as exception:  # what torch raises for devices that it does not have
        raise UsageError(f"device {bench.device}: {exception}") from exception
    if bench.model is not None:
        folder = resolve(bench.model)
        yield folder.resolve().name, load_network(folder).eval().to(bench.device)
        return
    torch.manual_seed(0)
    stable_diffusion = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    yield "AutoencoderKL (SD)", stable_diffusion.eval().to(bench.device)
    torch.manual_seed(0)
    yield "AutoencoderTiny", AutoencoderTiny().eval().to(bench.device)


def _sides(bench: VaeBench, network: Any) -> Iterator[_Side]:
    """Give diffusers as it is, diffusers as users are told to speed it up, and ours."""
    network.requires_grad_(False)
    yield _Side("diffusers", "float32", network)
    cuda = torch.device(bench.device).type == "cuda"
    reduced = torch.nn.Module.to(copy.deepcopy(network), torch.bfloat16)  # diffusers' own warns
    yield _Side("diffusers", "bfloat16", reduced)
    reduced = copy.deepcopy(reduced).to(memory_format=torch.channels_last)
    yield _Side("diffusers, channels last", "bfloat16", reduced)
    if cuda and bench.compiled:
        reduced = copy.deepcopy(reduced)
        reduced.encoder.compile()
        reduced.decoder.compile()
        yield _Side("diffusers, channels last, compiled", "bfloat16", reduced)
    best = str(fast.best_dtype(bench.device)).removeprefix("torch.")
    for dtype in bench.dtypes or tuple(dict.fromkeys(("float32", best))):
        for compiled in (False, True) if bench.compiled and cuda else (False,):
            try:
                ours = fast.accelerate(copy.deepcopy(network), DTYPES[dtype], compile=compiled)
            except ValueError as exception:
                raise UsageError(str(exception)) from exception
            yield _Side("ours, compiled" if compiled else "ours", dtype, ours)


def _encode(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the mean, or what stands for it, in the network's dtype."""
    found = network.encode(x.to(network.dtype))
    z: torch.Tensor = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents
    return z


def _decode(network: Any, z: torch.Tensor) -> torch.Tensor:
    x_hat: torch.Tensor = network.decode(z.to(network.dtype)).sample
    return x_hat


def _measured(
    operation: str,
    call: Callable[[Any, torch.Tensor], torch.Tensor],
    given: torch.Tensor,
    sides: Sequence[_Side],
    repeats: int,
) -> list[dict[str, Any]]:
    outputs = [call(side.network, given) for side in sides]  # warm-up too: weights are transformed, or compiled
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, found in zip(sides, times, strict=True):
            _finish(given.device)
            start = time.perf_counter()
            call(side.network, given)
            _finish(given.device)
            found.append(time.perf_counter() - start)
    rows = []
    for side, output, found in zip(sides, outputs, times, strict=True):
        same = output is outputs[0]
        difference = None if same else float((output.float() - outputs[0].float()).abs().max())
        row: dict[str, Any] = {"operation": operation, "side": side.name, "dtype": side.dtype, "times_s": found}
        row |= {"median_s": median(found), "min_s": min(found), "speedup": median(times[0]) / median(found)}
        row |= {"psnr_db": None if same else psnr_db(output, outputs[0]), "max_difference": difference}
        rows.append(row)
    return rows


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
