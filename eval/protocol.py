"""Named protocols: which images, through which crop, rounded how; hashed, so that results agree or say why not.

    photograph -> Protocol.prepare (the reference) -> codec or autoencoder -> 8 bits -> metrics of both

The reconstruction is always made from the prepared reference, so both have been through the same crop and resize.
Entry: `get`. Imports neither torch nor diffusers.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from codec.errors import ImageError, UsageError

ROUNDING = "round half to even to 8 bit RGB before every metric"
POSTERIORS = ("mode", "sample")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is done to images before anything is measured.

    Attributes:
        name: as on the command line.
        version: raised when its meaning changes.
        images: what it is meant for, for people.
        side: crop to side x side pixels after resizing the shorter side to it; 0 = whole images as they are.
        resize: "none"; "bicubic": Pillow's, filtered; "adm": halved by box filters while more than twice as large, then
            Pillow's bicubic, as in guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233).
        n_images: how many images the named set has; 0 = any number.
        sizes: (width, height) of its images, in any order of the two; empty = any.
    """

    name: str
    version: int = 1
    images: str
    side: int = 0
    resize: str = "none"
    n_images: int = 0
    sizes: tuple[tuple[int, int], ...] = ()

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return the reference of an image: (H, W, 3) uint8 sRGB in and out, (side, side, 3) where there is a side.

        Raises:
            ImageError: smaller than `side` (nothing is ever enlarged), or not of the size the protocol's images have.
        """
        height, width = image.shape[:2]
        if self.sizes and (width, height) not in self.sizes and (height, width) not in self.sizes:
            known = " or ".join(f"{w} x {h}" for w, h in self.sizes)
            raise ImageError(f"{width} x {height} pixels, protocol {self.name} has {known}: use --protocol folder")
        if not self.side:
            return image
        if min(height, width) < self.side:
            raise ImageError(f"{width} x {height} pixels, smaller than the {self.side} of protocol {self.name}")
        picture = Image.fromarray(image)
        if self.resize == "adm":
            while min(picture.size) >= 2 * self.side:
                picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        if min(picture.size) != self.side:
            scale = self.side / min(picture.size)
            size = (max(self.side, round(picture.width * scale)), max(self.side, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (picture.width - self.side) // 2, (picture.height - self.side) // 2
        return np.asarray(picture.crop((left, top, left + self.side, top + self.side)))

    def check_count(self, n_images: int) -> None:
        """Raise UsageError where a named set is measured in part, which would be another protocol."""
        if self.n_images and n_images != self.n_images:
            raise UsageError(
                f"protocol {self.name} is {self.n_images} images ({self.images}), got {n_images}: use --protocol folder"
            )

    def document(self, kind: str, metrics: Mapping[str, str], **further: Any) -> dict[str, Any]:
        """Return all that decides the numbers of a result, for the result and its hash.

        Args:
            kind: the command: "rd", "recon".
            metrics: metric's key -> how it is computed.
            further: what else decides: the posterior, how points are averaged.
        """
        resized = {
            "none": "whole images, no resize",
            "bicubic": f"shorter side to {self.side} (Pillow bicubic), centre crop {self.side} x {self.side}",
            "adm": f"halved by box filter while >= {2 * self.side}, shorter side to {self.side} (Pillow bicubic), "
            f"centre crop {self.side} x {self.side}",
        }
        return {
            "name": self.name,
            "version": self.version,
            "kind": kind,
            "crop": resized[self.resize] + "; reference and reconstruction alike",
            "rounding": ROUNDING,
            **further,
            "metrics": dict(metrics),
        }


def digest(document: Mapping[str, Any]) -> str:
    """Return the hash of a protocol's document, 16 hex digits."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="folder", images="any images, whole"),
        Protocol(name="folder-256", images="any images of at least 256 pixels", side=256, resize="bicubic"),
        Protocol(name="folder-512", images="any images of at least 512 pixels", side=512, resize="bicubic"),
        Protocol(name="folder-1024", images="any images of at least 1024 pixels", side=1024, resize="bicubic"),
        Protocol(name="kodak", images="the Kodak suite, kodim01-24, lossless", n_images=24, sizes=((768, 512),)),
        Protocol(
            name="imagenet256-val",
            images="ILSVRC 2012 validation images",
            side=256,
            resize="adm",
            n_images=50000,
        ),
        Protocol(name="coco2017-256", images="COCO val2017", side=256, resize="bicubic", n_images=5000),
    )
}


def get(name: str) -> Protocol:
    """Return a protocol by name.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    near = difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"--protocol: unknown {name!r}, expected one of {', '.join(PROTOCOLS)}{hint}")


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Sequence[str]:
    """Return where two protocol documents differ, a line each: `metrics.psnr: ... against ...`."""
    lines: list[str] = []
    for key in dict.fromkeys([*a, *b]):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            lines.append(f"{prefix}{key}: {one!r} against {other!r}")
    return lines
