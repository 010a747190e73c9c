"""An autoencoder as two ONNX files, each run by onnxruntime and compared with torch before it is kept.

    encoder.onnx    image (B, 3, H, W) in [-1, 1] -> mean, logvar (KL) or latents (Tiny), raw (B, D, h, w)
    decoder.onnx    latents, raw (B, D, h, w)     -> image (B, 3, h*f, w*f), nominally in [-1, 1]

B, h and w are free; H and W are multiples of f. What normalizes the latents stands in the files' metadata. Needs the
extra `onnx`. Entries: `check_onnx`, `export_onnx`.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch import nn

from codec.errors import ModelError, UsageError
from codec.latent_model import latent_model
from codec.two_level import TwoLevelVQModel

OPSET = 18
TOLERANCE = 1e-4  # largest difference of an image; of latents, where they are large, in units of the largest one
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED_GRID = (8, 12)  # latents; other than those of the check, so that a size which was frozen is found
_CHECKED = ((1, (5, 9)), (3, (16, 10)))  # (B, latents)


class _KLEncoder(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = network.encoder, network.quant_conv

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution does


class _KLDecoder(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = network.decoder, network.post_quant_conv

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        image: torch.Tensor = self.decoder(latents)
        return image


class _Part(nn.Module):
    """The encoder or decoder of an AutoencoderTiny, which scale their input and output themselves."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.part(given)
        return result


def check_onnx(network: nn.Module) -> None:
    """Check, before any work, that a network can be exported here.

    Raises:
        ModelError: of a class that is not exported; says why.
        UsageError: see `check_packages`.
    """
    if why := no_onnx(network):
        raise ModelError(f"ONNX: {why}")
    check_packages()


def no_onnx(network: nn.Module) -> str:
    """Say why a network is not exported; empty where it is."""
    if isinstance(network, AutoencoderKL | AutoencoderTiny):
        return ""
    why = ": its decoder looks indices up in the codebook, which other programs do in their own ways"
    coded = isinstance(network, VQModel | TwoLevelVQModel)
    return f"a {type(network).__name__}; only AutoencoderKL and AutoencoderTiny are exported{why * coded}"


def check_packages() -> None:
    """Raise UsageError, naming the command that installs them, where packages are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX: no {', '.join(missing)} here: pip install 'latent-codec[onnx]'")


def export_onnx(network: nn.Module, folder: Path, properties: Mapping[str, str]) -> dict[str, Any]:
    """Write both files and check them.

    Args:
        network: float32, evaluation mode, on the CPU; see `check_onnx`.
        folder: where to; exists.
        properties: for the files' metadata.

    Returns:
        For the model card: opset, sizes that were compared, largest differences, versions.

    Raises:
        ModelError: onnxruntime gives something else than torch.
    """
    check_onnx(network)
    model = latent_model(network)
    is_kl = isinstance(network, AutoencoderKL)
    named: Any = network
    encoder: nn.Module = _KLEncoder(named) if is_kl else _Part(named.encoder)
    decoder: nn.Module = _KLDecoder(named) if is_kl else _Part(named.decoder)
    channels = int(named.config.in_channels)
    images = [_images(n, grid, model.f, channels) for n, grid in ((2, _TRACED_GRID), *_CHECKED)]
    with torch.no_grad():
        latents = [model.encode(x).mean for x in images]
    stated = {**properties, "latent_space": "raw", "image_range": "-1 to 1", "f": str(model.f)}
    outputs = ["mean", "logvar"] if is_kl else ["latents"]
    _write(encoder.eval(), folder / ENCODER, images[0], ["image", *outputs], stated)
    _write(decoder.eval(), folder / DECODER, latents[0], ["latents", "image"], stated)

    def encode(x: torch.Tensor) -> list[torch.Tensor]:
        posterior = model.encode(x)
        return [posterior.mean] if posterior.logvar is None else [posterior.mean, posterior.logvar]

    differences = {
        "encoder": _compare(folder / ENCODER, encode, images[1:], relative=True),
        "decoder": _compare(folder / DECODER, lambda z: [model.decode(z)], latents[1:], relative=False),
    }
    return {
        "opset": OPSET,
        "max_difference": differences,
        "compared_at": [list(x.shape) for x in images[1:]],
        "torch": torch.__version__,
        "onnxruntime": _onnxruntime().__version__,
    }


def _images(n: int, grid: Sequence[int], f: int, channels: int) -> torch.Tensor:
    """Return smooth pictures with a little noise, (n, C, H, W) in [-1, 1]: latents of noise alone would be unusual."""
    height, width = (side * f for side in grid)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    rng = np.random.default_rng((n, height, width))
    waves = [[np.sin(rng.uniform(3, 20) * (x + rng.uniform(0, 2) * y)) for _ in range(channels)] for _ in range(n)]
    picture = 0.7 * np.array(waves) + rng.normal(0, 0.05, (n, channels, height, width))
    return torch.from_numpy(np.clip(picture, -1, 1).astype(np.float32))


def _write(
    module: nn.Module, path: Path, example: torch.Tensor, names: Sequence[str], stated: Mapping[str, str]
) -> None:
    """Export a module of one input; names: of the input, then of the outputs."""
    import onnx

    free = torch.export.Dim.DYNAMIC
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=list(names[:1]),
            output_names=list(names[1:]),
            dynamic_shapes=({0: free, 2: free, 3: free},),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _name_sizes(proto.graph)
    onnx.helper.set_model_props(proto, dict(stated))
    onnx.save(proto, path)


def _name_sizes(graph: Any) -> None:
    """Call the input's free sizes batch, height and width in place of s40 and the like, wherever they occur."""
    sizes = [axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim]
    names = {sizes[0]: "batch", sizes[2]: "height", sizes[3]: "width"}
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = symbol.sub(lambda found: names[found[0]], axis.dim_param)


def _compare(
    path: Path,
    ours: Callable[[torch.Tensor], list[torch.Tensor]],
    examples: Sequence[torch.Tensor],
    *,
    relative: bool,
) -> float:
    """Return the largest difference between onnxruntime and torch; raises ModelError where it is too large.

    Args:
        path: the file.
        ours: the same by diffusers' own network.
        examples: inputs of other sizes than it was made with.
        relative: the tolerance is in units of the largest value, where that is above 1.
    """
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    worst = 0.0
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for example in examples:
            found = session.run(None, {session.get_inputs()[0].name: example.numpy()})
            with torch.no_grad():
                wanted = ours(example)
            for here, there in zip(found, wanted, strict=True):
                expected = there.numpy()
                if here.shape != expected.shape:
                    raise ModelError(f"ONNX: {path.name} gives {here.shape}, torch {expected.shape}")
                limit = TOLERANCE * (max(1.0, float(np.abs(expected).max())) if relative else 1.0)
                difference = float(np.abs(here - expected).max())
                if not difference < limit:
                    at = f"{difference:.2g} at {' x '.join(map(str, example.shape))}"
                    raise ModelError(f"ONNX: {path.name} differs from torch by {at}, expected below {limit:.2g}")
                worst = max(worst, difference)
    except ModelError:
        raise
    except Exception as exception:  # onnxruntime's own types, one for each way to fail
        raise ModelError(f"ONNX: onnxruntime cannot run {path.name}: {exception}") from exception
    return worst


def _onnxruntime() -> Any:
    return importlib.import_module("onnxruntime")  # it has no types


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own workings off the terminal; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
