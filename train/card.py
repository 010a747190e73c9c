"""The model card: README.md of a model folder, generated from what was measured."""

from collections.abc import Mapping
from typing import Any

from codec.statistics import LatentSummary
from train.config import Config


def model_card(
    info: Mapping[str, Any],
    config: Config,
    summary: LatentSummary,
    figures: Mapping[str, Any],
    largest_activation: float,
) -> str:
    """Return the card as Markdown.

    Args:
        info: codec.json.
        config: the run's recipe.
        summary: latent statistics on training images.
        figures: what `train.export` measured on held-out images.
        largest_activation: the largest magnitude inside the network on training images.
    """
    record = info["training"]
    model = config.model
    crops = f"{config.data.crop}, then {config.data.final_crop}" if config.data.final_crop else str(config.data.crop)
    lines = [
        f"# {info['name']}",
        "",
        f"`diffusers.AutoencoderKL`, f{info['f']}, {info['latent_channels']} latent channels, widths "
        f"{', '.join(map(str, model.block_out_channels))}; trained with latent-codec.",
        "",
        "```python",
        "from diffusers import AutoencoderKL",
        'vae = AutoencoderKL.from_pretrained("THIS_FOLDER")',
        "z = (vae.encode(x).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor  # normalized",
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
        f"- loss: {record.get('losses', 'n/a')}; no discriminator",
        f"- AdamW, lr {config.optim.lr:g}, {config.optim.schedule}; these are the averaged weights (EMA "
        f"{config.optim.ema_decay:g} per step)",
        f"- validation (held-out centre crops, mode, not quantised, 8 bit): {_inline(record.get('validation', {}))}",
        "",
        "## Latents",
        "",
        f"Measured on {summary.n_images} training images, whole, the posterior's mean (never a sample).",
        "",
        f"- `scaling_factor` {info['scaling_factor']:.6g} = 1 / standard deviation over all channels; "
        f"`shift_factor` {info['shift_factor']:.6g} = mean over all channels",
        f"- a *sample* of the posterior has standard deviation {summary.sampled_std * info['scaling_factor']:.4f} "
        "after the same normalisation",
        f"- KL {summary.kl_nats.sum() / info['f'] ** 2:.4f} nats per image pixel",
        f"- largest activation {largest_activation:.1f}; `force_upcast` is "
        "set when it is beyond a quarter of what float16 can hold",
        "",
        "| channel | mean | std | posterior std | KL, nats |",
        "|---|---|---|---|---|",
        *(
            f"| {c} | {summary.mean[c]:.4f} | {summary.std[c]:.4f} | {summary.posterior_std[c]:.4f} "
            f"| {summary.kl_nats[c]:.3f} |"
            for c in range(info["latent_channels"])
        ),
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


def _inline(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "n/a"
