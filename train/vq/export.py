"""From a trained VQ model to a model folder: its codebooks as they stand, how they are used, what indices cost.

    network + training images -> moments of latents, indices -> tables for them; held-out images -> usage, bits, PSNR
      -> config.json, weights (diffusers) + codec.json, codec.safetensors + README.md [+ discriminator/], other formats

diffusers' own quantisation of the latents of a VQModel gives the same indices for every kind but fsq, whose
`fsq_levels` in config.json say what it cannot. A model of two levels has its figures for each map of indices. Entry:
`export_codebook_model`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codec import console, facts, model_folder
from codec.adapters import CodebookModel
from codec.adopt import MeasuredIndices, measure_indices
from codec.errors import UsageError
from codec.files import write_atomic
from codec.latent_model import decoder_id, latent_model
from codec.pixels import to_float, to_uint8
from codec.runtime import Codec
from codec.shards import SampleRef
from train.channels import Channels
from train.config import Config
from train.data import whole_images
from train.export import (
    MAX_CHECKED_IMAGES,
    STATISTICS_SIDE,
    coding_base,
    model_info,
    other_formats,
    statistics_samples,
    write_fixture,
    write_weights,
)
from train.networks import keeps_latents
from train.vq.card import codebook_card
from train.vq.usage import CodeCounts


def export_codebook_model(
    network: nn.Module,
    out: Path,
    config: Config,
    training: Sequence[SampleRef],
    validation: Sequence[SampleRef],
    *,
    record: Mapping[str, Any],
    discriminator: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the model folder; the counterpart of `train.export.export_model`, whose arguments these are.

    Returns:
        Figures: usage and perplexity on held-out images, those of a coarse map beginning with `coarse_`; bits per pixel
        of indices, PSNR, what float16 does, the files.

    Raises:
        UsageError: no training image can be read.
        ModelError: the folder, loaded again, gives something else than the network.
    """
    model, image = _model(network), Channels.of(config.model.image_channels, config.data.samples)
    samples = statistics_samples(training, config)
    bad: list[tuple[str, str]] = []
    images = (pixels for _, pixels in whole_images(samples, STATISTICS_SIDE, model.f, bad, image.count))
    measured = measure_indices(model, images, len(samples))
    if measured is None:
        raise UsageError(f"none of {len(samples)} training images can be read; the first: {bad[0][1]}")
    if not keeps_latents(config.model, config.latents):
        _set_scaling(network, 1.0 / max(measured.summary.global_std, 1e-8), max(config.data.sides))
    (out / facts.FACTS_JSON).unlink(missing_ok=True)  # of an earlier export
    half, _ = write_weights(network, out, samples, image, discriminator)
    model = _model(network)  # with the new normalisation
    info = model_info(model, config, record, (len(training), len(validation)))
    info |= {**model_folder.state_maps(model.maps), "quantiser": _quantiser(model, config)}
    info |= {"decoder_id": decoder_id(network), "statistics": measured.summary.to_json(), **measured.about()}
    _store(out, config, model, measured, info, coded=image.plain)
    figures = _figures(model, out, validation, image, bad) | {"n_bad_samples": len(bad)}
    figures["static_bpp"] = _static_bpp(measured, figures.pop("counts"), model.f)
    facts.update(out, held_out=figures)
    for key, reason in bad:
        console.error(f"sample {key}: {reason} (left out of the model's statistics)")
    write_atomic(out / "README.md", codebook_card(info, config, network, figures).encode())
    write_fixture(model, image, out, config)
    return figures | other_formats(network, out, config, half)


def _store(
    out: Path,
    config: Config,
    model: CodebookModel,
    measured: MeasuredIndices,
    info: Mapping[str, Any],
    *,
    coded: bool,
) -> None:
    """Write codec.json and tables for the indices: fitted, or those of the base whose decoder alone was trained.

    What the codec does not code, images of other than three channels (`coded` False), has facts.json alone.
    """
    if not coded:
        facts.update(out, **info)
        return
    base = coding_base(config)
    index_tables = list(base.index_tables.values()) if base is not None else []
    model_folder.write_vq(out, info=info, index_tables=index_tables or [measured.fit(model)])


def _model(network: nn.Module) -> CodebookModel:
    model = latent_model(network)
    assert isinstance(model, CodebookModel)
    return model


def _quantiser(model: CodebookModel, config: Config) -> str:
    """Name the quantiser that the codebook was trained with; of a decoder that was trained alone only what shows."""
    if model.fsq_levels:
        return "fsq"
    return "codebook" if config.model.decoder_only else config.vq.kind


def _set_scaling(network: Any, factor: float, side: int) -> None:
    network.register_to_config(scaling_factor=factor, sample_size=side)


@torch.inference_mode()
def _figures(
    model: CodebookModel, out: Path, validation: Sequence[SampleRef], image: Channels, bad: list[tuple[str, str]]
) -> dict[str, Any]:
    """Return what held-out images, whole, say of the finished folder; `bad` takes (key, reason) of the unreadable.

    Bits per pixel of indices are without a file's header, "bpp" is of whole files. "counts": of each map's indices.
    """
    device = model.codebooks[0].device
    codec = Codec.load(out, device, dtype="float32") if image.plain else None
    counts = CodeCounts.none(model)
    found: list[float] = []
    sizes: list[float] = []
    for _, pixels in whole_images(validation, STATISTICS_SIDE, model.f, bad, image.count):
        indices = model.indices(to_float(pixels)[None].to(device))
        counts = [a + b for a, b in zip(counts, CodeCounts.by_map(model, indices), strict=True)]
        found.append(image.measured(pixels, to_uint8(model.decode_indices(indices).float()[0]))["psnr"])
        if codec is not None and len(sizes) < MAX_CHECKED_IMAGES:
            sizes.append(8 * len(codec.encode(pixels)) / (pixels.shape[0] * pixels.shape[1]))
    bits = sum(math.ceil(math.log2(each.codebook_size)) * each.scale**2 for each in model.maps) / model.f**2
    figures: dict[str, Any] = {"n_held_out": len(found), "fixed_length_bpp": bits, "counts": counts}
    if codec is not None:
        figures |= {"stream_id": codec.stream_id, "decoder_id": codec.decoder_id}
    if found:
        figures |= {name: value for each in counts for name, value in each.figures().items()}
        figures["psnr"] = float(np.mean(found))
    if sizes:
        figures |= {"bpp": float(np.mean(sizes)), "n_checked": len(sizes)}
    return figures


def _static_bpp(measured: MeasuredIndices, held_out: Sequence[CodeCounts], f: int) -> float | None:
    """Return the bits per pixel of held-out indices under the frequencies of the training's; None without any."""
    if not held_out[0].n_tokens:
        return None
    levels = zip(held_out, measured.counts, measured.maps, strict=True)
    return sum(counts.bits_under(CodeCounts(known)) * each.scale**2 for counts, known, each in levels) / f**2
