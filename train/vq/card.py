"""The model card of a trained VQModel: README.md of its folder, generated from what was measured."""

from collections.abc import Mapping
from typing import Any

from train.card import image_lines, inline, last_parts, start_line
from train.card_sections import licence_id, licence_lines
from train.config import Config
from train.vq.usage import ENOUGH_TOKENS

_KINDS = {
    "ema": "vectors are running means of the latents that chose them; the nearest one stands for a latent",
    "gradient": "vectors were moved by the codebook's loss; the nearest one stands for a latent",
    "simvq": "vectors are random ones under a learned linear map (SimVQ), stored as they are after it",
    "lfq": "vectors are the corners of a cube (LFQ): the signs of a latent, which are its nearest corner",
    "codebook": "the base's vectors; the nearest one stands for a latent",
}


def codebook_card(info: Mapping[str, Any], config: Config, network: Any, figures: Mapping[str, Any]) -> str:
    """Return the card as Markdown.

    Args:
        info: what codec.json or facts.json holds.
        config: the run's recipe.
        network: what was exported.
        figures: what `train.vq.export` measured.
    """
    record, size, levels = info["training"], info["codebook_size"], network.config.get("fsq_levels")
    lines = [
        "---",
        "library_name: diffusers",
        f"license: {licence_id(config.export.licence)}",
        "---",
        "",
        f"# {info['name']}",
        "",
        f"`diffusers.VQModel`, f{info['f']}, a codebook of {size} vectors of {info['latent_channels']} channels, "
        f"widths {', '.join(map(str, network.config.block_out_channels))}; trained with latent-codec.",
        "",
        *(_fsq_example(levels) if levels else _example()),
        "## Training",
        "",
        f"- data: {record['data']}; licence: {config.export.data_licence or 'not stated'}",
        f"- {record.get('images_seen', 'n/a')} images seen in {record.get('steps', 'n/a')} steps, "
        f"{record.get('time_s', 0) / 60:.1f} minutes",
        f"- {start_line(config)}",
        *image_lines(config),
        f"- loss: {record.get('losses', 'n/a')}" + ("" if config.adversarial.weight else "; no discriminator"),
        f"- AdamW, lr {config.optim.lr:g}, {config.optim.schedule}; these are the averaged weights (EMA "
        f"{config.optim.ema_decay:g} per step)",
        f"- validation (held-out centre crops, 8 bit): {inline(record.get('validation', {}))}",
        "",
        "## Codebook",
        "",
        f"- quantiser: {_quantiser(info, config, levels)}",
        *_use(size, figures),
        "",
        "## Licence",
        "",
        *licence_lines(config.export.licence, config.export.data_licence, last_parts(config.model.init_from)),
        "",
    ]
    return "\n".join(lines)


def _example() -> list[str]:
    return [
        "```python",
        "from diffusers import VQModel",
        'vq = VQModel.from_pretrained("THIS_FOLDER")',
        "z = vq.encode(x).latents                        # x in [-1, 1]",
        "x_hat = vq.decode(z).sample                     # quantises z first",
        "_, _, (_, _, indices) = vq.quantize(z)          # of all positions in one row",
        "```",
        "",
    ]


def _fsq_example(levels: list[int]) -> list[str]:
    return [
        f"Finite scalar quantisation, {' x '.join(map(str, levels))} levels (`fsq_levels` in config.json). `VQModel` "
        "decodes its vectors exactly. **Its own quantisation is wrong for this model**: `vq.decode(z)` and "
        "`vq.quantize(z)` take the vector nearest to z, where the squashed z has to be rounded. Take indices and "
        "reconstructions from latent-codec:",
        "",
        "```python",
        "from codec.latent_model import load_latent_model",
        'model = load_latent_model(Path("THIS_FOLDER"))',
        "indices = model.indices(x)                      # x in [-1, 1]",
        "x_hat = model.decode_indices(indices)",
        "```",
        "",
    ]


def _quantiser(info: Mapping[str, Any], config: Config, levels: list[int] | None) -> str:
    if levels:
        return f"fsq, levels {' x '.join(map(str, levels))}: each channel is squashed and rounded"
    kind = info["quantiser"]
    cosine = "; of length 1, so the smallest angle decides" if config.vq.cosine and kind in ("ema", "gradient") else ""
    return f"{kind}: {_KINDS[kind]}{cosine}"


def _use(size: int, figures: Mapping[str, Any]) -> list[str]:
    """Say how much of the codebook held-out images use, and what its indices cost."""
    lines = [f"- indices of a fixed length: {figures['fixed_length_bpp']:.4f} bits per pixel"]
    if not figures["n_held_out"]:
        return [*lines, "- usage and perplexity: n/a, no images were held out"]
    lines.append(
        f"- ideal length under the frequencies of training images: {figures['static_bpp']:.4f} bits per pixel; PSNR of "
        f"the reconstruction {figures['psnr']:.2f} dB; {figures['n_held_out']} held-out images, whole"
    )
    if "bpp" in figures:
        lines.append(f"- files of `codec encode`: {figures['bpp']:.4f} bits per pixel, {figures['n_checked']} of them")
    per_code = f"{figures['tokens_per_code']:.3g} tokens per vector"
    if "usage" in figures:
        share, effective = figures["usage"], figures["perplexity"]
        return [*lines, f"- usage {share:.1%} of {size} vectors, perplexity {effective:.4g}; {per_code}"]
    share, effective = figures["usage_at_least"], figures["perplexity_at_least"]
    few = f"too few to tell ({ENOUGH_TOKENS} are needed)"
    return [*lines, f"- usage n/a: at least {share:.1%}, perplexity at least {effective:.4g}, but {per_code} are {few}"]
