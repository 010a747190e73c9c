"""A head's folder.

    head.json           network, classes or width of the embeddings, whose latents and how normalized, the training
    head.safetensors    the weights, float32
    README.md           a card, of `codec-train`

Imports torch and diffusers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save

from codec.engine import Engine
from codec.errors import ModelError, UsageError
from codec.files import write_atomic
from codec.head.config import NetworkConfig, Space
from codec.head.network import ConditionalHead
from codec.latent_model import Normalisation, encoder_id, normalisation_from_json, normalisation_to_json
from codec.shards import read_json

HEAD_JSON, WEIGHTS = "head.json", "head.safetensors"
KIND, VERSION = "latent-codec head", 1


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
        network: float32, for inference, on the CPU.
        origin: whose latents it knows.
        classes: names of the labels 0, 1, ...; empty with embeddings, and without a condition.
        about: the whole of head.json.
    """

    folder: Path
    network: ConditionalHead
    origin: Origin
    classes: tuple[str, ...]
    about: Mapping[str, Any]


def read(path: Path) -> Stored:
    """Read a head.

    Args:
        path: its folder, or the run that wrote it to `model`.

    Raises:
        ModelError: missing, damaged, or something else.
    """
    folder = path if is_head(path) or not is_head(path / "model") else path / "model"
    if not is_head(folder):
        raise ModelError(f"{path}: no head here (expected {HEAD_JSON}, as codec-train run writes to RUN/model)")
    about = read_json(folder / HEAD_JSON)
    if about.get("version") != VERSION:
        raise ModelError(f"{folder}: a head of version {about.get('version')}, expected {VERSION}")
    try:
        network = ConditionalHead(NetworkConfig(**about["network"]), Space(**about["space"]))
        network.load_state_dict(load((folder / WEIGHTS).read_bytes()))
        origin = Origin.from_json(about["codec"])
        classes = tuple(about["classes"])
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as exception:
        reason = f"{type(exception).__name__}: {exception}".splitlines()[0]
        raise ModelError(f"{folder}: damaged: {reason}") from exception
    network.requires_grad_(False).eval()
    return Stored(folder=folder, network=network, origin=origin, classes=classes, about=about)


def head_id(network: ConditionalHead) -> str:
    """Return what tells heads apart: 16 hex digits, SHA-256 over the tensors, sorted by name, as float16."""
    sha = hashlib.sha256(b"latent-codec head 0")
    for name, tensor in sorted(network.state_dict().items()):
        with np.errstate(over="ignore"):
            sha.update(name.encode() + b"\0" + tensor.float().cpu().numpy().astype("<f2").tobytes())
    return sha.hexdigest()[:16]


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
        "kind": KIND,
        "version": VERSION,
        "head_id": head_id(network),
        "network": dict(vars(network.config)),
        "space": network.space.to_json(),
        "classes": list(classes),
        "codec": origin.to_json(),
        **more,
    }
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(out / WEIGHTS, save(tensors))
    write_atomic(out / HEAD_JSON, (json.dumps(about, indent=2) + "\n").encode())
    return about


def is_head(folder: Path) -> bool:
    """Whether a folder is a head's."""
    try:
        return bool(read_json(folder / HEAD_JSON).get("kind") == KIND)
    except UsageError:
        return False
