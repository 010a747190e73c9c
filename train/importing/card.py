"""The card of an imported model: what it is, where it came from, what was kept, what was measured."""

from collections.abc import Mapping
from typing import Any

_HOW_SCALED = {  # by what stated the factor
    "measured": "measured here, 1 / standard deviation and mean over all channels: nothing stated it. A diffusion "
    "model that was trained on these latents before has another one; import again with its config (--config)",
    "the checkpoint": "of the source: LDM keeps it beside the weights",
    "config.json": "of the source's config.json",
    "--config": "of the config.json that was given for it",
}


def import_card(info: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return README.md of an imported model as Markdown.

    Args:
        info: codec.json, with `stream_id` and `unquantised_psnr`; of a VQModel without these, tables and statistics.
        config: diffusers' config of the network.
    """
    kind, origin = config["_class_name"], info["imported"]
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels") or ()
    lines = [
        f"# {info['name']}",
        "",
        f"`diffusers.{kind}`, f{info['f']}, {info['latent_channels']} latent channels"
        + (f", widths {', '.join(map(str, widths))}" if widths else "")
        + "; imported with latent-codec, not trained with it. Author and licence are the source's: see there.",
        "",
        "```python",
        f"from diffusers import {kind}",
        f'vae = {kind}.from_pretrained("THIS_FOLDER")',
        "```",
        "",
    ]
    if "stream_id" in info:
        lines += [
            "    codec encode photos -o coded -m THIS_FOLDER" + ("" if "codebook" in info else " -q 50"),
            "    codec decode coded -o decoded -m THIS_FOLDER",
            "",
        ]
    else:
        lines += [
            "Imported without images, so there are no entropy tables in this folder and the codec refuses it.",
            "",
        ]
    lines += [
        "## Source",
        "",
        f"- {origin['from']}, {origin['layout']} layout, {origin['n_tensors']} tensors, values unchanged, in float32",
        *(f"- SHA-256 of {name}: {digest}" for name, digest in origin["sha256"].items()),
        f"- {_averages(origin)}",
        f"- left out: {origin['left_out'] or 'nothing'}",
        "",
        "## Latents",
        "",
        f"- `scaling_factor` {info['scaling_factor']:.6g}, `shift_factor` {info['shift_factor']:.6g}: "
        + _HOW_SCALED.get(origin["scaling_from"], origin["scaling_from"]),
    ]
    if "stream_id" in info:
        lines += _measured(info)
    return "\n".join([*lines, ""])


def _measured(info: Mapping[str, Any]) -> list[str]:
    statistics, fitted = info["statistics"], info["tables"]
    factor, shift = info["scaling_factor"], info["shift_factor"]
    mean, deviation = (statistics["global_mean"] - shift) * factor, statistics["global_std"] * factor
    rows = zip(statistics["mean"], statistics["std"], statistics["posterior_std"], strict=True)
    return [
        f"- measured on {fitted['n_images']} images of {fitted['fitted_to']} (at most 512 x 512 from their middle, "
        f"SHA-256 of shapes and pixels {fitted['sha256'][:16]}): normalized mean "
        f"{mean:.4f}, standard deviation {deviation:.4f}",
        *_codebook(info),
        f"- reconstruction{'' if 'codebook' in info else ', not quantised,'} of the first of them: "
        f"{info['unquantised_psnr']:.2f} dB",
        "",
        "| channel | mean | std | posterior std |",
        "|---|---|---|---|",
        *(f"| {c} | " + " | ".join(f"{value:.4f}" for value in row) + " |" for c, row in enumerate(rows)),
        "",
        "## Ids",
        "",
        f"stream {info['stream_id']}, decoder {info['decoder_id']}",
        "",
        "Lossy: faces, lettering and fine repeated structure can change. Not for documents or medical images.",
    ]


def _codebook(info: Mapping[str, Any]) -> list[str]:
    usage = info.get("codebook")
    if not usage:
        return []
    return [
        f"- codebook of {usage['size']}: {usage['n_used']} used ({usage['usage']:.1%}), perplexity "
        f"{usage['perplexity']:.1f}, over {usage['n_tokens']} indices of these images"
    ]


def _averages(origin: Mapping[str, Any]) -> str:
    averaged, every = origin["n_averaged"], origin["n_tensors"]
    if not averaged:
        return "weights as the source has them; no averages (EMA) were taken"
    if averaged == every:
        return "averaged weights (EMA)"
    return f"averaged weights (EMA) of {averaged} tensors; of the other {every - averaged} the source has no averages"
