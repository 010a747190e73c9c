"""Other formats of a model, written into its diffusers folder: single file, float16, ONNX.

    folder (diffusers, float32) -> network -> NAME_ldm.safetensors                       the original (LDM) layout
                                           -> diffusion_pytorch_model.fp16.safetensors   variant="fp16"
                                           -> NAME_ldm.fp16.safetensors
                                           -> onnx/encoder.onnx, onnx/decoder.onnx

Everything is written beside its place, loaded again by the programs that will load it, and compared; only when all of
it gives what the network gives are the files moved to their places. What was found is kept in codec.json (`formats`),
for the card. Entries: `write_formats`, `fixture_picture`, `outputs`.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from torch import nn

from codec import facts
from codec.errors import ModelError
from codec.latent_model import latent_model, load_network
from codec.original_layout import comfy_detects, original_limits, to_original
from codec.pixels import to_float
from eval.latent_fp16 import LARGEST
from train.half_precision import Half
from train.onnx_export import DECODER, ENCODER, check_onnx, export_onnx

TOLERANCE = 1e-5  # between what a file gives when it is loaded again, and the network; of the largest value above 1
FP16_VARIANT = "diffusion_pytorch_model.fp16.safetensors"
ONNX_FOLDER = "onnx"
_STAGE = ".export.tmp"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which formats to write.

    Attributes:
        single_file: the original layout; None = where it permits.
        fp16: the variant of the folder, and of the single file where there is one.
        onnx: both files.
        force: float16 files even where float16 overflows.
    """

    single_file: bool | None = None
    fp16: bool = False
    onnx: bool = False
    force: bool = False

    @classmethod
    def named(cls, names: tuple[str, ...]) -> "Wanted":
        """Return what a recipe's `export.formats` asks for: a single file where the layout permits."""
        return cls(single_file=None if "single-file" in names else False, fp16="fp16" in names, onnx="onnx" in names)


def check_formats(network: nn.Module, wanted: Wanted) -> None:
    """Check, before any work, that what is wanted can be had.

    Raises:
        ModelError: not of this network; says why.
        UsageError: not on this machine; names what is missing.
    """
    if wanted.single_file and (why := no_single_file(network)):
        raise ModelError(f"no single file: {why}")
    if wanted.onnx:
        check_onnx(network)


def check_half(half: Half, force: bool) -> None:
    """Raise ModelError where float16 files would give black images, and nobody insists on them."""
    if half.verdict == "overflows" and not force:
        raise ModelError(
            f"float16 overflows: no float16 files (largest activation {half.largest:.4g} of {LARGEST:.0f} at "
            f"{half.largest_at}); use bfloat16, or --force to write them all the same"
        )


def no_single_file(network: nn.Module) -> str:
    """Say why a network cannot be written in the original layout and loaded again; empty where it can."""
    config = config_of(network)
    if not isinstance(network, AutoencoderKL):
        return f"a {config['_class_name']}; the original layout that others read is AutoencoderKL's"
    try:
        limits = original_limits(config)
    except ModelError as exception:
        return str(exception)
    return "; ".join(limit.partition(": ")[2] for limit in limits if "diffusers" in limit.partition(": ")[0])


def write_formats(folder: Path, wanted: Wanted, *, half: Half | None = None) -> list[Path]:
    """Write formats into a diffusers folder, all of them or none.

    Args:
        folder: of an autoencoder itself, writable; its weights are only read.
        wanted: which.
        half: what float16 does to the network, see `train.half_precision.measure_half`; needed for `wanted.fp16`.

    Returns:
        The files written.

    Raises:
        ModelError: it cannot be had, or what was written gave something else when it was loaded again.
        UsageError: a package is missing.
    """
    network = _load(folder).requires_grad_(False)
    check_formats(network, wanted)
    stored = stored_formats(folder, network)
    _remove_stale(folder, network)
    found: dict[str, Any] = {}
    with _stage(folder) as stage:
        if wanted.single_file is not False and not no_single_file(network):
            found["single_file"] = _write_single_file(network, folder, stage / f"{_file_name(folder)}.safetensors")
        if wanted.fp16:
            assert half is not None
            check_half(half, wanted.force)
            found["fp16"] = _write_fp16(network, folder, stage, single="single_file" in found)
        if wanted.onnx:
            (stage / ONNX_FOLDER).mkdir()
            found["onnx"] = export_onnx(network, stage / ONNX_FOLDER, _metadata(network, folder))
        written = _move(stage, folder)
    if half is not None:
        found["float16"] = half.to_json()
    facts.update(folder, formats={**stored, **found, "weights": weights_digest(network)})
    return written


