"""From trained weights to a model folder: measure, fit, write.

    network + training images -> latent statistics -> scaling_factor, shift_factor, mean, step -> entropy tables
      -> config.json, weights (diffusers) + codec.json, codec.safetensors + README.md [+ discriminator/]

Everything is measured on training images; the held-out ones only check it.
"""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from codec import console, model_folder, tables
from codec.adopt import Measured, measure
from codec.coding import Settings
from codec.errors import ModelError, UsageError
from codec.files import write_atomic
from codec.latent_model import LatentModel, decoder_id, latent_model
from codec.model_folder import ModelFolder
from codec.pixels import to_float
from codec.runtime import Codec
from codec.shards import SampleRef
from codec.statistics import LatentStatistics
from eval.metrics import psnr
from train.card import model_card
from train.config import Config
from train.data import whole_images
from train.networks import decoder_only, keeps_latents

STATISTICS_SIDE = 1024  # pixels
_FP16_LIMIT = 65504 / 4  # an activation beyond this leaves no room for unusual images
_MAX_RANGE_IMAGES = 16
_MAX_CHECKED_IMAGES = 8
_STATIC = Settings(effort=0, modes=(tables.Mode.STATIC,))  # the mode whose rate a rate model estimates
_DISCRIMINATOR = "discriminator"  # folder in a model folder


