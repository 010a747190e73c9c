"""What every result of `codec-eval` says beside its numbers, and its JSON. Imports neither torch nor diffusers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codec.errors import UsageError
from codec.files import write_atomic
from eval.environment import commit, hardware, versions


def header(kind: str, command: str) -> dict[str, Any]:
    """Return the head of a result.

    Args:
        kind: the command that made it: "rd", "recon", "latents" ...
        command: the whole command line.
    """
    return {
        "kind": kind,
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
    }


def codebooks(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how the codebook of each index map is used, of a model in recon.json; empty without a codebook."""
    return model.get("codebooks") or [book for book in [model.get("codebook")] if book]


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result atomically; infinities and NaN, which JSON does not have, become null."""
    write_atomic(path, (json.dumps(finite(result), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        UsageError: there is no such file, or it is no JSON object.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exception:
        raise UsageError(f"{path}: cannot be read as a result: {exception}") from exception
    if not isinstance(result, dict):
        raise UsageError(f"{path}: not a result of codec-eval: expected a JSON object, got {type(result).__name__}")
    return result


def finite(value: Any) -> Any:
    """Replace infinities and NaN in nested dicts and lists by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