def stored_formats(folder: Path, network: nn.Module) -> dict[str, Any]:
    """Return what is kept of the formats of these very weights; empty where nothing is, or it is of other ones."""
    stored = facts.read(folder).get("formats")
    if not isinstance(stored, dict) or stored.get("weights") != weights_digest(network):
        return {}
    return stored


def _remove_stale(folder: Path, network: nn.Module) -> None:
    """Remove files that an earlier export made of other weights than now lie in the folder."""
    stored = facts.read(folder).get("formats")
    if isinstance(stored, dict) and not stored_formats(folder, network):
        names = [stored.get("single_file", {}).get("file"), *stored.get("fp16", {}).get("files", [])]
        names += [f"{ONNX_FOLDER}/{name}" for name in (ENCODER, DECODER)] * ("onnx" in stored)
        for name in filter(None, names):
            (folder / name).unlink(missing_ok=True)


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of all tensors by name, as float32: equal for every folder with the same weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(name.encode() + b"\0" + np.ascontiguousarray(tensor.float().cpu().numpy()).tobytes())
    return sha.hexdigest()


def config_of(network: Any) -> dict[str, Any]:
    """Return the network's config as config.json has it, with its class."""
    return {**network.config, "_class_name": type(network).__name__}


def fixture_picture(f: int, channels: int = 3) -> np.ndarray:
    """Return a picture that shows most of what can go wrong: slopes and waves, (H, W, channels) uint8, H = W."""
    side = max(64, f)
    ramp = np.indices((side, side)).astype(np.float64) / (side - 1)
    planes = [ramp[0], ramp[1], 0.5 + 0.5 * np.sin(20 * ramp[0] * ramp[1])]
    image = np.stack([planes[c % 3] for c in range(channels)], axis=-1)
    return (image * 255).round().astype(np.uint8)


