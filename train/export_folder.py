"""Further formats for a model that is a diffusers folder already: exported, imported, or anybody's.

    folder -> network [+ images -> preview, float16 on real images] -> formats, codec.json, card; in place or as a copy

What can fail is tried before anything is written. Entry: `export_folder`.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from codec import facts, preview
from codec.conditional_kl import ConditionalAutoencoderKL
from codec.errors import ModelError, UsageError
from codec.files import check_writable, write_atomic
from codec.latent_model import latent_model, load_network
from codec.model_folder import CODEC_JSON, CODEC_TENSORS
from codec.pixels import to_float
from codec.preview import Preview, PreviewFit
from train.card_sections import update_card
from train.export import save_network
from train.formats import Wanted, check_folder, check_formats, check_half, config_of, stored_formats, write_formats
from train.half_precision import MAX_IMAGES, Half, from_json, measure_half, middle
from train.importing.images import FitImages

_PREVIEW_IMAGES = 200
_COPIED = (CODEC_JSON, CODEC_TENSORS, facts.FACTS_JSON, "README.md", "fixture.safetensors", "discriminator")


@dataclass(frozen=True, kw_only=True)
class FolderExport:
    """What to make of a folder.

    Attributes:
        out: a new folder for all of it; None = into the folder itself.
        wanted: formats.
        images: a folder of images or shards, for the preview, and to try float16 on; None = none.
        licence: of the weights, for the card; "" = what the card says already.
        device: where the network runs meanwhile.
    """

    out: Path | None = None
    wanted: Wanted = field(default_factory=Wanted)
    images: Path | None = None
    licence: str = ""
    device: torch.device | str = "cpu"


def export_folder(source: Path, how: FolderExport) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Write formats of a diffusers folder.

    Args:
        source: of an autoencoder, or of a pipeline with one in `vae/`.
        how: see the class.

    Returns:
        Figures as plain values, and (name, reason) of images that could not be read.

    Raises:
        ModelError: no model that is supported; a format that it cannot have; a file that, loaded again, gives
            something else.
        UsageError: `out` is in use or cannot be written, there are no images, a package is missing.
    """
    root = model_root(source)
    network = load_network(root, image_channels=None, conditional=True).eval().requires_grad_(False)
    check_formats(network, how.wanted)
    images = _open_images(how.images, network)
    is_new = how.out is not None and how.out.resolve() != root.resolve()
    target = how.out if is_new and how.out is not None else root
    if is_new:
        check_empty(target)
    check_writable(target)
    try:
        return _export(network, root, target, images, how), [] if images is None else images.bad
    except BaseException:
        if is_new:
            shutil.rmtree(target, ignore_errors=True)
        raise


def _export(
    network: nn.Module, root: Path, target: Path, images: FitImages | None, how: FolderExport
) -> dict[str, Any]:
    """Do it; see `export_folder`, which has checked what can be checked, and cleans up."""
    network.to(how.device)
    fitted, real = (None, []) if images is None else _fit_preview(network, images)
    half = _half(network, root, real, how.wanted)
    network.to("cpu")
    if target is not root:
        _copy(network, root, target)
    if half is not None and half.force_upcast:
        _set_upcast(network, target)
    written = write_formats(target, how.wanted, half=half)
    if fitted is not None:
        preview.write(target, fitted)
    update_card(target, network, how.licence)
    if how.licence:
        facts.update(target, licence=how.licence)
    figures: dict[str, Any] = {"folder": str(target), "files": [str(path.relative_to(target)) for path in written]}
    figures |= {} if half is None else {"float16": half.to_json()}
    return figures | ({} if fitted is None else {"preview_r2": [round(float(share), 4) for share in fitted.r2]})


def model_root(source: Path) -> Path:
    """Return the autoencoder's own folder; raises ModelError where there is none."""
    for place in (source, source / "vae"):
        if (place / "config.json").is_file():
            return place
    raise ModelError(f"{source}: no config.json, neither in it nor in vae/: not a diffusers model folder")


def check_empty(out: Path) -> None:
    """Raise UsageError where a folder to write to holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; give a new folder")


def _open_images(path: Path | None, network: nn.Module) -> FitImages | None:
    if path is None:
        return None
    channels = config_of(network)["in_channels"]
    if isinstance(network, ConditionalAutoencoderKL):
        raise UsageError(f"--preview: a {type(network).__name__}, whose latents have colours under a class alone")
    if channels != 3:
        raise UsageError(f"--preview: a network of {channels} image channels; images are read as RGB")
    return FitImages.open(path, _PREVIEW_IMAGES)


@torch.inference_mode()
def _fit_preview(network: nn.Module, images: FitImages) -> tuple[Preview, list[np.ndarray]]:
    """Return the preview, and the first images."""
    model = latent_model(network)
    fit = PreviewFit(model.channels)
    first: list[np.ndarray] = []
    for image in images.read():
        pixels = middle(image, model.f)
        z = model.normalize(model.encode(to_float(pixels)[None].to(next(network.parameters()).device)).mean)
        fit.update(z[0].float().cpu().numpy(), pixels)
        if len(first) < MAX_IMAGES:
            first.append(pixels)
    found = fit.solve()
    if found is None:
        raise UsageError(f"{images.path}: too few pixels for a preview of {model.channels} channels")
    return found, first


def _half(network: nn.Module, root: Path, real: list[np.ndarray], wanted: Wanted) -> Half | None:
    """Return what float16 does: measured where there are new images, or it is wanted and not known; None = neither."""
    known = stored_formats(root, network).get("float16")
    if real or (wanted.fp16 and known is None):
        half = measure_half(network, real)
    elif wanted.fp16 and known is not None:
        half = from_json(known)
    else:
        return None
    if wanted.fp16:
        check_half(half, wanted.force)
    return half


def _copy(network: nn.Module, root: Path, target: Path) -> None:
    """Write the folder anew, in float32, with what of ours lies beside it."""
    save_network(network, target)
    for name in _COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name)
        elif (root / name).exists():
            shutil.copy(root / name, target / name)
    check_folder(network, target)


def _set_upcast(network: Any, folder: Path) -> None:
    """Set force_upcast, which only an AutoencoderKL's pipelines look at. Never taken back: somebody may know why."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(network, AutoencoderKL) and not document.get("force_upcast"):
        network.register_to_config(force_upcast=True)
        write_atomic(folder / "config.json", (json.dumps(document | {"force_upcast": True}, indent=2) + "\n").encode())
