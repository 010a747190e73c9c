"""The model card of an autoencoder that knows classes: README.md of its folder, generated from what was measured."""

from collections.abc import Mapping
from typing import Any

from codec.statistics import LatentSummary
from train.card import channel_table, training_lines
from train.card_sections import licence_id, licence_lines
from train.config import Config
from train.cvae.measure import sentence


def conditional_card(info: Mapping[str, Any], config: Config, network: Any, summary: LatentSummary) -> str:
    """Return the card as Markdown.

    Args:
        info: what facts.json holds.
        config: the run's recipe.
        network: what was exported.
        summary: latent statistics on training images, each under its class.
    """
    classes, validation = info["classes"], info["training"].get("validation", {})
    widths = ", ".join(map(str, network.config.block_out_channels))
    n_kl = float(summary.kl_nats.sum() * summary.n_positions / summary.n_images)
    lines = [
        "---",
        "library_name: latent-codec",
        f"license: {licence_id(config.export.licence)}",
        "---",
        "",
        f"# {info['name']}",
        "",
        f"`codec.conditional_kl.{type(network).__name__}`, f{info['f']}, {info['latent_channels']} latent channels, "
        f"widths {widths}; trained with latent-codec. Encoder and decoder are told the class of an image (a CVAE). "
        "**diffusers has no class for it, and no pipeline loads it**; latent-codec does:",
        "",
        "```python",
        "from codec.latent_model import load_conditional",
        'model = load_conditional("THIS_FOLDER")',
        f'z = model.under("{classes[0]}").encode(x).mean    # x (B, C, H, W) in [-1, 1]; raw latents',
        f'edited = model.under("{classes[-1]}").decode(z)    # the same as another class',
        f'drawn = model.under("{classes[-1]}").decode(model.draw(8, seed=0))',
        "```",
        "",
        "## Condition",
        "",
        f"- classes, in the order of their labels: {', '.join(classes)}",
        f"- hidden from both parts for {config.model.condition_dropout:.0%} of the images in training, so that "
        "`under(None)`, or no `under`, encodes and decodes without",
        f"- held out: {sentence(validation) if validation else 'not measured'}",
        "",
        *training_lines(info, config, "mode"),
        "## Latents",
        "",
        f"Of {summary.n_images} training images, each under its class. Raw, and held to N(0, I) by the KL (weight "
        f"{config.kl.weight:g} per {config.kl.reduction}): {n_kl:.1f} nats an image; a sample of the posterior has "
        f"mean {summary.global_mean:.4f} and standard deviation {summary.sampled_std:.4f}.",
        "",
        *channel_table(summary),
        "",
        "Draws and edits are made up: not for documents, evidence or medical images.",
        "",
        "## Licence",
        "",
        *licence_lines(config.export.licence, config.export.data_licence, ""),
        "",
    ]
    return "\n".join(lines)
