"""What the commands that look at a latent cache share: their options, and the cache as a head or a prior sees it.

Imports torch only when it works.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from codec.console import note
from codec.errors import ModelError, UsageError
from train.head.config import LatentDataConfig

if TYPE_CHECKING:
    from codec.head import Head
    from train.head.latents import HeadData

Cache = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of codec-train cache, of latents.")]
Embeddings = Annotated[
    Path | None,
    typer.Option(help="Of a head whose conditions are embeddings: as data.embeddings.", show_default=False),
]
HeldOut = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Images of CACHE that are only measured on, chosen by a hash of their bytes: as data.n_validation.",
        show_default="as many as the head held out, else 200",
    ),
]
HeldOutCache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Measure on this cache instead: as data.validation_cache.", show_default=False),
]

_HELD_OUT = 200


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a user says about the latents; None where nothing is said.

    Attributes:
        cache: folder of the latents.
        held_out: images that are only measured on.
        held_out_cache: another folder, of those.
        embeddings: of a head whose conditions they are.
        mirror: whether images' mirrors are learned from.
    """

    cache: Path
    held_out: int | None = None
    held_out_cache: Path | None = None
    embeddings: Path | None = None
    mirror: bool | None = None

    def config(self, condition: Literal["class", "embedding", "none"], n: int, mirror: bool) -> LatentDataConfig:
        """Return the part of a recipe that reads the same; n, mirror: where nothing is said."""
        given = "" if self.embeddings is None else str(self.embeddings)
        if condition == "embedding" and not given:
            raise UsageError("--embeddings: the head's conditions are embeddings, expected the file of these images'")
        if condition != "embedding" and given:
            raise UsageError("--embeddings: the head's conditions are none, expected it left out")
        return LatentDataConfig(
            cache=str(self.cache),
            validation_cache="" if self.held_out_cache is None else str(self.held_out_cache),
            n_validation=self.held_out or n,
            mirror=mirror if self.mirror is None else self.mirror,
            condition=condition,
            embeddings=given,
        )


def data_of_head(head: "Head", source: Source) -> "HeadData":
    """Read latents with the conditions and classes of a head.

    Raises:
        UsageError: a class that the head does not know; see `train.head.latents.load_data` for more.
        ModelError: latents of another encoder, normalized otherwise, or of another shape than the head's.
    """
    from codec.latent_model import normalisation_to_json
    from train.head.latents import load_data

    space, about, folder = head.network.space, head.stored.about, head.stored.folder
    condition: Literal["class", "embedding", "none"] = "class" if space.n_classes else "none"
    condition = "embedding" if space.embedding_width else condition
    n_then = about.get("n_held_out")
    config = source.config(condition, n_then or _HELD_OUT, about.get("mirrored", False))
    data = load_data(config, head.classes or None)
    mine, its = head.stored.origin, data.origin
    if its.encoder_id != mine.encoder_id:
        raise ModelError(
            f"{folder}: latents of encoder {mine.encoder_id} (model {mine.model}), {source.cache} of {its.encoder_id} "
            f"({its.model})"
        )
    if normalisation_to_json(its.normalisation) != normalisation_to_json(mine.normalisation):
        raise ModelError(f"{folder}: latents normalized otherwise than {source.cache}: was scaling_factor changed?")
    if data.space != space:
        raise ModelError(
            f"{folder}: of latents and conditions {space.to_json()}, {source.cache}: {data.space.to_json()}"
        )
    if n_then is not None and len(data.held_out) != n_then and source.held_out_cache is None:
        n = len(data.held_out)
        note(f"note: {folder} held out {n_then} samples, here {n}: it may have learned from some of them")
    return data


def data_of_codec(source: Source, unconditional: bool) -> "HeadData":
    """Read latents without a head, with their classes where the cache has some and they are asked for."""
    from train.cache.reader import CacheReader
    from train.head.latents import load_data

    reader = CacheReader(source.cache)
    by_class = not unconditional and bool(reader.header["classes"])
    if not by_class and not unconditional:
        note(f"note: {source.cache}: no sample has a class: the prior is unconditional")
    try:
        return load_data(source.config("class" if by_class else "none", _HELD_OUT, mirror=False))
    except UsageError as exception:
        if by_class and "have no class" in str(exception):
            raise UsageError(f"{exception}; --unconditional does without") from exception
        raise
