"""The codebook that indices in a cache, and a prior over them, belong to. Imports torch and diffusers.

Indices mean something only together with the encoder that chose them and the vectors that they number; a decoder that
is trained further still reads them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import model_folder
from codec.errors import ModelError
from codec.latent_model import CodebookModel, decoder_id, encoder_id, latent_model, load_network

VECTORS = "codebook.npy"
"""File in a cache of indices: the (K, d) float32 vectors that they number."""


def codebook_id(model: CodebookModel) -> str:
    """Return what tells codebooks apart: 16 hex digits, SHA-256 over the vectors and the levels of FSQ.

    Vectors count as float16, so that the float32 and the float16 folder of a model agree.
    """
    sha = hashlib.sha256(b"latent-codec codebook 0")
    sha.update(json.dumps([model.codebook_size, model.channels, list(model.fsq_levels)]).encode())
    vectors = model.codebook.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):  # beyond float16 is inf on both sides
        sha.update(np.ascontiguousarray(vectors, dtype="<f2").tobytes())
    return sha.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Whose indices these are.

    Attributes:
        name: of the model, for messages.
        size: K.
        codebook_id: 16 hex digits, of the vectors.
        encoder_id: 16 hex digits, of what chooses among them.
        decoder_id: 16 hex digits, of what makes images of them.
        f: downsampling factor.
    """

    name: str
    size: int
    codebook_id: str
    encoder_id: str
    decoder_id: str
    f: int

    @classmethod
    def of(cls, model: str | Path | torch.nn.Module, why: str) -> "Codebook":
        """Return that of a model; see `read`."""
        return cls.read(model, why)[0]

    @classmethod
    def read(cls, model: str | Path | torch.nn.Module, why: str) -> "tuple[Codebook, np.ndarray]":
        """Read a model folder, or take a diffusers network; return its vectors too, (K, d) float32.

        Args:
            model: the folder, the name of a model, or the network.
            why: what needs a codebook, for the message.

        Raises:
            ModelError: missing, damaged, or a model without a codebook, or with several.
        """
        if isinstance(model, torch.nn.Module):
            name, network = type(model).__name__, model
        else:
            folder = model_folder.resolve(model)
            name, network = str(folder), load_network(folder)
        adapter = latent_model(network)
        if not isinstance(adapter, CodebookModel):
            kind = type(network).__name__
            raise ModelError(
                f"{name}: no codebook, which {why}: latents of an {kind} are continuous; a VQModel has one"
            )
        if len(adapter.maps) != 1:
            kind = type(network).__name__
            raise ModelError(
                f"{name}: a {kind} has {len(adapter.maps)} codebooks: caches of indices and priors over them take one"
            )
        found = cls(
            name=name,
            size=adapter.codebook_size,
            codebook_id=codebook_id(adapter),
            encoder_id=encoder_id(network),
            decoder_id=decoder_id(network),
            f=adapter.f,
        )
        return found, adapter.codebook.detach().float().cpu().numpy()

    def require(self, model: "Codebook", where: str) -> None:
        """Refuse another model than the one whose indices these are; another decoder of it is fine.

        Args:
            model: what was given.
            where: what these indices are in, for the message.

        Raises:
            ModelError: its codebook or its encoder is another one.
        """
        for what in ("codebook_id", "encoder_id"):
            mine, other = getattr(self, what), getattr(model, what)
            if mine != other:
                part = what.removesuffix("_id")
                raise ModelError(
                    f"{where}: indices of {part} {mine} (model {self.name}), not of {other} ({model.name}): "
                    "the same number stands for something else there"
                )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Codebook":
        """Undo `to_json`."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})
