"""Self-contained HTML pages from templates beside this file: everything escaped, nothing ever fetched.

    <name>.html + pages.css + <name>.js + values -> one page

The page carries a policy that allows its own style and script, by their hashes, and pictures inside the page. So a
script that came in with a file name would not run even if it were not escaped.
"""

import base64
import functools
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from eval.crops import busiest

_FOLDER = Path(__file__).parent


def render(name: str, **values: Any) -> bytes:
    """Fill a template.

    Args:
        name: "report" or "prefer": `<name>.html` and `<name>.js` of this package.
        values: what the template asks for; text is escaped, except where the template says that it is a picture.

    Returns:
        The page in UTF-8; characters that it cannot hold (of file names that are no text) are backslash escapes.
    """
    loader = jinja2.FileSystemLoader(_FOLDER)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = ((_FOLDER / file).read_text(encoding="utf-8") for file in ("pages.css", f"{name}.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = environment.get_template(f"{name}.html").render(style=style, script=script, policy=policy, **values)
    return page.encode("utf-8", "backslashreplace")


def lossless(pixels: np.ndarray, method: int = 2) -> bytes:
    """Return (H, W, 3) uint8 as the bytes of a lossless WebP, which every browser shows pixel by pixel.

    Args:
        pixels: (H, W, 3) uint8.
        method: 0 fastest to 6. Method 2 takes 0.1 s for 768x512; slower ones save no more than 2 %, 0 takes a third.
    """
    file = io.BytesIO()
    quality = 50 if method else 20
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, method=method, quality=quality, exact=True)
    return file.getvalue()


def data_uri(data: bytes, kind: str = "image/webp") -> str:
    """Return bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fit(
    pictures: Sequence[Sequence[np.ndarray]], max_bytes: int
) -> tuple[list[list[bytes]], list[tuple[int, int, int, int]]]:
    """Encode groups of equally large pictures losslessly, cut out around their busiest place until all fit.

    Args:
        pictures: groups of (H, W, 3) uint8; within a group all of one size. The first decides what is busy.
        max_bytes: for all together, as base64.

    Returns:
        The files, and for each group the (left, top, width, height) that was kept.
    """
    side = max((max(group[0].shape[:2]) for group in pictures), default=1)
    method = 0  # until it fits: quick, and never smaller than what is kept
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            boxes = [_box(group[0], side) for group in pictures]
            cut = [_cut(x, box) for group, box in zip(pictures, boxes, strict=True) for x in group]
            found = iter(list(pool.map(functools.partial(lossless, method=method), cut)))
            files = [[next(found) for _ in group] for group in pictures]
            n_bytes = sum(len(data_uri(file)) for group in files for file in group)
            if n_bytes > max_bytes and side > 64:
                side = max(64, min(side - 16, int(side * (0.97 * max_bytes / n_bytes) ** 0.5)))
            elif method:
                return files, boxes
            else:
                method = 2


def _cut(x: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    left, top, width, height = box
    return np.ascontiguousarray(x[top : top + height, left : left + width])


def _box(x: np.ndarray, side: int) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of the crop with the most detail; see `busiest`."""
    height, width = min(side, x.shape[0]), min(side, x.shape[1])
    top, left = busiest(x, height, width)
    return left, top, width, height


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
