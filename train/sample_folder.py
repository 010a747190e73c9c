"""Folders of drawn images, one for each class, beside a sheet and a JSON: what `codec-eval generated` judges.

    OUT/<class>/NNN.png, OUT/sheet.png, OUT/samples.json

Must not import torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from codec.errors import UsageError
from codec.files import check_writable, write_atomic

if TYPE_CHECKING:
    import numpy as np

SAMPLES_JSON, SHEET_PNG = "samples.json", "sheet.png"
ANY = "any"
"""Name and folder of samples of no class."""
_SHOWN = 20  # images of a class in the sheet


def check_empty(out: Path) -> None:
    """Create a folder, or refuse one that cannot be written or holds something; raises UsageError."""
    check_writable(out)
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise UsageError(f"{out}: not empty; name another folder")


def chosen(asked: str | None, classes: Sequence[str]) -> list[str]:
    """Return the classes that a user names, each once.

    Args:
        asked: names separated by commas, `ANY` among them; None = all classes.
        classes: that there are.

    Raises:
        UsageError: another name, or none.
    """
    if asked is None:
        return list(classes) or [ANY]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in (*classes, ANY):
            raise UsageError(f"--classes: no class {name} among {', '.join(classes) or 'none'} (or {ANY})")
    if not names:
        raise UsageError("--classes: expected names separated by commas")
    return list(dict.fromkeys(names))


def counts_of(names: Sequence[str], per_class: int, n: int | None) -> dict[str, int]:
    """Return how many images of each class are to be drawn; classes of none are left out.

    Args:
        names: of the classes.
        per_class: of each.
        n: of all together, in place of that: as many of each, or one more of the first ones; None = `per_class`.
    """
    each, more = (per_class, 0) if n is None else divmod(n, len(names))
    found = {name: each + (number < more) for number, name in enumerate(names)}
    return {name: count for name, count in found.items() if count}


def folders_of(names: Sequence[str]) -> dict[str, str]:
    """Return a folder's name for each class; raises UsageError where two have the same."""
    found = {name: re.sub(r"[^\w.+ -]+", "_", name).strip(". ") or "class" for name in names}
    if len(set(found.values())) < len(found):
        raise UsageError(f"two classes of one folder among {', '.join(names)}; draw them one by one with --classes")
    return found


def write_images(out: Path, images: "Mapping[str, Sequence[np.ndarray]]", folders: Mapping[str, str]) -> None:
    """Write the images of each class, (H, W, 3) uint8, and a sheet of the first ones.

    Args:
        out: see `check_empty`.
        images: by class.
        folders: of `folders_of`.
    """
    from codec.images import save_png
    from eval.sheet import by_class, sheet

    for name, its in images.items():
        for number, pixels in enumerate(its):
            write_atomic(out / folders[name] / f"{number:03d}.png", save_png(pixels))
    write_atomic(out / SHEET_PNG, sheet(by_class(images, _SHOWN)))
