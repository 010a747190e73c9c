"""The folder of a prior: what it is, whose indices it makes, its weights, its card.

    RUN/model/config.json          network, grid, classes, the codebook's ids, how images were cut, the training
    RUN/model/prior.safetensors    float32, with the codebook's vectors as the network sees them
    RUN/model/README.md            model card

Imports torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codec.files import write_atomic
from codec.network_folder import FolderKind
from train.cache.codebook import Codebook
from train.card_sections import licence_id, licence_lines
from train.prior.config import NetworkConfig
from train.prior.network import Grid, PriorNetwork
from train.prior.tokens import TokenData
from train.set_config import CardConfig

PRIOR = FolderKind(name="prior", version=1, about="config.json", weights="prior.safetensors")


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A prior that was read.

    Attributes:
        folder: where from.
        network: float32, for inference.
        classes: names of the labels 0, 1, ...
        codebook: whose indices it makes.
        prior_id: 16 hex digits, SHA-256 over its weights.
    """

    folder: Path
    network: PriorNetwork
    classes: tuple[str, ...]
    codebook: Codebook
    prior_id: str


def write_folder(
    network: PriorNetwork, out: Path, data: TokenData, record: Mapping[str, Any], card: CardConfig
) -> dict[str, Any]:
    """Write a prior; return its figures.

    Args:
        network: what was trained.
        out: the folder; created.
        data: what it was trained on.
        record: what the run knows about itself.
        card: for the model card.
    """
    name = card.name or str(record.get("run") or out.resolve().parent.name)
    its_id = PRIOR.id_of(network)
    about = {
        "kind": PRIOR.kind,
        "version": PRIOR.version,
        "name": name,
        PRIOR.id_key: its_id,
        "network": asdict(network.config),
        "grid": network.grid.to_json(),
        "classes": list(data.classes),
        "codebook": data.codebook.to_json() | {"name": Path(data.codebook.name).name},
        "size": data.size,
        "n_training": len(data.training),
        "mirrored": data.training.indices.shape[1] == 2,
        "n_held_out": len(data.held_out),
        "unigram_entropy_bits": data.unigram_entropy(),
        "record": dict(record),
    }
    write_atomic(out / "README.md", _card(about, card).encode())
    PRIOR.write(out, network, about)
    validation = record.get("validation", {})
    names = {"loss": "held_out_bits", **{key: key for key in ("bits_unlabelled", "unigram_bits", "train_bits")}}
    return {
        "prior_id": its_id,
        "n_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "images_seen": record.get("images_seen"),
        **{told: validation[key] for key, told in names.items() if key in validation},
        "unigram_entropy_bits": about["unigram_entropy_bits"],
    }


def read_folder(path: Path) -> Prior:
    """Read a prior.

    Args:
        path: its folder, or the run that wrote it to `model`.

    Raises:
        ModelError: missing, damaged, something else, or weights that are not those that its id is of.
    """
    folder, about = PRIOR.open(path)
    with PRIOR.reading(folder):
        network = PriorNetwork(NetworkConfig(**about["network"]), Grid(**about["grid"]))
        its_id = PRIOR.fill(network, folder, about)
        codebook = Codebook.from_json(about["codebook"])
        classes = tuple(about["classes"])
    return Prior(folder=folder, network=network, classes=classes, codebook=codebook, prior_id=its_id)


def _card(about: Mapping[str, Any], card: CardConfig) -> str:
    grid, codebook, record = about["grid"], about["codebook"], about["record"]
    validation = record.get("validation", {})
    lines = [
        "---",
        f"license: {licence_id(card.licence)}",
        "---",
        "",
        f"# {about['name']}",
        "",
        f"A class-conditional prior over the codebook indices of a VQ model: a causal transformer (width "
        f"{about['network']['width']}, depth {about['network']['depth']}) that draws {grid['height']} x "
        f"{grid['width']} indices of {grid['codebook_size']}, one after the other; the decoder of the VQ model "
        f"makes {about['size']} x {about['size']} pixels of them. Trained with latent-codec, which alone can load it.",
        "",
        "    codec-train sample THIS_FOLDER -m VQ_MODEL -o samples",
        "",
        f"Classes: {', '.join(about['classes']) or 'none'}.",
        "",
        f"It belongs to codebook {codebook['codebook_id']} and encoder {codebook['encoder_id']} (model "
        f"{codebook['name']}), and is refused with another; a decoder that was trained further serves.",
        "",
        "## Training",
        "",
        f"- {about['n_training']} samples{' and their mirrors' if about['mirrored'] else ''}; licence of the data: "
        f"{card.data_licence or 'not stated'}",
        f"- {record.get('images_seen', 'n/a')} samples seen in {record.get('steps', 'n/a')} steps, "
        f"{record.get('time_s', 0) / 60:.1f} minutes; these are the averaged weights of then",
        f"- {about['n_held_out']} held-out samples, bits an index: "
        + ", ".join(f"{name} {value:.3f}" for name, value in _named_bits(validation, about)),
        "",
        "Bits are exact: the product of the network's probabilities is the probability of the whole grid. They say how "
        "well the indices are predicted, not how good images look: `codec-eval generated` measures those. With few "
        "training images look at its median nearest distance before you publish samples.",
        "",
        "## Licence",
        "",
        *licence_lines(card.licence, card.data_licence, ""),
        "",
    ]
    return "\n".join(lines)


def _named_bits(validation: Mapping[str, float], about: Mapping[str, Any]) -> list[tuple[str, float]]:
    names = {"loss": "with the class", "bits_unlabelled": "without", "unigram_bits": "by the training's frequencies"}
    found = [(text, validation[key]) for key, text in names.items() if key in validation]
    return [*found, ("entropy of these frequencies", about["unigram_entropy_bits"])]
