"""A blinded page of pairs: which of two files of equal size is closer to the original?

    images -> every codec at equal file size -> pairs, and controls -> shuffled by seed -> pairs/*.png, page.html
                                                                                        -> key.json, kept apart

Nothing but key.json says which codec made what. Entry: `make`; `eval.prefer_score` reads the answers.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from codec import images
from codec.console import progress, stderr
from codec.errors import ModelError, UsageError
from codec.files import Source, write_atomic
from eval.baselines import Baseline
from eval.crops import busiest
from eval.equal_size import Coded, at_equal_size, labels
from eval.measure import names_of
from eval.rd import Model
from eval.report_pages import data_uri, lossless, render
from eval.results import header, write_json

ORIGINAL = "(original)"
SPOILT = "(spoilt)"
_SPOILT_FACTOR = 16
_PICTURE = re.compile(r"[0-9a-f]{6}-[0-9]{3,}-(original|a|b)\.png")
PAGE_BYTES = 50_000_000  # a page above this is worth a note: phones may not open it


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which pairs are made.

    Attributes:
        bpp: bits per pixel to aim at; the first codec's file sets the size.
        seed: of the order of pairs, of the sides, and of the images with controls.
        crop: side in pixels of what is shown, around the busiest place; three of 384 stand side by side on a screen.
        max_difference: of two sizes, as a share of the larger; a pair beyond it is left out.
        control_share: controls per pair, 0 to 1; at least two are made unless it is 0.
        all_pairs: every codec against every other, instead of the first against each of the rest.
    """

    bpp: float = 0.3
    seed: int = 0
    crop: int = 384
    max_difference: float = 0.05
    control_share: float = 0.15
    all_pairs: bool = False


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two alternatives of one image, not yet on a side."""

    image: str
    kind: str  # "pair" or "control"
    codecs: tuple[str, str]  # of a control the first is the right one
    info: dict[str, Any]
    original: np.ndarray
    pixels: tuple[np.ndarray, np.ndarray]


@dataclass
class _Found:
    """What came out of the images."""

    pairs: list[_Pair] = field(default_factory=list)
    controls: list[_Pair] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


def make(
    sources: Sequence[Source],
    models: Sequence[Model],
    baselines: Sequence[Baseline],
    how: Pairing,
    out: Path,
    command: str = "",
) -> dict[str, Any]:
    """Write the pairs, the page and the key.

    Args:
        sources: the images.
        models: codecs, the first of which sets the size of an image's files.
        baselines: codecs; without a model the first of them sets the size.
        how: which pairs.
        out: gets pairs/<id>-original.png, -a.png, -b.png, page.html, answers.csv to fill in by hand, and key.json. The
            pairs of an earlier page in it are removed.
        command: the command line, for the record.

    Returns:
        The content of key.json.

    Raises:
        UsageError: fewer than two codecs, or no pair at all came out.
        ModelError: from a model.
    """
    if len(models) + len(baselines) < 2:
        raise UsageError("a preference needs at least two codecs: give -m more than once, or --baselines")
    found = _measure(sources, models, baselines, how)
    if not found.pairs:
        reasons = [failure["reason"] for failure in found.failed]
        reasons += [f"{item['image']}: sizes differ by {item['difference']:.0%}" for item in found.left_out]
        raise UsageError(f"no pair of equal size came out: {'; '.join(reasons[:3])}")
    rng = random.Random(how.seed)
    shuffled = [*found.pairs, *_chosen_controls(found, how, rng)]
    rng.shuffle(shuffled)
    sides = [rng.random() < 0.5 for _ in shuffled]
    page = _identity(shuffled, sides)
    pairs = [
        _write_pair(f"{page[:6]}-{number:03d}", pair, swapped, out / "pairs")
        for number, (pair, swapped) in enumerate(zip(shuffled, sides, strict=True), 1)
    ]
    names = {path.name for pair in pairs for path in (out / "pairs").glob(f"{pair['pair']}-*.png")}
    for path in (out / "pairs").iterdir():
        if _PICTURE.fullmatch(path.name) and path.name not in names:
            path.unlink()
    write_atomic(out / "page.html", _page(page, pairs, shuffled, sides))
    write_atomic(out / "answers.csv", "".join(["pair,choice\n", *(f"{pair['pair']},\n" for pair in pairs)]).encode())
    key = {
        **header("prefer", command),
        "page": page,
        "settings": asdict(how),
        "codecs": labels(models, baselines),
        "pairs": pairs,
        "left_out": found.left_out,
        "failed": found.failed,
    }
    write_json(key, out / "key.json")
    return key


def _measure(sources: Sequence[Source], models: Sequence[Model], baselines: Sequence[Baseline], how: Pairing) -> _Found:
    found = _Found()
    names = names_of(sources)
    with progress(disable=not stderr.is_terminal) as bar:
        for source, name in zip(bar.track(sources, description="pairs"), names, strict=True):
            try:
                x = images.load(source.path)
                coded = at_equal_size(x, models, baselines, how.bpp)
            except ModelError:
                raise
            except (ValueError, OSError, RuntimeError, MemoryError) as exception:
                reason = str(exception) or type(exception).__name__
                reason = reason if reason.startswith(str(source.path)) else f"{source.path}: {reason}"
                found.failed.append({"image": name, "path": str(source.path), "reason": reason})
                continue
            _add(found, name, x, coded, how)
    return found


def _add(found: _Found, name: str, x: np.ndarray, coded: Sequence[Coded], how: Pairing) -> None:
    """Make the pairs of one image, and the controls that may be chosen of it."""
    height, width = min(how.crop, x.shape[0]), min(how.crop, x.shape[1])
    top, left = busiest(x, height, width)

    def crop(pixels: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])

    where = {"crop": [left, top, width, height], "image_size": [x.shape[1], x.shape[0]]}
    couples = list(itertools.combinations(coded, 2))
    for a, b in couples if how.all_pairs else couples[: len(coded) - 1]:
        sizes = (a.size_bytes, b.size_bytes)
        difference = abs(sizes[0] - sizes[1]) / max(sizes)
        info: dict[str, Any] = {
            "size_bytes": list(sizes),
            "qualities": [a.quality, b.quality],
            "difference": difference,
        }
        if difference > how.max_difference:
            found.left_out.append({"image": name, "codecs": [a.codec, b.codec], **info})
        else:
            pixels = (crop(a.pixels), crop(b.pixels))
            found.pairs.append(_Pair(name, "pair", (a.codec, b.codec), info | where, crop(x), pixels))
    item = coded[len(found.controls) // 2 % len(coded)]  # each codec in turn
    info = {"size_bytes": [item.size_bytes], "qualities": [item.quality], **where}
    shown = crop(item.pixels)
    found.controls.append(_Pair(name, "control", (ORIGINAL, item.codec), info, crop(x), (crop(x), shown)))
    found.controls.append(_Pair(name, "control", (item.codec, SPOILT), info, crop(x), (shown, crop(spoilt(x)))))


def spoilt(x: np.ndarray) -> np.ndarray:
    """Return an image that nobody takes for the better one: reduced to a sixteenth of its sides and enlarged again."""
    picture = Image.fromarray(x)
    small = (max(1, picture.width // _SPOILT_FACTOR), max(1, picture.height // _SPOILT_FACTOR))
    return np.asarray(picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC))


def _chosen_controls(found: _Found, how: Pairing, rng: random.Random) -> list[_Pair]:
    """Return controls of both kinds in turn, each of another image as long as there are enough."""
    count = max(2, round(how.control_share * len(found.pairs))) if how.control_share else 0
    pool, chosen = list(found.controls), list[_Pair]()
    rng.shuffle(pool)
    while pool and len(chosen) < count:
        used = [pair.image for pair in chosen]
        is_original = len(chosen) % 2 == 0
        costs = [((pair.codecs[0] == ORIGINAL) != is_original, used.count(pair.image)) for pair in pool]
        chosen.append(pool.pop(costs.index(min(costs))))
    return chosen


def _identity(pairs: Sequence[_Pair], sides: Sequence[bool]) -> str:
    """Return the page's id, 16 hex digits: a hash of all that is shown, in order."""
    digest = hashlib.sha256()
    for pair, swapped in zip(pairs, sides, strict=True):
        for pixels in (pair.original, *_on_sides(pair, swapped)):
            digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
    return digest.hexdigest()[:16]


