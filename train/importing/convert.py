"""From a published autoencoder to a model folder: its weights as they are, the codec's tables fitted to its latents.

    file or folder -> Source -> network -> config.json, weights (diffusers)
      + images -> codec.adopt: statistics, steps, tables -> codec.json, codec.safetensors, README.md

A published autoencoder's latent space is fixed: its scaling_factor is kept where anything states it. Everything is
written to a hidden folder beside the target and renamed at the end. Entry: `import_model`.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import model_folder
from codec.adopt import adopt
from codec.errors import UsageError
from codec.files import check_writable, write_atomic
from codec.latent_model import latent_model
from codec.model_folder import ModelFolder
from codec.runtime import Codec
from eval.metrics import psnr
from train.centring import measured_shift
from train.importing.card import import_card
from train.importing.images import FitImages
from train.importing.source import Source, config_fields, open_source

_KEPT_FIELDS = ("fsq_levels",)  # unknown to diffusers, see `codec.adapters.CodebookModel`
_VQ_SCALING = "the default of VQModel"
_LARGEST_SIDE = 512  # pixels of an image that the reconstruction is looked at on; a CPU takes seconds for it


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How to import.

    Attributes:
        images: a folder of images or shards that the latents are measured on; None = none, for a VQModel only, which
            becomes a folder for diffusers then.
        n_images: how many of them are used.
        name: of the model; "" = the target folder's.
        averaged: True = averaged (EMA) weights; False = not those; None = averaged where there are any.
        config: a config.json of diffusers with what a file of weights does not say; None = none.
        device: where the network runs meanwhile.
    """

    images: Path | None = None
    n_images: int = 200
    name: str = ""
    averaged: bool | None = None
    config: Path | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What came of it.

    Attributes:
        info: the figures: layout, source with its hashes, scaling, ids, PSNR of the unquantised reconstruction.
        bad: (name, reason) of images that could not be read.
    """

    info: Mapping[str, Any]
    bad: tuple[tuple[str, str], ...]


def import_model(path: Path, out: Path, options: ImportOptions) -> Imported:
    """Make a model folder of somebody's autoencoder.

    Args:
        path: see `train.importing.source.open_source`.
        out: the folder to write; must be empty or not there.
        options: see the class.

    Raises:
        UsageError: the source is missing, the target is in use, there are no images where some are needed.
        ModelError: the source is damaged, refused, or no autoencoder that diffusers has a class for.
    """
    _check_target(out)
    source = open_source(path, options.config, options.averaged)
    is_codebook = source.kind == "VQModel"
    if options.images is None and not is_codebook:
        raise UsageError(f"{path}: without images there are no entropy tables: give a folder of some with --images")
    fitted = FitImages.open(options.images, options.n_images) if options.images else None
    network: Any = source.build()
    network.register_to_config(**{name: source.config[name] for name in _KEPT_FIELDS if name in source.config})
    info: dict[str, Any] = {
        "name": options.name or out.resolve().name,
        "imported": {
            "from": path.resolve().name,
            "layout": source.layout,
            "sha256": {file.name: _sha256(file) for file in source.files},
            "n_tensors": source.n_tensors,
            "n_averaged": source.n_averaged,
            "left_out": source.left_out,
            "scaling_from": source.scaling_from,
        },
    }
    with _staged(out) as folder:
        _write_network(network, folder)
        if fitted is None:
            _finish_without_tables(network, folder, source, info)
        else:
            _finish(network, folder, source, info, fitted, options.device)
    return Imported(info=info, bad=tuple(fitted.bad) if fitted else ())


def _write_network(network: Any, folder: Path) -> None:
    """Write config.json and the weights."""
    network.save_pretrained(folder)
    _write_config(network, folder, {})
    for path in folder.glob("*.safetensors"):  # safetensors may leave them readable by their owner alone
        path.chmod((folder / "config.json").stat().st_mode)


def _write_config(network: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.json with some fields changed, and without leftovers of other programs, which diffusers warns of."""
    known = config_fields(type(network))
    network.register_to_config(**{name: value for name, value in settings.items() if name in known})
    network.save_config(folder)
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {"_class_name", "_diffusers_version", *_KEPT_FIELDS, *known}
    document = {name: value for name, value in document.items() if name in kept}
    write_atomic(folder / "config.json", (json.dumps(document, indent=2) + "\n").encode())


def _finish(
    network: Any,
    folder: Path,
    source: Source,
    info: dict[str, Any],
    fitted: FitImages,
    device: torch.device | str,
) -> None:
    """Measure, fit, and write what makes it a model folder; `info` takes what codec.json holds."""
    tables = adopt(folder, fitted.read(), len(fitted), device)
    statistics = tables.info["statistics"]
    settings: dict[str, Any] = {"shift_factor": network.config.get("shift_factor") or 0.0}
    if tables.maps and not source.scaling_from:
        info["imported"]["scaling_from"] = _VQ_SCALING
    elif not source.scaling_from:
        shift = measured_shift(network, statistics["global_mean"])
        settings = {"scaling_factor": 1.0 / statistics["global_std"], "shift_factor": shift}
        info["imported"]["scaling_from"] = "measured"
    _write_config(network, folder, settings)
    model = latent_model(network)
    info |= dict(tables.info) | {
        "f": tables.f,
        "latent_channels": tables.channels,
        "decoder_id": tables.decoder_id,
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        "tables": fitted.describe(),
    }
    if tables.maps:
        written = model_folder.write_vq(folder, info=info, index_tables=list(tables.index_tables.values()))
    else:
        written = model_folder.write(
            folder, info=info, mean=tables.mean, step=tables.step, table_sets=list(tables.table_sets.values())
        )
    info["stream_id"] = written.stream_id
    info["unquantised_psnr"] = _reconstruct(written, fitted.first, device)
    write_atomic(folder / "README.md", import_card(info, source.config).encode())


def _finish_without_tables(network: Any, folder: Path, source: Source, info: dict[str, Any]) -> None:
    """Write the card of a VQModel that came without images: a folder of diffusers is all there is."""
    if not source.scaling_from:
        info["imported"]["scaling_from"] = _VQ_SCALING
    model = latent_model(network)
    info |= {"family": model.family, "f": model.f, "latent_channels": model.channels}
    info |= {"scaling_factor": model.scaling_factor, "shift_factor": model.shift_factor}
    write_atomic(folder / "README.md", import_card(info, source.config).encode())


def _reconstruct(folder: ModelFolder, pictures: list[np.ndarray], device: torch.device | str) -> float:
    """Return the mean PSNR of unquantised reconstructions in dB: a network that was put together wrongly is seen."""
    codec = Codec.load(folder, device, dtype="float32")
    pieces = [picture[:_LARGEST_SIDE, :_LARGEST_SIDE] for picture in pictures]
    return float(np.mean([psnr(piece, codec.reconstruct(piece)) for piece in pieces]))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_target(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: not empty; name another folder, or remove it")
    check_writable(out.resolve().parent)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is in the way")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside the target; it becomes the target when all went well, and else is removed."""
    out = out.resolve()
    folder = out.with_name(f".{out.name[:40]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir()
    try:
        yield folder
        folder.replace(out)  # an empty folder gives way
    finally:
        shutil.rmtree(folder, ignore_errors=True)
