"""The model card of a trained model: README.md of its folder, generated from what was measured.

`train.card_sections` adds what changes later: where the model loads, its preview, its files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codec.statistics import LatentSummary
from train.card_sections import licence_id, licence_lines
from train.channels import Channels
from train.config import Config
from train.drift import drift_lines
from train.networks import decoder_only, keeps_latents

_COMMANDS = [
    "    codec encode photos -o coded -m THIS_FOLDER -q 50",
    "    codec decode coded -o decoded -m THIS_FOLDER",
    "",
]
# What a diffusers class calls the latents without noise in the answer of `encode`.
_MODE = {"AutoencoderKL": "latent_dist.mode()", "AutoencoderTiny": "latents"}


def model_card(
    info: Mapping[str, Any],
    config: Config,
    network: Any,
    summary: LatentSummary,
    figures: Mapping[str, Any],
    *,
    kept: bool,
) -> str:
    """Return the card as Markdown.

    Args:
        info: codec.json.
        config: the run's recipe.
        network: what was exported.
        summary: latent statistics on training images.
        figures: what `train.export` measured on held-out images.
        kept: whether scaling_factor and shift_factor are another model's, not measured.
    """
    kind = type(network).__name__
    lines = [
        "---",
        "library_name: diffusers",
        f"license: {licence_id(config.export.licence)}",
        "---",
        "",
        f"# {info['name']}",
        "",
        f"`diffusers.{kind}`, f{info['f']}, {info['latent_channels']} latent channels, widths "
        f"{', '.join(map(str, network.config.block_out_channels))}; trained with latent-codec.",
        "",
        "```python",
        f"from diffusers import {kind}",
        "",
        f'vae = {kind}.from_pretrained("THIS_FOLDER")',
        f"z = (vae.encode(x).{_MODE[kind]} - vae.config.shift_factor) * vae.config.scaling_factor  # normalized",
        "x_hat = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample  # x in [-1, 1]",
        "```",
        "",
        *(_COMMANDS if network.config.in_channels == 3 else []),
        *training_lines(info, config, "mode, not quantised"),
        "## Latents",
        "",
        *_latents(info, summary, kept),
        "",
        *channel_table(summary),
        "",
        *(["## Drift", "", *drift_lines(figures["drift"]), ""] if "drift" in figures else []),
    ]
    if "by_quality" in figures:
        lines += [
            "## On held-out images",
            "",
            f"Normalized latents of {figures['n_held_out']} images: mean {figures['normalized_mean']:.4f}, standard "
            f"deviation {figures['normalized_std']:.4f}. Rate is of whole files; {figures['n_checked']} images, "
            "8-bit RGB.",
            "",
            "| q | bpp | PSNR, dB |",
            "|---|---|---|",
            *(f"| {q} | {row['bpp']:.4f} | {row['psnr']:.2f} |" for q, row in figures["by_quality"].items()),
            f"| not quantised | | {figures['unquantised_psnr']:.2f} |",
            "",
        ]
    lines += [
        "## Ids",
        "",
        f"stream {figures['stream_id']}, decoder {figures['decoder_id']}",
        "",
        "Lossy: faces, lettering and fine repeated structure can change. Not for documents or medical images.",
        "",
        "## Licence",
        "",
        *licence_lines(config.export.licence, config.export.data_licence, last_parts(config.model.init_from)),
        "",
    ]
    return "\n".join(lines)


def training_lines(info: Mapping[str, Any], config: Config, how: str) -> list[str]:
    """Return the section on the training; `how` held-out crops were reconstructed."""
    record, data = info["training"], config.data
    crops = " or ".join(map(str, data.crops or (data.crop,))) + (f", then {data.final_crop}" if data.final_crop else "")
    return [
        "## Training",
        "",
        f"- data: {record['data']}; licence: {config.export.data_licence or 'not stated'}",
        f"- {record.get('images_seen', 'n/a')} images seen in {record.get('steps', 'n/a')} steps, "
        f"{record.get('time_s', 0) / 60:.1f} minutes; crops of {crops} pixels",
        f"- {_start_line(config)}",
        *([f"- continued, {record['goes']} goes: the optimizers began anew in each"] if "goes" in record else []),
        *_image_lines(config),
        f"- loss: {record.get('losses', 'n/a')}" + ("" if config.adversarial.weight else "; no discriminator"),
        f"- AdamW, lr {config.optim.lr:g}, {config.optim.schedule}; these are the averaged weights (EMA "
        f"{config.optim.ema_decay:g} per step)",
        f"- validation (held-out centre crops, {how}, 8 bit): {_inline(record.get('validation', {}))}",
        "",
    ]


def _start_line(config: Config) -> str:
    """Say what training started from."""
    model = config.model
    taught = f"; taught by the latents of {last_parts(model.teacher)}" if model.teacher else ""
    if not model.init_from:
        return f"from random weights{taught}"
    frozen = "the decoder alone: encoder and latents are the base's" if decoder_only(model) else "all of it"
    return f"from {last_parts(model.init_from)}, {frozen}{taught}"


def _image_lines(config: Config) -> list[str]:
    """Say what the channels of the images are, where they are not RGB."""
    channels = Channels.of(config.model.image_channels, config.data.samples)
    return [] if channels.plain else [f"- images of {channels.count} channels: {channels.describe()}, in [-1, 1]"]


def latents_of(config: Config) -> str:
    """Return the name of the model whose latents these are meant to be; "" where they are the model's own."""
    model = config.model
    if not keeps_latents(model, config.latents):
        return ""
    anchor = config.latents.anchor if config.latents.anchor_weight > 0 else ""
    return last_parts(model.teacher or anchor or model.init_from)