def _on_sides(pair: _Pair, swapped: bool) -> tuple[np.ndarray, np.ndarray]:
    first, second = pair.pixels
    return (second, first) if swapped else (first, second)


def _write_pair(name: str, pair: _Pair, swapped: bool, folder: Path) -> dict[str, Any]:
    """Write the three pictures of a pair, and return its entry of the key."""
    a, b = _on_sides(pair, swapped)
    for what, pixels in (("original", pair.original), ("a", a), ("b", b)):
        write_atomic(folder / f"{name}-{what}.png", images.save_png(pixels))
    first, second = pair.codecs
    codecs = {"a": second, "b": first} if swapped else {"a": first, "b": second}
    right = None if pair.kind == "pair" else ("b" if swapped else "a")
    info = {
        key: value[::-1] if swapped and key in ("size_bytes", "qualities") else value
        for key, value in pair.info.items()
    }
    return {"pair": name, "kind": pair.kind, "image": pair.image, **codecs, "right": right, **info}


def _page(page: str, entries: Sequence[dict[str, Any]], pairs: Sequence[_Pair], sides: Sequence[bool]) -> bytes:
    """Return the page: pictures and names of pairs, and nothing of the key."""
    shown = []
    for entry, pair, swapped in zip(entries, pairs, sides, strict=True):
        uris = [data_uri(lossless(pixels)) for pixels in (pair.original, *_on_sides(pair, swapped))]
        shown.append({"pair": entry["pair"], "original": uris[0], "a": uris[1], "b": uris[2]})
    return render("prefer", page=page, pairs=shown, title="Which is closer to the original?")
