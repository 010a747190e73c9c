"""What the tools of a head share: options, the head with its codec, images as it sees them, a JSON of what was done.

Imports torch only when it works.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec.console import Exit, error, note
from codec.errors import ImageError, NonFiniteError, UsageError
from train.sample_folder import ANY

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from codec.engine import Engine
    from codec.head import Head
    from codec.head.fitted_folder import StoredPrior
    from codec.head.network import Units
    from eval.class_folders import Photo

HeadPath = Annotated[Path, typer.Argument(metavar="HEAD", help="Run folder of a head, or the folder of the head.")]
Model = Annotated[
    str, typer.Option("-m", "--model", metavar="MODEL", help="The autoencoder whose latents the head learned.")
]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the results; older ones go.")]
Images = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the images; empty, or not there.")]
Classes = Annotated[
    str | None,
    typer.Option(
        help=f"Names separated by commas; {ANY}: of no class, unless one is called so.",
        show_default="all classes there are",
    ),
]
PerClass = Annotated[int, typer.Option(min=1, help="Images of each class.")]
Number = Annotated[
    int | None,
    typer.Option("--n", min=1, help="Images of all classes together, in place of --per-class.", show_default=False),
]
Temperature = Annotated[float, typer.Option(help="Of what is drawn: 0 or more, 1 = as it is distributed.")]
Sources = Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Files and folders, with all below them.")]
FlowSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps of a flow-matching decoder from noise to latents; default the head's own.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]
Guidance = Annotated[
    float, typer.Option(help="Weight of classifier-free guidance of the decoder; 0 or more, 1 = none.")
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="CLASS",
        help=f"What images are encoded as: a class, or {ANY} = without. Default: the folder that holds an image, where "
        "it is a class.",
        show_default=False,
    ),
]
As = Annotated[
    str,
    typer.Option(
        "--as",
        metavar="CLASS",
        help=f"What all images are encoded as: a class, or {ANY} = without, so that no class leaks.",
    ),
]


@dataclass(frozen=True)
class Opened:
    """A head and the codec whose latents it knows.

    Attributes:
        head: with its codec's device.
        engine: float32.
        folder: of the codec.
        device: as the user said.
    """

    head: "Head"
    engine: "Engine"
    folder: Path
    device: str

    def latents(self, photos: "Sequence[Photo]") -> "Tensor":
        """Return normalized latents, (B, D, h, w)."""
        return self.head.latents([photo.pixels for photo in photos], self.engine)

    def images(self, z: "Tensor") -> "list[np.ndarray]":
        """Return the images of normalized latents; raises UsageError where these are beyond what a number holds."""
        try:
            return self.head.images(z, self.engine)
        except NonFiniteError as exception:
            raise UsageError(f"{exception}: lower --guidance, --temperature or --range") from exception

    def decoded(
        self, units: "Units", c: Sequence[str | None], guidance: float = 1.0, seed: int = 0
    ) -> "list[np.ndarray]":
        """Return the images of units; a flow-matching decoder starts all of them from the same noise, of the seed."""
        z = self.head.decode(units, c, guidance=guidance, seed=seed, numbers=[0] * len(c))
        return self.images(z)

    def condition(self, name: str, option: str) -> str | None:
        """Return a class that the user named, None for `ANY`; raises UsageError for one that there is not."""
        return condition_of(self.head, name, option)

    def conditions(self, photos: "Sequence[Photo]", asked: str | None) -> list[str | None]:
        """Return what images are encoded under.

        Args:
            photos: labels are the folders that hold them.
            asked: a class or `ANY` for all; None = each one's folder, where it is a class.
        """
        if asked is not None:
            return [self.condition(asked, "--from")] * len(photos)
        found = [photo.label if photo.label in self.head.classes else None for photo in photos]
        if n := found.count(None):
            which = f"{n} of {len(photos)} images in no folder of a class"
            self.head.stored.require_none(which)
            if self.head.classes:
                note(f"note: {which}: encoded without a condition")
        return found

    def about(self, verb: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the JSON of every tool begins with.

        Args:
            verb: of the command.
            arguments: what follows it.
            options: name -> value, or list of values; None and False are left out.
        """
        origin = self.head.stored.origin
        return {
            **record(verb, arguments, {**options, "device": self.device}),
            "head": {"folder": str(self.head.stored.folder), "head_id": self.head.head_id},
            "model": {
                "folder": str(self.folder),
                "encoder_id": origin.encoder_id,
                "decoder_id": self.engine.decoder_id,
            },
        }


