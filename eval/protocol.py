"""Named protocols: which images, through which crop, rounded how; hashed, so that results agree or say why not.

    photograph -> Protocol.prepare (the reference) -> codec or autoencoder -> 8 bits -> metrics of both

The reconstruction is always made from the prepared reference, so both have been through the same crop and resize.
Entry: `get`. Imports numpy and Pillow only when it prepares an image, so that a command's help can list the protocols.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codec.errors import ImageError, UsageError

if TYPE_CHECKING:
    import numpy as np

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
        resize: "none"; "bicubic": Pillow's, filtered; "adm": halved by box filters while at least twice as large, then
            Pillow's bicubic, as in guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233).
        enlarge: smaller images are enlarged to `side`, as where the protocol comes from; else they are refused.
        n_images: how many images the named set has; 0 = any number.
        sizes: (width, height) of its images, in any order of the two; empty = any.
    """

    name: str
    version: int = 1
    images: str
    side: int = 0
    resize: str = "none"
    enlarge: bool = False
    n_images: int = 0
    sizes: tuple[tuple[int, int], ...] = ()

    def prepare(self, image: "np.ndarray") -> "np.ndarray":
        """Return the reference of an image: (H, W, 3) uint8 sRGB in and out, (side, side, 3) where there is a side.

        Raises:
            ImageError: smaller than `side` and not to be enlarged, or not of the size the protocol's images have.
        """
        height, width = image.shape[:2]
        if self.sizes and (width, height) not in self.sizes and (height, width) not in self.sizes:
            known = " or ".join(f"{w} x {h}" for w, h in self.sizes)
            raise ImageError(f"{width} x {height} pixels, protocol {self.name} has {known}: use --protocol folder")
        if not self.side:
            return image
        if min(height, width) < self.side and not self.enlarge:
            raise ImageError(f"{width} x {height} pixels, smaller than the {self.side} of protocol {self.name}")
        import numpy as np
        from PIL import Image

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
            "small_images": "enlarged" if self.enlarge else "refused",
            "rounding": ROUNDING,
            **further,
            "metrics": dict(metrics),
        }


def digest(document: Mapping[str, Any]) -> str:
    """Return the hash of a protocol's document, 16 hex digits."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(side: int) -> Protocol:
    """Return the protocol `folder-<side>`."""
    return Protocol(name=f"folder-{side}", images=f"any images of at least {side} pixels", side=side, resize="bicubic")


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="folder", images="any images, whole"),
        *(folder_of(side) for side in (256, 512, 1024)),
        Protocol(name="kodak", images="the Kodak suite, kodim01-24, lossless", n_images=24, sizes=((768, 512),)),
        Protocol(
            name="imagenet256-val",
            images="ILSVRC 2012 validation images",
            side=256,
            resize="adm",
            enlarge=True,  # a few are smaller, and numbers of others are of all 50,000
            n_images=50000,
        ),
        Protocol(name="coco2017-256", images="COCO val2017", side=256, resize="bicubic", enlarge=True, n_images=5000),
    )
}


def get(name: str) -> Protocol:
    """Return a protocol by name; `folder-<side>` is there for every side.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if side := re.fullmatch(r"folder-([1-9]\d{0,4})", name):
        return folder_of(int(side[1]))
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
