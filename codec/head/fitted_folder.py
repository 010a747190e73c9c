"""The folder of a prior that was fitted after training: to the units of a head, or to the latents of an encoder.

    fitted.json           the prior's sizes, classes, whose units or latents, how it was fitted and what it is worth
    fitted.safetensors    its tensors

Imports torch and diffusers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from codec.engine import pick_device
from codec.errors import ModelError
from codec.head.conditions import conditions_of, generators
from codec.head.folder import Origin
from codec.head.second_stage import FittedPrior, restore
from codec.network_folder import FolderKind, write_tensors

FITTED = FolderKind(
    name="fitted prior",
    version=1,
    about="fitted.json",
    weights="fitted.safetensors",
    made_by="codec-train head fit writes it",
)


@dataclass(frozen=True, kw_only=True)
class StoredPrior:
    """What a folder holds.

    Attributes:
        folder: where from.
        prior: of vectors: a head's units of the first level, or normalized latents, flattened.
        prior_id: 16 hex digits, SHA-256 over its sizes and tensors.
        classes: names of the labels 0, 1, ...; empty where it has none.
        origin: whose latents.
        head_id: of the head whose units these are; "" = latents.
        shape: of what it draws, without the batch: (U,) or (D, h, w).
        about: the whole of fitted.json.
    """

    folder: Path
    prior: FittedPrior
    prior_id: str
    classes: tuple[str, ...]
    origin: Origin
    head_id: str
    shape: tuple[int, ...]
    about: Mapping[str, Any]

    def require_latents(self) -> None:
        """Raise ModelError for a prior of a head's units."""
        if self.head_id:
            raise ModelError(f"{self.folder}: a prior of the units of head {self.head_id}, not of latents")

    def require_head(self, head_id: str, classes: Sequence[str]) -> None:
        """Raise ModelError for a prior of latents, of another head's units, or of other classes."""
        if self.head_id != head_id:
            whose = f"the units of head {self.head_id}" if self.head_id else "latents, without a head"
            raise ModelError(f"{self.folder}: a prior of {whose}, not of the units of head {head_id}")
        if self.classes and self.classes != tuple(classes):
            raise ModelError(
                f"{self.folder}: classes {', '.join(self.classes)}, the head's are {', '.join(classes) or 'none'}"
            )

    @torch.inference_mode()
    def draw(
        self, c: Sequence[Any], *, temperature: float = 1.0, seed: int = 0, numbers: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Draw of it, (n, *shape) float32, where it lies.

        Args:
            c: of each draw the name or number of a class, or None = of any.
            temperature: of the noise: 1 = as it is distributed, 0 = the middle, of a component where it has some.
            seed: of all that is drawn.
            numbers: equal seed and number give the same draws, whatever else is drawn; None = 0, 1, ...

        Raises:
            UsageError: a class that it does not know.
            ValueError: a temperature below 0, or not one number for each.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature = {temperature}, allowed: >= 0")
        numbers = range(len(c)) if numbers is None else numbers
        if len(numbers) != len(c):
            raise ValueError(f"numbers: {len(numbers)}, expected {len(c)}")
        n_classes = self.prior.n_classes
        labels, hidden = conditions_of(c, len(c), self.classes, str(self.folder))
        rngs = generators(seed, numbers, "fitted")
        device = next((each.device for each in self.prior.state_dict().values()), torch.device("cpu"))
        noise = np.stack([rng.standard_normal(self.prior.n_units, dtype=np.float32) for rng in rngs])
        choice = torch.tensor([rng.random() for rng in rngs], dtype=torch.float32, device=device)
        told = labels.masked_fill(hidden, n_classes).to(device) if n_classes else None
        found = self.prior.draw(torch.from_numpy(noise).to(device), choice, told, temperature)
        return found.reshape(len(c), *self.shape)


def prior_id(prior: FittedPrior) -> str:
    """Return what tells fitted priors apart: 16 hex digits, SHA-256 over sizes and tensors, sorted by name."""
    sha = hashlib.sha256(b"latent-codec fitted prior 0")
    sha.update(json.dumps(prior.config(), sort_keys=True).encode())
    for name, tensor in sorted(prior.state_dict().items()):
        sha.update(name.encode() + b"\0" + tensor.float().cpu().numpy().astype("<f4").tobytes())
    return sha.hexdigest()[:16]


def write_fitted(
    out: Path,
    prior: FittedPrior,
    origin: Origin,
    classes: Sequence[str],
    of: tuple[str, Sequence[int]],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a fitted prior; return what stands in fitted.json.

    Args:
        out: the folder; created.
        prior: of first-level units, or of latents.
        origin: whose latents.
        classes: names of its labels; empty where it has none.
        of: id of the head whose units these are, "" = latents; and the shape of what it draws, (U,) or (D, h, w).
        more: what else fitted.json is to hold.
    """
    head_id, shape = of
    assert len(classes) == prior.n_classes, "a name for each label"
    about = {
        "kind": FITTED.kind,
        "version": FITTED.version,
        "prior_id": prior_id(prior),
        "prior": prior.config(),
        "classes": list(classes),
        "head_id": head_id,
        "shape": list(shape),
        "codec": origin.to_json(),
        **more,
    }
    write_tensors(out / FITTED.weights, prior.state_dict())
    FITTED.write_about(out, about)
    return about


def read_fitted(folder: Path, device: str | torch.device = "cpu") -> StoredPrior:
    """Read a fitted prior.

    Args:
        folder: of it.
        device: where it is to lie; "auto" takes the first GPU, or else the CPU.

    Raises:
        ModelError: missing, damaged, or something else.
        UsageError: there is no such device.
    """
    folder, about = FITTED.open(folder)
    with FITTED.reading(folder):
        weights = folder / FITTED.weights
        prior = restore(about["prior"], load(weights.read_bytes()), str(weights))
        classes, shape = tuple(about["classes"]), tuple(about["shape"])
        if len(classes) != prior.n_classes or int(np.prod(shape)) != prior.n_units:
            raise ValueError(f"{len(classes)} classes and shape {shape} do not belong to {about['prior']}")
        head_id, origin = str(about["head_id"]), Origin.from_json(about["codec"])
    prior.requires_grad_(False).to(pick_device(device) if isinstance(device, str) else device)
    return StoredPrior(
        folder=folder,
        prior=prior,
        prior_id=prior_id(prior),
        classes=classes,
        origin=origin,
        head_id=head_id,
        shape=shape,
        about=about,
    )