def use(head: "Head", path: Path) -> "StoredPrior":
    """Let a head draw units from a fitted prior, see `Head.use`; with a note where that knows less than the head."""
    stored = head.use(path)
    space = head.network.space
    if not stored.classes and (space.n_classes or space.embedding_width):
        note(f"note: {path}: an unconditional prior: units are drawn whatever the condition, which decodes them")
    return stored


def condition_of(head: "Head", name: str, option: str) -> str | None:
    """Return a class that the user named, None for `ANY`; raises UsageError for one that a head does not know."""
    if name == ANY and ANY not in head.classes:
        head.stored.require_none(f"{option} {ANY}")
        return None
    if name not in head.classes:
        known = ", ".join(head.classes) or "none"
        raise UsageError(f"{option}: {head.stored.folder}: no class {name} among {known} (or {ANY})")
    return name


def record(verb: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command and its settings, for a JSON; see `Opened.about`."""
    words = ["codec-train", "head", verb, *map(str, arguments)]
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one is not False:
                words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    settings = {name: _plain(value) for name, value in options.items() if name != "device"}
    return {"kind": f"head {verb}", "command": shlex.join(words), "settings": settings}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def open_both(path: Path, model: str, device: str, flow_steps: int | None = None, part: str = "encoder") -> Opened:
    """Read a head and its codec.

    Args:
        path: of the head, see `Head.load`.
        model: folder or name of the codec.
        device: where both run.
        flow_steps: of a flow-matching decoder; None = the head's own.
        part: "encoder" where images are to be encoded, else "decoder".

    Raises:
        ModelError: one of them is missing or damaged, or the head is of another codec.
    """
    from codec.engine import Engine, EngineConfig
    from codec.head import Head
    from codec.model_folder import resolve

    head = Head.load(path, device)
    folder = resolve(model)
    engine = Engine.load(folder, EngineConfig(device=str(head.device), dtype="float32"))
    head.stored.origin.require(engine, str(head.stored.folder), part)
    if flow_steps is not None:
        head.steps = flow_steps
    return Opened(head, engine, folder, device)


def not_negative(**values: float) -> None:
    """Raise UsageError for options that are not 0 or more; typer's own limits let NaN pass."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{name} {value}, expected 0 or more")


def read_images(sources: Sequence[Path], size: tuple[int, int], failed: list[str]) -> "list[Photo]":
    """Read images and bring them to a head's size as `codec-train cache` does: the largest square of the middle.

    Args:
        sources: files and folders.
        size: (H, W) of the head's images; where it is no square, images have to be of it.
        failed: takes a line for each image that cannot be used.

    Returns:
        All others; keys are paths below the sources, or whole paths where two would be the same; labels the folders
        that directly hold them.

    Raises:
        UsageError: a source is missing, or no image can be used.
    """
    from codec import files, images
    from eval.class_folders import Photo

    listed = files.find(sources, images.EXTENSIONS)
    relative = [str(source.relative) for source in listed]
    keys = relative if len(set(relative)) == len(relative) else [str(source.path) for source in listed]
    found = []
    for source, key in zip(listed, keys, strict=True):
        try:
            pixels = _prepared(source.path, size)
        except ImageError as exception:
            failed.append(str(exception))
        else:
            found.append(Photo(key, source.path.absolute().parent.name, pixels))
    if not found:
        raise UsageError(f"none of {len(listed)} images can be used; the first: {failed[0]}")
    return found


def read_image(path: Path, size: tuple[int, int]) -> "Photo":
    """Read one image, see `read_images`; raises ImageError where it cannot be used."""
    from eval.class_folders import Photo

    return Photo(path.name, path.absolute().parent.name, _prepared(path, size))


def _prepared(path: Path, size: tuple[int, int]) -> "np.ndarray":
    from codec import images
    from train.cache.source import Preprocessing

    picture = images.load_picture(images.read(path), name=str(path))
    height, width = size
    if height != width:
        if picture.size != (width, height):
            raise ImageError(f"{path}: {picture.width} x {picture.height} pixels, the head's are {width} x {height}")
        return Preprocessing(size=width).piece(picture, (0, 0, width, height))
    how = Preprocessing(size=height)
    return how.piece(picture, how.boxes(*picture.size, "")[0])


def exit_of(failed: Sequence[str], n: int) -> Exit:
    """Print what failed, of n images that were used; return the exit code."""
    for reason in failed:
        error(reason)
    if failed:
        error(f"{len(failed)} of {n + len(failed)} images failed; the others were used")
    return Exit.SOME_FAILED if failed else Exit.OK
