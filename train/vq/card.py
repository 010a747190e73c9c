"""The model card of a trained VQ model: README.md of its folder, generated from what was measured."""

from collections.abc import Mapping
from typing import Any

from codec.codebook_model import CodebookModel
from codec.index_maps import IndexMap
from codec.latent_model import TwoLevelModel, latent_model
from train.card import last_parts, training_lines
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
    model = latent_model(network)
    assert isinstance(model, CodebookModel)
    levels, two = network.config.get("fsq_levels"), isinstance(model, TwoLevelModel)
    lines = [
        "---",
        f"library_name: {'latent-codec' if two else 'diffusers'}",
        f"license: {licence_id(config.export.licence)}",
        "---",
        "",
        f"# {info['name']}",
        "",
        f"{_shape(model)}, widths {', '.join(map(str, network.config.block_out_channels))}; trained with latent-codec.",
        "",
        *(_two_level_example() if two else _fsq_example(levels) if levels else _example()),
        *training_lines(info, config, "quantised"),
        "## Codebook",
        "",
        f"- quantiser: {_quantiser(info, config, levels)}",
        *_rate(figures),
        *(
            line
            for each, prefix in zip(model.maps, model.prefixes, strict=True)
            for line in _use(each, prefix, figures)
        ),
        "",
        "## Licence",
        "",
        *licence_lines(config.export.licence, config.export.data_licence, last_parts(config.model.init_from)),
        "",
    ]
    return "\n".join(lines)


def _shape(model: CodebookModel) -> str:
    """Say which class it is, f, K and d."""
    d = model.codebooks[0].shape[1]
    if isinstance(model, TwoLevelModel):
        sizes = (f"f{model.f // each.scale}, {each.codebook_size} vectors" for each in model.maps)
        return f"`codec.two_level.TwoLevelVQModel` of two levels ({'; '.join(sizes)}) of {d} channels"
    return f"`diffusers.VQModel`, f{model.f}, a codebook of {model.codebook_size} vectors of {d} channels"


def _two_level_example() -> list[str]:
    return [
        "A coarse map of indices and a fine one (VQ-VAE-2, arXiv:1906.00446). **diffusers has no class for it, and no "
        "pipeline loads it**; latent-codec does:",
        "",
        "```python",
        "from codec.latent_model import load_latent_model",
        'model = load_latent_model(Path("THIS_FOLDER"))',
        "indices = model.indices(x)                      # x in [-1, 1]; (B, 5, h, w)",
        "coarse, fine = model.grids(indices)             # (B, h, w), (B, 2h, 2w)",
        "x_hat = model.decode_indices(indices)",
        "```",
        "",
    ]


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


def _rate(figures: Mapping[str, Any]) -> list[str]:
    """Say what indices of held-out images cost."""
    lines = [f"- indices of a fixed length: {figures['fixed_length_bpp']:.4f} bits per pixel"]
    if not figures["n_held_out"]:
        return [*lines, "- usage and perplexity: n/a, no images were held out"]
    lines.append(
        f"- ideal length under the frequencies of training images: {figures['static_bpp']:.4f} bits per pixel; PSNR of "
        f"the reconstruction {figures['psnr']:.2f} dB; {figures['n_held_out']} held-out images, whole"
    )
    if "bpp" in figures:
        lines.append(f"- files of `codec encode`: {figures['bpp']:.4f} bits per pixel, {figures['n_checked']} of them")
    return lines


def _use(each: IndexMap, prefix: str, figures: Mapping[str, Any]) -> list[str]:
    """Say how much of a map's codebook held-out images use."""
    if not figures["n_held_out"]:
        return []
    own = {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}
    what, per_code = f"{prefix.replace('_', ' ')}usage", f"{own['tokens_per_code']:.3g} tokens per vector"
    if "usage" in own:
        share, effective = own["usage"], own["perplexity"]
        return [f"- {what} {share:.1%} of {each.codebook_size} vectors, perplexity {effective:.4g}; {per_code}"]
    share, effective = own["usage_at_least"], own["perplexity_at_least"]
    few = f"too few to tell ({ENOUGH_TOKENS} are needed)"
    return [f"- {what} n/a: at least {share:.1%}, perplexity at least {effective:.4g}, but {per_code} are {few}"]
