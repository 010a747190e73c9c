"""From trained weights to a model folder: measure, fit, write.

    network + training images -> latent statistics -> scaling_factor, shift_factor, mean, step -> entropy tables
                              -> preview of the latents; float16, tried -> force_upcast
      -> config.json, weights (diffusers) + codec.json, codec.safetensors + README.md [+ discriminator/]
      -> other formats, see `train.formats`

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

from codec import console, facts, model_folder, tables
from codec.adopt import Measured, measure
from codec.coding import Settings
from codec.errors import ModelError, UsageError
from codec.files import write_atomic
from codec.latent_model import LatentModel, decoder_id, latent_model
from codec.model_folder import ModelFolder
from codec.pixels import to_float, to_uint8
from codec.preview import Preview, PreviewFit
from codec.runtime import Codec
from codec.search_limit import search_below
from codec.shards import SampleRef
from codec.statistics import LatentStatistics
from eval.metrics import psnr
from train.card import latents_of, model_card
from train.card_sections import update_card
from train.centring import centred, measured_shift
from train.channels import Channels
from train.config import Config
from train.data import whole_images
from train.drift import export_drift
from train.formats import Wanted, check_folder, fixture_picture, make_readable, write_formats
from train.half_precision import MAX_IMAGES, MAX_SIDE, Half, measure_half
from train.networks import decoder_only, keeps_latents

STATISTICS_SIDE = 1024  # pixels
MAX_CHECKED_IMAGES = 8
_QUALITIES = (0, 25, 50, 75, 100)
_STATIC = Settings(effort=0, modes=(tables.Mode.STATIC,))  # the mode whose rate a rate model estimates
DISCRIMINATOR = "discriminator"  # folder in a model folder


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
    stay as they are; else both are measured, and the mean goes into the weights where they can hold it
    (`train.centring`), but for a model that began as another one, whose latents it may be compared with. A decoder that
    was trained alone keeps its base's mean, steps and tables too, where the base has some and no steps were learned: so
    it decodes the base's files.

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
        Figures of the export: standard deviation on held-out images, PSNR by quality, the ids, the drift from the model
        whose latents these may be (`train.drift`), what float16 does, the files of other formats.

    Raises:
        UsageError: the latents of the training images do not vary: there is nothing to code.
        ModelError: the folder, loaded again, gives something else than the network.
    """
    model, image = latent_model(network), Channels.of(config.model.image_channels, config.data.samples)
    samples = statistics_samples(training, config)
    bad: list[tuple[str, str]] = []
    fit = PreviewFit(model.channels)
    measured = _measure(model, samples, bad, step, image, fit)
    keep = keeps_latents(config.model, config.latents)
    mean_as_trained = measured.summary.mean
    if not keep and not config.model.init_from:
        network, measured = centred(network, measured)
    _set_scaling(network, config, measured, keep)
    model = latent_model(network)  # with the new normalisation
    preview = _preview(fit, model, mean_as_trained - measured.summary.mean)
    half, real = write_weights(network, out, samples, image, discriminator)
    info = model_info(model, config, record, (len(training), len(validation)))
    info |= {"decoder_id": decoder_id(network), "statistics": measured.summary.to_json()}
    info |= {"preview": None if preview is None else preview.to_json()}
    coding = _tables(config, measured, learned=step is not None)
    if image.plain:  # the codec codes no others
        info["search_below"] = search_below(model, real, coding["table_sets"][-1], coding["mean"], coding["step"])
    model_folder.write(out, info=info, **coding)
    figures = _check(out, model, image, validation, bad) | {"n_bad_samples": len(bad)}
    figures |= export_drift(config, out, validation, training, device)
    if not figures.get("drift", {}).get("compatible", True):
        facts.update(out, latents_of="")  # they were meant to be
    for key, reason in bad:
        console.error(f"sample {key}: {reason} (left out of the model's statistics)")
    card = model_card(info, config, network, measured.summary, figures, kept=keep)
    write_atomic(out / "README.md", card.encode())
    write_fixture(model, image, out, config)
    return figures | other_formats(network, out, config, half)


def model_info(
    model: LatentModel, config: Config, record: Mapping[str, Any], counts: tuple[int, int]
) -> dict[str, Any]:
    """Return what codec.json says of a model before anything is measured, but for its id.

    Counts: of training and held-out images.
    """
    return {
        "name": config.export.name or Path(config.run.out).resolve().name,
        "family": model.family,
        "f": model.f,
        "latent_channels": model.channels,
        "receptive_field": model.receptive_field,
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        "latents_of": latents_of(config),
        "licence": config.export.licence,
        "training": {"data": _describe_data(config, *counts), **record},
    }


