"""Writes a head's folder with its card. Imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codec.files import write_atomic
from codec.head.folder import write
from codec.head.network import ConditionalHead
from train.card_sections import licence_id, licence_lines
from train.head.config import HeadConfig
from train.head.latents import HeadData

_TOLD = ("loss", "bits", "marginal_bits", "kl", "active_units", "units", "condition_db", "recon_db")


def write_folder(
    network: ConditionalHead, out: Path, data: HeadData, record: Mapping[str, Any], config: HeadConfig
) -> dict[str, Any]:
    """Write a head; return its figures.

    Args:
        network: the weights.
        out: the folder; created.
        data: what it was trained on.
        record: what the run knows about itself.
        config: the recipe.
    """
    more = {
        "name": config.export.name or str(record.get("run") or out.resolve().parent.name),
        "condition": config.data.condition,
        "n_training": len(data.training),
        "mirrored": data.training.mean.shape[1] == 2,
        "n_held_out": len(data.held_out),
        "objective": dict(vars(config.objective)),
        "record": dict(record),
    }
    about = write(out, network, data.origin, data.classes, more)
    write_atomic(out / "README.md", _card(about, config).encode())
    validation = record.get("validation", {})
    return {
        "head_id": about["head_id"],
        "n_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "images_seen": record.get("images_seen"),
        **{f"held_out_{name}": validation[name] for name in _TOLD if name in validation},
    }


def _card(about: Mapping[str, Any], config: HeadConfig) -> str:
    network, space, origin, record = (about[name] for name in ("network", "space", "codec", "record"))
    validation, card = record.get("validation", {}), config.export
    height, width = (space[name] * origin["f"] for name in ("height", "width"))
    conditions = {
        "class": f"Conditions: classes {', '.join(about['classes'])}.",
        "embedding": f"Conditions: embeddings of {space['embedding_width']} numbers, made as in the training.",
        "none": "It has no condition.",
    }
    examples = {"class": repr(list(about["classes"][:1])), "embedding": "[embeddings[0]]", "none": "[None]"}
    condition, dropout = about["condition"], about["objective"]["condition_dropout"]
    needed = condition != "none" and dropout == 0
    guidance = "" if condition == "none" or needed else "guidance=2.0, "
    lines = [
        "---",
        f"license: {licence_id(card.licence)}",
        "---",
        "",
        f"# {about['name']}",
        "",
        f"A conditional VAE of the latents of an image codec: {network['units']} units, a {network['decoder']} "
        f"decoder. It draws latents {space['channels']} x {space['height']} x {space['width']}, of which the codec's "
        f"decoder makes {height} x {width} pixels. Trained with latent-codec, which alone can load it:",
        "",
        "```python",
        "from codec.head import Head",
        "",
        'head = Head.load("THIS_FOLDER")',
        f"z = head.sample({examples[condition]} * 8, {guidance}temperature=1.0, seed=0)  # normalized",
        'images = head.images(z, "CODEC_FOLDER")',
        "```",
        "",
        conditions[condition] + (" It always needs one, and knows no guidance." if needed else ""),
        "",
        f"It belongs to latents of encoder {origin['encoder_id']} (model {origin['model']}, decoder "
        f"{origin['decoder_id']}) and is refused with others; a decoder that was trained further serves.",
        "",
        "## Training",
        "",
        f"- {about['n_training']} samples{' and their mirrors' if about['mirrored'] else ''}; licence of the data: "
        f"{card.data_licence or 'not stated'}",
        f"- {record.get('losses', 'n/a')}",
        f"- {record.get('images_seen', 'n/a')} samples seen in {record.get('steps', 'n/a')} steps, "
        f"{record.get('time_s', 0) / 60:.1f} minutes; these are the averaged weights of then",
        f"- {about['n_held_out']} held-out samples: {_told(validation)}",
        "",
        "Bits bound -log2 p(z|c) from above, per number of a normalized latent; they say how well latents are "
        "predicted, not how good images look: `codec-eval generated` measures those. With few training images look at "
        "its median nearest distance before you publish samples.",
        "",
        "## Licence",
        "",
        *licence_lines(card.licence, card.data_licence, ""),
        "",
    ]
    return "\n".join(lines)


def _told(validation: Mapping[str, float]) -> str:
    parts = []
    if "bits" in validation:
        parts.append(
            f"at most {validation['bits']:.3f} bits a number, {validation['marginal_bits']:.3f} by Gaussians of the "
            "channels"
        )
        parts.append(f"KL {validation['kl']:.1f} nats")
        parts.append(f"{validation['active_units']:.0f} of {validation['units']:.0f} units say something")
    if "condition_db" in validation:
        parts.append(f"the right condition is worth {validation['condition_db']:+.2f} dB over another one")
    return ", ".join(parts) or "not measured"