def last_parts(folder: str) -> str:
    """The end of a path: the last name alone is often "vae" or "model", the whole one is nobody's business."""
    return "/".join(Path(folder).parts[-2:])


def _latents(info: Mapping[str, Any], summary: LatentSummary, kept: bool) -> list[str]:
    """Say what the latents' normalisation is, and how well it fits the training images."""
    factor, shift = info["scaling_factor"], info["shift_factor"]
    lines = [
        f"Measured on {summary.n_images} training images, whole, without the posterior's noise.",
        "",
    ]
    if kept:
        lines.append(
            f"- `scaling_factor` {factor:.6g} and `shift_factor` {shift:.6g} are of the model whose latents these are: "
            f"with them they have mean {(summary.global_mean - shift) * factor:.4f} and standard deviation "
            f"{summary.global_std * factor:.4f}"
        )
    else:
        reason = " = mean over all channels" if shift else f": they have mean {summary.global_mean * factor:.4f} then"
        lines.append(
            f"- `scaling_factor` {factor:.6g} = 1 / standard deviation over all channels; "
            f"`shift_factor` {shift:.6g}{reason}"
        )
    if not summary.posterior_std.any():
        return [*lines, "- no variance: the encoder gives one latent, not a distribution"]
    return [
        *lines,
        f"- a *sample* of the posterior has standard deviation {summary.sampled_std * factor:.4f} "
        "after the same normalisation",
        f"- KL {summary.kl_nats.sum() / info['f'] ** 2:.4f} nats per image pixel",
    ]


def channel_table(summary: LatentSummary) -> list[str]:
    """Return the table of the channels; columns of the posterior's variance only where there is one."""
    columns = {"mean": summary.mean, "std": summary.std}
    if summary.posterior_std.any():
        columns |= {"posterior std": summary.posterior_std, "KL, nats": summary.kl_nats}
    rows = [
        f"| {c} | " + " | ".join(f"{values[c]:.4f}" for values in columns.values()) + " |"
        for c in range(len(summary.mean))
    ]
    return ["| channel | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *rows]


def _inline(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "n/a"