def _tables(config: Config, measured: Measured, *, learned: bool) -> dict[str, Any]:
    """Return mean, step and table sets: fitted to the latents, or the base's; `learned`: the steps are the run's."""
    base = None if learned else coding_base(config)
    if base is not None:
        return {"mean": base.mean, "step": base.step, "table_sets": list(base.table_sets.values())}
    mean = measured.summary.mean.astype(np.float32)
    return {"mean": mean, "step": measured.step, "table_sets": [tables.fit(measured.grids, mean, measured.step)]}


def coding_base(config: Config) -> ModelFolder | None:
    """Return the codec's part of the model whose decoder alone was trained; None where there is none."""
    if not (decoder_only(config.model) and config.model.init_from):
        return None
    try:
        folder = model_folder.resolve(config.model.init_from)
    except ModelError:  # it has gone away since
        return None
    return model_folder.read(folder) if model_folder.is_model_folder(folder) else None


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
    path = folder / DISCRIMINATOR / "model.safetensors"
    if not path.parent.is_dir():
        return None
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as exception:
        raise ModelError(f"{path}: not a readable discriminator: {exception}") from exception
    return state


def _measure(
    model: LatentModel,
    samples: Sequence[SampleRef],
    bad: list[tuple[str, str]],
    step: np.ndarray | None,
    image: Channels,
    fit: PreviewFit,
) -> Measured:
    """Measure the latents of training images; `bad` takes (key, reason) of each that cannot be read, `fit` the rest."""
    images = (each for _, each in whole_images(samples, STATISTICS_SIDE, model.f, bad, image.count))

    def watch(z: np.ndarray, pixels: np.ndarray) -> None:
        fit.update(z, image.picture(pixels))

    measured = measure(model, images, len(samples), step=step, watch=watch)
    if measured is None:
        raise UsageError(f"none of {len(samples)} training images can be read; the first: {bad[0][1]}")
    return measured


def _preview(fit: PreviewFit, model: LatentModel, moved: np.ndarray) -> Preview | None:
    """Return the preview of normalized latents; `moved`: (D,) what the raw ones had more when `fit` saw them."""
    scale, shift = (np.asarray(each, np.float64) for each in (model.normalisation.scale, model.normalisation.shift))
    if max(scale.size, shift.size) > model.channels:  # by place in a patch: no class that is trained has this
        return None
    return fit.solve(scale.reshape(-1) if scale.ndim else scale, shift.reshape(-1) + moved)


def _set_scaling(network: Any, config: Config, measured: Measured, keep_scaling: bool) -> None:
    """Give the network's config the normalisation of its latents, and the size of its tiles."""
    if keep_scaling:
        settings = {"shift_factor": network.config.shift_factor or 0.0}  # pipelines of newer models need a number
    else:
        settings = {
            "scaling_factor": 1.0 / measured.summary.global_std,
            "shift_factor": measured_shift(network, measured.summary.global_mean),
            "sample_size": max(config.data.sides),
        }
    network.register_to_config(**{name: value for name, value in settings.items() if name in network.config})


def statistics_samples(training: Sequence[SampleRef], config: Config) -> list[SampleRef]:
    """Return the training images that latents are measured on: as many as the recipe says, always the same ones."""
    order = np.random.default_rng(0).permutation(len(training))[: config.export.statistics_images]
    return [training[i] for i in order]


def write_weights(
    network: Any,
    out: Path,
    samples: Sequence[SampleRef],
    image: Channels,
    discriminator: nn.Module | None,
    cover: int = 0,
) -> tuple[Half, list[np.ndarray]]:
    """Try the network in float16 on images, and write it as `_write_network` does, and the discriminator beside it.

    Args:
        network: of diffusers, or one of `codec.adapters.OWN`.
        out: the model folder.
        samples: training images, of which the first are tried; those that cannot be read are left out.
        image: their channels.
        discriminator: None = there is none to write.
        cover: see `train.data.whole_images`.

    Returns:
        What float16 does, and the images, (H, W, C) uint8 each.

    Raises:
        ModelError: loaded again the network gives something else.
    """
    f = latent_model(network).f
    real = [each for _, each in whole_images(samples[:MAX_IMAGES], MAX_SIDE, f, [], image.count, cover)]
    half = measure_half(network, real)
    _write_network(network, out, half)
    if discriminator is not None:
        _write_discriminator(discriminator, out / DISCRIMINATOR)
    return half, real


def _write_network(network: Any, out: Path, half: Half) -> None:
    """Write diffusers' folder, in place of an older one, and load it again.

    Raises:
        ModelError: loaded again it gives something else; nothing is left of it.
    """
    if (out / model_folder.CODEC_JSON).exists():
        shutil.rmtree(out)
    if "force_upcast" in network.config:
        network.register_to_config(force_upcast=half.force_upcast)
    save_network(network, out)
    try:
        check_folder(network, out)
    except ModelError:
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            (out / name).unlink(missing_ok=True)
        raise