@torch.inference_mode()
def outputs(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return raw latents and image that a network makes of `fixture_picture`, on the CPU."""
    model, config = latent_model(network), config_of(network)
    device = next(network.parameters()).device
    x = to_float(fixture_picture(model.f, int(config["in_channels"])))[None].to(device)
    z = model.encode(x).mean
    return z.cpu(), model.decode(z).float().cpu()


def check_equal(network: nn.Module, again: nn.Module, what: str) -> None:
    """Raise ModelError, naming `what`, where two networks give something else."""
    for part, here, there in zip(("latents", "image"), outputs(network), outputs(again), strict=True):
        limit = TOLERANCE * max(1.0, float(here.abs().max()))
        difference = float((here - there).abs().max())
        if not difference <= limit:  # NaN is not
            raise ModelError(f"{what}: loaded again, its {part} differ by {difference:.2g}, expected {limit:.2g}")


def check_folder(network: nn.Module, folder: Path) -> None:
    """Load a folder again and raise ModelError where it gives something else than the network that was saved."""
    check_equal(network, _load(folder).to(_device(network)), str(folder))


def make_readable(folder: Path) -> None:
    """Give files the permissions of config.json: safetensors may leave them readable by their owner alone."""
    for path in (*folder.glob("*.safetensors"), *folder.glob(f"{ONNX_FOLDER}/*.onnx")):
        path.chmod((folder / "config.json").stat().st_mode)


def _write_single_file(network: nn.Module, folder: Path, path: Path) -> dict[str, Any]:
    """Write the original layout, load it again with diffusers, and say who else will take it."""
    _save(to_original(network.state_dict(), config_of(network)), path, network, folder)
    check_equal(network, _load_single_file(path, folder), path.name)
    limits = original_limits(config_of(network))
    shapes = {
        name: tuple(tensor.shape) for name, tensor in to_original(network.state_dict(), config_of(network)).items()
    }
    comfy = None if any("ComfyUI" in limit.partition(": ")[0] for limit in limits) else comfy_detects(shapes)
    return {"file": path.name, "limits": limits, "comfyui": comfy}


def _write_fp16(network: nn.Module, folder: Path, stage: Path, *, single: bool) -> dict[str, Any]:
    """Write the float16 variant, and the single file where there is one; both hold the same rounded weights."""
    narrow = {name: tensor.half() for name, tensor in network.state_dict().items()}
    rounded = _load(folder)
    rounded.load_state_dict({name: tensor.float() for name, tensor in narrow.items()})
    shutil.copy(folder / "config.json", stage)
    _save(narrow, stage / FP16_VARIANT, network, folder)
    with _quiet():
        kind: Any = type(rounded)
        again: nn.Module = kind.from_pretrained(stage, variant="fp16", torch_dtype=torch.float32, local_files_only=True)
    (stage / "config.json").unlink()
    _check_rounded(rounded, again.eval(), FP16_VARIANT)
    files = [FP16_VARIANT]
    if single:
        path = stage / f"{_file_name(folder)}.fp16.safetensors"
        _save(to_original(narrow, config_of(network)), path, network, folder)
        _check_rounded(rounded, _load_single_file(path, folder), path.name)
        files.append(path.name)
    return {"files": files}


def _check_rounded(rounded: nn.Module, again: nn.Module, what: str) -> None:
    """As `check_equal`; of weights that float16 cannot hold only these are compared, for what they give is NaN."""
    if all(bool(torch.isfinite(tensor).all()) for tensor in rounded.state_dict().values()):
        check_equal(rounded, again, what)
    else:
        there = again.state_dict()
        if not all(torch.equal(tensor, there[name]) for name, tensor in rounded.state_dict().items()):
            raise ModelError(f"{what}: loaded again, its weights differ")


def _load_single_file(path: Path, folder: Path) -> nn.Module:
    """Load an original file as users do; nothing is downloaded."""
    try:
        with _quiet():
            network = AutoencoderKL.from_single_file(
                str(path), config=str(folder), torch_dtype=torch.float32, local_files_only=True
            )
    except Exception as exception:  # diffusers raises many types
        raise ModelError(f"{path.name}: diffusers cannot load it again: {exception}") from exception
    loaded: nn.Module = network.eval()
    return loaded


def _save(state: Mapping[str, torch.Tensor], path: Path, network: nn.Module, folder: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt", **_metadata(network, folder)})


def _metadata(network: nn.Module, folder: Path) -> dict[str, str]:
    """What a file should say of itself where no config.json goes along with it."""
    model, known = latent_model(network), facts.read(folder)
    stated = {
        "name": _name(folder),
        "scaling_factor": repr(model.scaling_factor),
        "shift_factor": repr(model.shift_factor),
        "normalized_latents": "(z - shift_factor) * scaling_factor",
        "latent_channels": str(model.channels),
    }
    stated |= {name: str(known[name]) for name in ("decoder_id",) if name in known}
    return stated | ({"stream_id": known["stream_ids"][-1]} if known.get("stream_ids") else {})


def _name(folder: Path) -> str:
    stated = facts.read(folder).get("name")
    path = folder.resolve()
    return str(stated or (path.parent.name if path.name in ("vae", "model") else path.name))


def _file_name(folder: Path) -> str:
    return re.sub(r"[^\w.+-]+", "-", _name(folder)).strip("-.") + "_ldm"


@contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """Yield an empty folder in `folder`, which is gone afterwards; also one that a killed export left behind."""
    stage = folder / _STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move(stage: Path, folder: Path) -> list[Path]:
    """Move finished files to their places, in place of older ones."""
    written = []
    for path in sorted(path for path in stage.rglob("*") if path.is_file()):
        place = folder / path.relative_to(stage)
        place.parent.mkdir(exist_ok=True)
        path.chmod((folder / "config.json").stat().st_mode)
        path.replace(place)
        written.append(place)
    return written


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from writing about what is checked here."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _load(folder: Path) -> nn.Module:
    """Load any network that is exported: one that knows classes is compared without them."""
    return load_network(folder, image_channels=None, conditional=True).eval()


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
