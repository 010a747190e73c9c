"""From a trained autoencoder that knows classes to its folder; without codec.json, whose files have no place for them.

    network + training images, each under its class -> statistics of the latents; float16, tried
      -> config.json (with the classes), weights + facts.json + README.md [+ discriminator/]

Latents are left as they are: the KL holds them to N(0, I), which draws come from. Entry: `export_conditional`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codec import console, facts
from codec.conditional_kl import ConditionalKLModel
from codec.errors import UsageError
from codec.files import write_atomic
from codec.latent_model import latent_model
from codec.pixels import to_float
from codec.shards import SampleRef
from codec.statistics import LatentStatistics, LatentSummary
from train.channels import Channels
from train.config import Config
from train.cvae.card import conditional_card
from train.data import whole_images
from train.export import (
    STATISTICS_SIDE,
    model_info,
    other_formats,
    statistics_samples,
    write_fixture,
    write_weights,
)


def export_conditional(
    network: Any,
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
        Figures: classes, standard deviations of the latents and KL in nats an image of training images, what float16
        does, the files.

    Raises:
        UsageError: no training image can be read.
        ModelError: the folder, loaded again, gives something else than the network.
    """
    model, image = latent_model(network), Channels.of(config.model.image_channels, config.data.samples)
    assert isinstance(model, ConditionalKLModel)
    samples = statistics_samples(training, config)
    bad: list[tuple[str, str]] = []
    summary = _statistics(model, samples, bad, image.count, config.data.cover)
    network.register_to_config(sample_size=config.data.crop)
    (out / facts.FACTS_JSON).unlink(missing_ok=True)  # of an earlier export
    half, _ = write_weights(network, out, samples, image, discriminator, config.data.cover)
    info = model_info(model, config, record, (len(training), len(validation)))
    info |= {"classes": list(model.classes), "statistics": summary.to_json()}
    facts.update(out, **info)
    for key, reason in bad:
        console.error(f"sample {key}: {reason} (left out of the model's statistics)")
    write_atomic(out / "README.md", conditional_card(info, config, network, summary).encode())
    write_fixture(model, image, out, config)
    positions = summary.n_positions / summary.n_images
    figures = {
        "classes": list(model.classes),
        "latent_std": round(summary.sampled_std, 4),
        "kl_nats_per_image": round(float(summary.kl_nats.sum() * positions), 2),
        "n_bad_samples": len(bad),
    }
    return figures | other_formats(network, out, config, half)


@torch.inference_mode()
def _statistics(
    model: ConditionalKLModel, samples: Sequence[SampleRef], bad: list[tuple[str, str]], channels: int, cover: int
) -> LatentSummary:
    """Return what latents of images, each under its class, are like; `bad` takes (key, reason) of the unreadable."""
    statistics = LatentStatistics(model.channels)
    device = next(model.network.parameters()).device
    for sample in samples:
        for _, pixels in whole_images([sample], STATISTICS_SIDE, model.f, bad, channels, cover):
            statistics.update(model.under(sample.label).encode(to_float(pixels)[None].to(device)))
    if len(bad) == len(samples):
        raise UsageError(f"none of {len(samples)} training images can be read; the first: {bad[0][1]}")
    return statistics.summary()
