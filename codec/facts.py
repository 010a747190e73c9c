"""What is known of a model beside its weights: in codec.json, or in facts.json of a folder that has no codec.

Imports neither torch nor diffusers.
"""

import json
from pathlib import Path
from typing import Any

from codec.errors import ModelError
from codec.files import write_atomic
from codec.model_folder import CODEC_JSON

FACTS_JSON = "facts.json"


def read(folder: Path) -> dict[str, Any]:
    """Return all that is stored; empty where there is nothing.

    Raises:
        ModelError: the file is damaged.
    """
    path = _place(folder)
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exception:
        raise ModelError(f"{path}: cannot be read: {exception}") from exception
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def update(folder: Path, **facts: Any) -> None:
    """Store facts, each a plain JSON value, in place of what stood under their names; the others stay.

    Raises:
        ModelError: see `read`.
    """
    document = {**read(folder), **facts}
    write_atomic(_place(folder), (json.dumps(document, indent=2) + "\n").encode())


def _place(folder: Path) -> Path:
    codec_json = folder / CODEC_JSON
    return codec_json if codec_json.exists() else folder / FACTS_JSON
