"""What a latent cache takes from its source shards: the piece of each image, and the words beside it.

    image (H, W) -> boxes, a function of its size and SHA-256 -> pieces (size, size, 3) uint8
    KEY.txt, "caption" in KEY.json -> captions

Must not import torch: processes that only read and code import this.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from codec.errors import UsageError
from codec.shard_scan import StrictTarInfo
from codec.shards import SampleRef

VERSION = 1
"""Of the preprocessing: counted up when the same settings give other pixels."""

CENTRE = "centre"
_REDUCING_GAP = 3.0  # Pillow may halve an image first where that leaves 3 times the final size
_MAX_TEXT_BYTES = 2**20

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the upright image."""

Caption = str | list[str]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the squares that are encoded.

    Attributes:
        size: pixels a side, >= 1.
        crop: "centre": one square as large as the image has room, from its middle; "random:N", N >= 1: N squares, their
            sides log-uniform between `size` and the largest possible, placed at random, the same in every run.
    """

    size: int
    crop: str = CENTRE

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"--size {self.size}, expected 1 or more pixels")
        if self.crop != CENTRE and not re.fullmatch(r"random:[1-9]\d{0,3}", self.crop):
            raise UsageError(f"--crop {self.crop}, expected centre or random:N with N from 1 to 9999")

    @property
    def n_crops(self) -> int:
        """How many squares each image gives."""
        return 1 if self.crop == CENTRE else int(self.crop.partition(":")[2])

    def to_json(self) -> dict[str, Any]:
        """Return all that decides about the pixels."""
        filters = {"filter": "lanczos", "reducing_gap": _REDUCING_GAP, "colour": "sRGB, transparency on white"}
        return {"version": VERSION, "size": self.size, "crop": self.crop, **filters}

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`, 16 hex digits."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def boxes(self, width: int, height: int, sha256: str) -> list[Box]:
        """Return what is cut out of an image of this size and content."""
        short = min(width, height)
        if self.crop == CENTRE:
            left, top = (width - short) // 2, (height - short) // 2
            return [(left, top, left + short, top + short)]
        found = []
        for number in range(self.n_crops):
            rng = np.random.default_rng((int(sha256[:16], 16), number))
            least = min(self.size, short)
            side = min(short, round(least * (short / least) ** rng.random()))
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
            found.append((left, top, left + side, top + side))
        return found

    def piece(self, image: Image.Image, box: Box) -> np.ndarray:
        """Cut a box out of an RGB image and resize it: (size, size, 3) uint8. Pixels stay as they are where it fits."""
        if box[2] - box[0] == self.size:
            return np.asarray(image.crop(box))
        side = (self.size, self.size)
        return np.asarray(image.resize(side, Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP))


def read_captions(shard: Path) -> dict[str, Caption]:
    """Return the captions in a tar by member name without extension: KEY.txt, else "caption" in KEY.json.

    A tar that ends too early gives what stands before that.

    Raises:
        UsageError: it cannot be read.
    """
    texts: dict[str, Caption] = {}
    fields: dict[str, Caption] = {}
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                kind = path.suffix.lower()
                if kind not in (".txt", ".json") or not member.isreg() or member.size > _MAX_TEXT_BYTES:
                    continue
                file.seek(member.offset_data)
                found = _caption(kind, file.read(member.size))
                if found is not None:
                    (texts if kind == ".txt" else fields)[str(path.with_suffix(""))] = found
    except tarfile.TarError:  # the index of the shard has said so already
        pass
    except OSError as exception:
        raise UsageError(f"{shard}: cannot be read: {exception.strerror or exception}") from exception
    return fields | texts


def _caption(kind: str, data: bytes) -> Caption | None:
    try:
        found = data.decode().strip() if kind == ".txt" else json.loads(data)["caption"]
    except (ValueError, KeyError, TypeError):  # captions are optional, and so are other people's habits
        return None
    several = isinstance(found, list) and found and all(isinstance(text, str) for text in found)
    return found if several or (isinstance(found, str) and found) else None


def caption_of(ref: SampleRef, captions: dict[str, Caption]) -> Caption:
    """Return what `read_captions` found for an image; "" where there is none."""
    return next((captions[key] for key in _member_keys(ref) if key in captions), "")


def _member_keys(ref: SampleRef) -> Iterator[str]:
    """Names that the texts of an image may have in its tar; see `codec.shard_scan` about the keys of other's shards."""
    yield ref.key
    key = re.sub(r"#\d+$", "", ref.key.removeprefix(f"{ref.shard.stem}/"))
    yield key
    path = PurePosixPath(key)
    yield str(path.with_name(path.name.split(".")[0])) if path.name else key
