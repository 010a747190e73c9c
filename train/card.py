"""The model card: README.md of a model folder, generated from what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codec.statistics import LatentSummary
from train.config import Config
from train.networks import decoder_only

# What a diffusers class calls the latents without noise in the answer of `encode`.
_MODE = {"AutoencoderKL": "latent_dist.mode()", "AutoencoderTiny": "latents"}


def model_card(
    info: Mapping[str, Any],
    config: Config,
    network: Any,
    summary: LatentSummary,
    figures: Mapping[str, Any],
    *,
    largest_activation: float,
    kept: bool,
) -> str:
    """Return the card as Markdown.

    Args:
        info: codec.json.
        config: the run's recipe.
        network: what was exported.
        summary: latent statistics on training images.
        figures: what `train.export` measured on held-out images.
        largest_activation: the largest magnitude inside the network on training images.
        kept: whether scaling_factor and shift_factor are another model's, not measured.
    """
    record = info["training"]
    kind = type(network).__name__
    data = config.data
    crops = " or ".join(map(str, data.crops or (data.crop,))) + (f", then {data.final_crop}" if data.final_crop else "")
    lines = [
        f"# {info['name']}",
        "",
        f"`diffusers.{kind}`, f{info['f']}, {info['latent_channels']} latent channels, widths "
        f"{', '.join(map(str, network.config.block_out_channels))}; trained with latent-codec.",
        "",
        "```python",
        f"from diffusers import {kind}",
        f'vae = {kind}.from_pretrained("THIS_FOLDER")',
        f"z = (vae.encode(x).{_MODE[kind]} - vae.config.shift_factor) * vae.config.scaling_factor  # normalized",
        "x_hat = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample  # x in [-1, 1]",
        "```",
        "",
        "    codec encode photos -o coded -m THIS_FOLDER -q 50",
        "    codec decode coded -o decoded -m THIS_FOLDER",
        "",
        "## Training",
        "",
        f"- data: {record['data']}; licence: {config.export.data_licence or 'not stated'}",
        f"- {record.get('images_seen', 'n/a')} images seen in {record.get('steps', 'n/a')} steps, "
        f"{record.get('time_s', 0) / 60:.1f} minutes; crops of {crops} pixels",
        f"- {_start(config)}",
        f"- loss: {record.get('losses', 'n/a')}" + ("" if config.adversarial.weight else "; no discriminator"),
        f"- AdamW, lr {config.optim.lr:g}, {config.optim.schedule}; these are the averaged weights (EMA "
        f"{config.optim.ema_decay:g} per step)",
        f"- validation (held-out centre crops, mode, not quantised, 8 bit): {_inline(record.get('validation', {}))}",
        "",
        "## Latents",
        "",
        *_latents(info, summary, kept),
        f"- largest activation {largest_activation:.1f}; `force_upcast` is "
        "set when it is beyond a quarter of what float16 can hold",
        "",
        *_channels(summary),
        "",
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
    ]
    return "\n".join(lines)


def _start(config: Config) -> str:
    """Say what training started from."""
    model = config.model
    taught = f"; taught by the latents of {_last_parts(model.teacher)}" if model.teacher else ""
    if not model.init_from:
        return f"from random weights{taught}"
    frozen = "the decoder alone: encoder and latents are the base's" if decoder_only(model) else "all of it"
    return f"from {_last_parts(model.init_from)}, {frozen}{taught}"


def _last_parts(folder: str) -> str:
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
        lines.append(
            f"- `scaling_factor` {factor:.6g} = 1 / standard deviation over all channels; "
            f"`shift_factor` {shift:.6g} = mean over all channels"
        )
    if not summary.posterior_std.any():
        return [*lines, "- no variance: the encoder gives one latent, not a distribution"]
    return [
        *lines,
        f"- a *sample* of the posterior has standard deviation {summary.sampled_std * factor:.4f} "
        "after the same normalisation",
        f"- KL {summary.kl_nats.sum() / info['f'] ** 2:.4f} nats per image pixel",
    ]


def _channels(summary: LatentSummary) -> list[str]:
    """The table of the channels; columns of the posterior's variance only where there is one."""
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
