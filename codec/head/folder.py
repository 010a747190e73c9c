"""A head's folder.

    head.json           network, classes or width of the embeddings, whose latents and how normalized, the training;
                        objective.condition_dropout = 0: it has never seen an image without a condition
    head.safetensors    the weights, float32
    README.md           a card, of `codec-train`

Imports torch and diffusers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.engine import Engine
from codec.errors import ModelError, UsageError
from codec.head.config import NetworkConfig, Space
from codec.head.network import ConditionalHead
from codec.latent_model import Normalisation, encoder_id, normalisation_from_json, normalisation_to_json
from codec.network_folder import FolderKind

HEAD = FolderKind(name="head", version=1, about="head.json", weights="head.safetensors")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose latents a head knows.

    Attributes:
        model: name of the autoencoder, for messages.
        encoder_id: 16 hex digits; other latents come from another encoder.
        decoder_id: 16 hex digits, of the decoder that was beside it.
        f: downsampling factor.
        normalisation: raw to normalized latents.
    """

    model: str
    encoder_id: str
    decoder_id: str
    f: int
    normalisation: Normalisation

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = {name: value for name, value in vars(self).items() if name != "normalisation"}
        return {**plain, "normalized": normalisation_to_json(self.normalisation)}

    def require(self, engine: Engine, where: str, part: str = "decoder") -> str:
        """Refuse an autoencoder of other latents.

        Args:
            engine: the autoencoder.
            where: what these latents are in or for, begins the message.
            part: "encoder" or "decoder", what it is wanted for; for decoding an equal decoder beside another encoder
                serves as well.

        Returns:
            A note for the user where the decoder is another one; else "".

        Raises:
            ModelError: its latents are others.
        """
        its_id, same_decoder = encoder_id(engine.model.network), engine.decoder_id == self.decoder_id
        if its_id != self.encoder_id and not (part == "decoder" and same_decoder):
            raise ModelError(f"{where}: latents of encoder {self.encoder_id} (model {self.model}), not of {its_id}")
        return "" if same_decoder else f"another decoder ({engine.decoder_id}) than beside these latents; it serves"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Origin":
        """Undo `to_json`."""
        values = {name: found[name] for name in cls.__dataclass_fields__ if name != "normalisation"}
        return cls(**values, normalisation=normalisation_from_json(found["normalized"]))


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a folder holds.

    Attributes:
        folder: where from.
        head_id: 16 hex digits, SHA-256 over its weights.
        network: float32, for inference, on the CPU.
        origin: whose latents it knows.
        classes: names of the labels 0, 1, ...; empty with embeddings, and without a condition.
        about: the whole of head.json.
        knows_none: whether it learned what no condition is; yes where the folder does not say.
    """

    folder: Path
    head_id: str
    network: ConditionalHead
    origin: Origin
    classes: tuple[str, ...]
    about: Mapping[str, Any]
    knows_none: bool

    def require_none(self, what: str) -> None:
        """Raise UsageError where `what`, which begins the reason, takes a head that knows images without a condition.

        One that was trained with condition_dropout = 0 gives noise for them, and guidance away from them.
        """
        if not self.knows_none:
            reason = "the head was trained with objective.condition_dropout = 0, never without a condition"
            raise UsageError(f"{self.folder}: {what}: {reason}")


def read(path: Path) -> Stored:
    """Read a head.

    Args:
        path: its folder, or the run that wrote it to `model`.

    Raises:
        ModelError: missing, damaged, something else, or weights that are not those that its id is of.
    """
    folder, about = HEAD.open(path)
    with HEAD.reading(folder):
        network = ConditionalHead(NetworkConfig(**about["network"]), Space(**about["space"]))
        its_id = HEAD.fill(network, folder, about)
        origin = Origin.from_json(about["codec"])
        classes = tuple(about["classes"])
        has_conditions = bool(network.space.n_classes or network.space.embedding_width)
        knows_none = not has_conditions or about.get("objective", {}).get("condition_dropout") != 0
    return Stored(
        folder=folder,
        head_id=its_id,
        network=network,
        origin=origin,
        classes=classes,
        about=about,
        knows_none=knows_none,
    )


def write(
    out: Path,
    network: ConditionalHead,
    origin: Origin,
    classes: Sequence[str],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write head.json and head.safetensors; return what stands in the former.

    Args:
        out: the folder; created.
        network: the weights.
        origin: whose latents it knows.
        classes: names of the labels 0, 1, ...; empty with embeddings, and without a condition.
        more: what else head.json is to hold.
    """
    about = {
        "kind": HEAD.kind,
        "version": HEAD.version,
        HEAD.id_key: HEAD.id_of(network),
        "network": dict(vars(network.config)),
        "space": network.space.to_json(),
        "classes": list(classes),
        "codec": origin.to_json(),
        **more,
    }
    HEAD.write(out, network, about)
    return about
