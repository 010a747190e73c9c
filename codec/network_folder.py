"""A folder of a network of our own (a head, a prior): a JSON that says what it is, and its weights as safetensors.

    RUN/model/<about>      kind, version, id, and whatever the kind needs to build the network
    RUN/model/<weights>    its state dict, float32
    RUN/model/README.md    a card, of `codec-train`

Imports torch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from codec.errors import ModelError, UsageError
from codec.files import write_atomic
from codec.shards import read_json


@dataclass(frozen=True, kw_only=True)
class FolderKind:
    """What tells the folders of one kind of network.

    Attributes:
        name: "head": one word, for messages; the JSON says `latent-codec head`.
        version: of the folder, which has to be this one.
        about: name of the JSON.
        weights: name of the safetensors file.
        made_by: what writes such folders, for messages.
    """

    name: str
    version: int
    about: str
    weights: str
    made_by: str = "codec-train run writes to RUN/model"

    @property
    def kind(self) -> str:
        """What the JSON says that it is."""
        return f"latent-codec {self.name}"

    @property
    def id_key(self) -> str:
        """Where the JSON states the id of the weights."""
        return f"{self.name}_id"

    def is_at(self, folder: Path) -> bool:
        """Whether a folder is of this kind."""
        try:
            return bool(read_json(folder / self.about).get("kind") == self.kind)
        except UsageError:
            return False

    def open(self, path: Path) -> tuple[Path, dict[str, Any]]:
        """Find a folder, and read its JSON.

        Args:
            path: the folder, or the run that wrote it to `model`.

        Raises:
            ModelError: there is none, or one of another version.
        """
        folder = path if self.is_at(path) or not self.is_at(path / "model") else path / "model"
        if not self.is_at(folder):
            expected = f"expected {self.about} of {self.kind}, as {self.made_by}"
            raise ModelError(f"{path}: no {self.name} here ({expected})")
        about = read_json(folder / self.about)
        if about.get("version") != self.version:
            raise ModelError(f"{folder}: a {self.name} of version {about.get('version')}, expected {self.version}")
        return folder, about

    @contextmanager
    def reading(self, folder: Path) -> Iterator[None]:
        """Turn what damaged files raise while the context is open into a ModelError of one line."""
        try:
            yield
        except ModelError:
            raise
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as exception:
            reason = f"{type(exception).__name__}: {exception}".splitlines()[0]
            raise ModelError(f"{folder}: damaged: {reason}") from exception

    def fill(self, network: nn.Module, folder: Path, about: Mapping[str, Any]) -> str:
        """Read the weights of a folder into a network, which is then for inference alone; see `reading`.

        Args:
            network: of the right shapes.
            folder: where they lie.
            about: its JSON, which states their id.

        Returns:
            The id.

        Raises:
            ModelError: they are not those that the JSON states.
        """
        network.load_state_dict(load((folder / self.weights).read_bytes()))
        network.requires_grad_(False).eval()
        its_id, stated = self.id_of(network), about[self.id_key]
        if its_id != stated:
            raise ModelError(
                f"{folder}: {self.weights} has the {self.name} id {its_id}, not {stated}, which {self.about} states"
            )
        return its_id

    def id_of(self, network: nn.Module) -> str:
        """Return what tells networks apart: 16 hex digits, SHA-256 over the tensors, sorted by name, as float16."""
        sha = hashlib.sha256(f"{self.kind} 0".encode())
        for name, tensor in sorted(network.state_dict().items()):
            with np.errstate(over="ignore"):
                sha.update(name.encode() + b"\0" + tensor.float().cpu().numpy().astype("<f2").tobytes())
        return sha.hexdigest()[:16]

    def write(self, out: Path, network: nn.Module, about: Mapping[str, Any]) -> None:
        """Write weights and JSON.

        Args:
            out: the folder; created.
            network: the weights.
            about: the JSON's content.
        """
        write_tensors(out / self.weights, {name: tensor.float() for name, tensor in network.state_dict().items()})
        self.write_about(out, about)

    def write_about(self, out: Path, about: Mapping[str, Any]) -> None:
        """Write the JSON alone."""
        write_atomic(out / self.about, (json.dumps(about, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from wherever they lie to a safetensors file."""
    write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