def export_model(
    network: nn.Module,
    out: Path,
    config: Config,
    training: Sequence[SampleRef],
    validation: Sequence[SampleRef],
    *,
    record: Mapping[str, Any],
    device: torch.device,
    step: np.ndarray | None = None,
    discriminator: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the model folder.

    When the latents are another model's (`train.networks.keeps_latents`), the network's scaling_factor and shift_factor
    stay as they are; else both are measured. A decoder that was trained alone keeps its base's mean, steps and tables
    too, where the base has some and no steps were learned: so it decodes the base's files.

    Args:
        network: a diffusers autoencoder that `codec.latent_model` has an adapter for; float32, evaluation mode.
        out: the folder; replaced if it is a model folder already.
        config: the run's recipe.
        training: what statistics and tables are measured on (the first `export.statistics_images` of a fixed shuffle).
        validation: held-out images, for the figures in the card; may be empty.
        record: see `train.task.Task.export`; `record["losses"]` names all losses, the adversarial one too.
        device: where `network` lies.
        step: (D,) float32, learned steps at q = 0; None = measured, see `codec.adopt.coarsest_step`.
        discriminator: written too, with its `config`, so that a later run need not start with a cold one.

    Returns:
        Figures of the export: standard deviation on held-out images, PSNR by quality, the ids.

    Raises:
        UsageError: the latents of the training images do not vary: there is nothing to code.
    """
    model = latent_model(network)
    order = np.random.default_rng(0).permutation(len(training))[: config.export.statistics_images]
    bad: list[tuple[str, str]] = []
    measured = _measure(model, [training[i] for i in order], bad, step)
    measured_step, summary, step = step is None, measured.summary, measured.step
    keep = keeps_latents(config.model)
    _write_network(network, out, config, measured, keep)
    if discriminator is not None:
        _write_discriminator(discriminator, out / _DISCRIMINATOR)
    model = latent_model(network)  # with the new normalisation
    mean, table_sets = summary.mean.astype(np.float32), []
    base = _base(config) if measured_step else None
    if base is not None:
        mean, step, table_sets = base.mean, base.step, list(base.table_sets.values())
    else:
        table_sets = [tables.fit(measured.grids, mean, step)]
    info = {
        "name": config.export.name or Path(config.run.out).resolve().name,
        "family": model.family,
        "f": model.f,
        "latent_channels": model.channels,
        "receptive_field": model.receptive_field,
        "decoder_id": decoder_id(network),
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        "statistics": summary.to_json(),
        "training": {
            "data": _describe_data(config, len(training), len(validation)),
            **record,
        },
    }
    model_folder.write(out, info=info, mean=mean, step=step, table_sets=table_sets)
    figures = _check(Codec.load(out, device, dtype="float32"), validation, bad) | {"n_bad_samples": len(bad)}
    for key, reason in bad:
        console.error(f"sample {key}: {reason} (left out of the model's statistics)")
    card = model_card(
        info, config, network, summary, figures, largest_activation=measured.largest_activation, kept=keep
    )
    write_atomic(out / "README.md", card.encode())
    _write_fixture(model, out.parent / "fixture.safetensors", device)
    return figures


def _base(config: Config) -> ModelFolder | None:
    """Return the codec's part of the model whose decoder alone was trained; None where there is none."""
    folder = Path(config.model.init_from)
    if decoder_only(config.model) and config.model.init_from and model_folder.is_model_folder(folder):
        return model_folder.read(folder)
    return None


def _describe_data(config: Config, n_training: int, n_validation: int) -> str:
    """Say what was trained on; of a stream no address, which may hold a secret."""
    name = Path(config.data.local_shards or config.data.shards).resolve().name
    if config.data.mode == "streaming":
        return f"a stream of shards; measured on {n_training} images of the shard set {name}, {n_validation} held out"
    return f"{n_training} images of the shard set {name}, {n_validation} more held out"


def load_discriminator_state(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return the state dict of the discriminator beside a model; None where there is none.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / _DISCRIMINATOR / "model.safetensors"
    if not path.parent.is_dir():
        return None
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as exception:
        raise ModelError(f"{path}: not a readable discriminator: {exception}") from exception
    return state


def _measure(
    model: LatentModel, samples: Sequence[SampleRef], bad: list[tuple[str, str]], step: np.ndarray | None
) -> Measured:
    """Measure the latents of training images; `bad` takes (key, reason) of each that cannot be read."""
    images = (image for _, image in whole_images(samples, STATISTICS_SIDE, model.f, bad))
    measured = measure(model, images, len(samples), step=step, n_decoded=_MAX_RANGE_IMAGES)
    if measured is None:
        raise UsageError(f"none of {len(samples)} training images can be read; the first: {bad[0][1]}")
    return measured


def _write_network(network: Any, out: Path, config: Config, measured: Measured, keep_scaling: bool) -> None:
    if (out / model_folder.CODEC_JSON).exists():
        shutil.rmtree(out)
    settings: dict[str, Any] = {"force_upcast": measured.largest_activation > _FP16_LIMIT}
    if keep_scaling:
        settings["shift_factor"] = network.config.shift_factor or 0.0  # pipelines of newer models need a number
    else:
        settings["scaling_factor"] = 1.0 / measured.summary.global_std
        settings["shift_factor"] = measured.summary.global_mean
        settings["sample_size"] = max(config.data.sides)
    network.register_to_config(**{name: value for name, value in settings.items() if name in network.config})
    network.save_pretrained(out)
    # A base leaves the place that it was loaded from, and whatever else stood in its config, in this one.
    document = json.loads((out / "config.json").read_text(encoding="utf-8"))
    known = {"_class_name", "_diffusers_version", *inspect.signature(type(network).__init__).parameters}
    document = {name: value for name, value in document.items() if name in known}
    write_atomic(out / "config.json", (json.dumps(document, indent=2) + "\n").encode())
    _readable(out)


def _write_discriminator(discriminator: nn.Module, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in discriminator.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    write_atomic(folder / "config.json", (json.dumps(discriminator.config, indent=2) + "\n").encode())
    _readable(folder)


def _readable(folder: Path) -> None:
    """Give weights the permissions of config.json: safetensors may leave them readable by their owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)


def _check(codec: Codec, validation: Sequence[SampleRef], bad: list[tuple[str, str]]) -> dict[str, Any]:
    """Measure the finished folder on held-out images: normalized deviation, rate and PSNR by quality.

    Images that cannot be read are left out, and added to `bad` as (key, reason).
    """
    statistics = LatentStatistics(codec.model.channels)
    qualities = (0, 25, 50, 75, 100)
    rows: dict[int, list[tuple[float, float, float]]] = {quality: [] for quality in qualities}
    ceiling = []
    n_held_out = 0
    for _, image in whole_images(validation, STATISTICS_SIDE, codec.model.f, bad):
        n_held_out += 1
        with torch.inference_mode():
            statistics.update(codec.model.encode(to_float(image)[None].to(codec.device)))
        if n_held_out > _MAX_CHECKED_IMAGES:
            continue
        ceiling.append(psnr(image, codec.reconstruct(image)))
        n_pixels = image.shape[0] * image.shape[1]
        coded = zip(
            qualities, codec.encode_many(image, qualities), codec.encode_many(image, qualities, _STATIC), strict=True
        )
        for quality, data, static in coded:
            row = (8 * len(data) / n_pixels, psnr(image, codec.decode(data)), 8 * len(static) / n_pixels)
            rows[quality].append(row)
    figures: dict[str, Any] = {
        "stream_id": codec.stream_id,
        "decoder_id": codec.decoder_id,
        "n_held_out": n_held_out,
    }
    if n_held_out == 0:
        return figures
    summary = statistics.summary()
    return figures | {
        "normalized_std": summary.global_std * codec.model.scaling_factor,
        "normalized_mean": (summary.global_mean - codec.model.shift_factor) * codec.model.scaling_factor,
        "unquantised_psnr": float(np.mean(ceiling)),
        "n_checked": len(ceiling),
        "by_quality": {
            quality: dict(zip(("bpp", "psnr", "static_bpp"), np.mean(found, axis=0).tolist(), strict=True))
            for quality, found in rows.items()
        },
    }


def _write_fixture(model: LatentModel, path: Path, device: torch.device) -> None:
    """Write one input with the trainer's own latents and reconstruction, to hold any other runtime to."""
    side = max(64, model.f)
    ramp = np.indices((side, side)).astype(np.float64) / (side - 1)
    image = np.stack([ramp[0], ramp[1], 0.5 + 0.5 * np.sin(20 * ramp[0] * ramp[1])], axis=-1)
    x = to_float((image * 255).round().astype(np.uint8))[None].to(device)
    with torch.inference_mode():
        z = model.encode(x).mean
        x_hat = model.decode(z)
    save_file({"x": x.cpu(), "z": z.cpu().contiguous(), "x_hat": x_hat.cpu().contiguous()}, path)