def save_network(network: Any, out: Path) -> None:
    """Write config.json and weights of a network, without leftovers of other programs in the config."""
    network.save_pretrained(out)
    # A base leaves the place that it was loaded from, and whatever else stood in its config, in this one.
    document = json.loads((out / "config.json").read_text(encoding="utf-8"))
    known = {"_class_name", "_diffusers_version", "fsq_levels", *inspect.signature(type(network).__init__).parameters}
    document = {name: value for name, value in document.items() if name in known}
    write_atomic(out / "config.json", (json.dumps(document, indent=2) + "\n").encode())
    make_readable(out)


def other_formats(network: nn.Module, out: Path, config: Config, half: Half) -> dict[str, Any]:
    """Write the formats of the recipe; what cannot be had is said, and costs a finished run nothing."""
    wanted = Wanted.named(config.export.formats)
    for attempt in (wanted, Wanted(single_file=False)):
        try:
            written = write_formats(out, attempt, half=half)
            break
        except (ModelError, UsageError) as exception:
            console.error(f"export.formats: {exception}")
    update_card(out, network)
    names = [str(path.relative_to(out)) for path in written]
    return {"float16": half.verdict, "formats": names}


def _write_discriminator(discriminator: nn.Module, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in discriminator.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    write_atomic(folder / "config.json", (json.dumps(discriminator.config, indent=2) + "\n").encode())
    make_readable(folder)


def _check(
    out: Path, model: LatentModel, image: Channels, validation: Sequence[SampleRef], bad: list[tuple[str, str]]
) -> dict[str, Any]:
    """Measure the finished folder on held-out images: normalized deviation, rate and PSNR by quality.

    Images that cannot be read are left out, and added to `bad` as (key, reason). What the codec does not code, images
    of other than three channels, has no rates.
    """
    device = next(model.network.parameters()).device
    codec = Codec.load(out, device, dtype="float32") if image.plain else None
    statistics = LatentStatistics(model.channels)
    rows: dict[int, list[tuple[float, float, float]]] = {quality: [] for quality in _QUALITIES}
    ceiling = []
    n_held_out = 0
    for _, picture in whole_images(validation, STATISTICS_SIDE, model.f, bad, image.count):
        n_held_out += 1
        x = to_float(picture)[None].to(device)
        with torch.inference_mode():
            posterior = model.encode(x)
            statistics.update(posterior)
            if n_held_out > MAX_CHECKED_IMAGES:
                continue
            x_hat = to_uint8(model.decode(posterior.mean).float()[0])
        ceiling.append(image.measured(picture, x_hat)["psnr"])
        if codec is not None:
            _add_rates(codec, picture, rows)
    folder = model_folder.read(out)
    figures: dict[str, Any] = {
        "stream_id": folder.stream_id,
        "decoder_id": folder.decoder_id,
        "n_held_out": n_held_out,
    }
    if n_held_out == 0:
        return figures
    summary = statistics.summary()
    figures |= {
        "normalized_std": summary.global_std * model.scaling_factor,
        "normalized_mean": (summary.global_mean - model.shift_factor) * model.scaling_factor,
        "unquantised_psnr": float(np.mean(ceiling)),
        "n_checked": len(ceiling),
    }
    if codec is not None:
        figures["by_quality"] = {
            quality: dict(zip(("bpp", "psnr", "static_bpp"), np.mean(found, axis=0).tolist(), strict=True))
            for quality, found in rows.items()
        }
    return figures


def _add_rates(codec: Codec, image: np.ndarray, rows: Mapping[int, list[tuple[float, float, float]]]) -> None:
    """Code an image at each quality, and add (bpp, PSNR in dB, bpp of STATIC mode) to the quality's row."""
    n_pixels = image.shape[0] * image.shape[1]
    coded = codec.encode_many(image, _QUALITIES), codec.encode_many(image, _QUALITIES, _STATIC)
    for quality, data, static in zip(_QUALITIES, *coded, strict=True):
        rows[quality].append((8 * len(data) / n_pixels, psnr(image, codec.decode(data)), 8 * len(static) / n_pixels))


def write_fixture(model: LatentModel, image: Channels, out: Path, config: Config) -> None:
    """Write one input with the trainer's own latents and reconstruction, to hold any other runtime to.

    Beside the model of a run; into a model that is exported to another place.
    """
    beside = out.resolve().parent == Path(config.run.out).resolve()
    path = (out.parent if beside else out) / "fixture.safetensors"
    x = to_float(fixture_picture(model.f, image.count))[None].to(next(model.network.parameters()).device)
    with torch.inference_mode():
        z = model.encode(x).mean
        x_hat = model.decode(z)
    save_file({"x": x.cpu(), "z": z.cpu().contiguous(), "x_hat": x_hat.cpu().contiguous()}, path)
    make_readable(out)
