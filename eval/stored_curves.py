"""Rate-distortion curves in CompressAI's JSON: ours written for its plots, other people's read to stand beside ours.

    {"name", "description", "results": {"bpp": [...], "psnr-rgb": [...], "ms-ssim-rgb": [...],
                                        "encoding_time": [...], "decoding_time": [...]}}

Lists go from the coarsest quality to the finest; times are in seconds, MS-SSIM is not in dB. Imports no torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codec.errors import UsageError
from eval.results import read_json, write_json

_KEYS = {"psnr": ("psnr-rgb", "psnr"), "ms_ssim": ("ms-ssim-rgb", "ms-ssim")}  # ours -> theirs, newest first
_SOURCE = "codec-eval rd"
_TIMES = {"encode_s": "encoding_time", "decode_s": "decoding_time"}


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write one file for each codec that was measured; those that an earlier run wrote to the folder are removed.

    Other people's files stay, and so do those that this run read its stored curves from.

    Args:
        result: the content of rd.json.
        folder: gets <codec>.json.

    Returns:
        The files written.
    """
    if folder.is_dir():
        read_now = {Path(codec["description"]["file"]).resolve() for codec in _stored(result)}
        for path in folder.glob("*.json"):
            if path.resolve() not in read_now and _is_ours(path):
                path.unlink()
    written = []
    for codec in result["codecs"]:
        points = sorted((point for point in codec["points"] if point["bpp"]), key=lambda point: point["bpp"])
        if codec["kind"] == "file" or not points:
            continue
        name = re.sub(r"[^\w.()-]+", "_", codec["name"])
        path = folder / f"{name}.json"
        write_json(_document(result, codec, points), path)
        written.append(path)
    return written


def _stored(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [codec for codec in result["codecs"] if codec["kind"] == "file"]


def _is_ours(path: Path) -> bool:
    try:
        return str(read_json(path)["meta"]["source"]).startswith(_SOURCE)
    except (UsageError, KeyError, TypeError):
        return False


def _document(
    result: Mapping[str, Any], codec: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    results = {"bpp": [point["bpp"] for point in points]}
    for key, (theirs, *_) in _KEYS.items():
        values = [point.get(key) for point in points]
        if None not in values:  # their plots take no gaps
            results[theirs] = values
    results |= {theirs: [point[key] for point in points] for key, theirs in _TIMES.items()}
    dataset = result["dataset"]
    about = codec.get("flags") or f"model {codec['name']}"
    return {
        "name": codec["label"],
        "description": f"{about}; mean of {dataset['n_images']} images of {dataset['name']}",
        "results": results,
        "meta": {
            "dataset": dataset["name"],
            "dataset_sha256": dataset["sha256"],
            "protocol_hash": result["protocol_hash"],
            "qualities": [point["quality"] for point in points],
            "source": f"{_SOURCE}, commit {result['commit']}",
        },
    }


def read(path: Path) -> dict[str, Any]:
    """Read a stored curve as a codec of rd.json of kind "file": points without quality, no rows.

    Raises:
        UsageError: no such file, or its keys, lengths or numbers are not as expected; says which.
    """
    document = read_json(path)
    results = document.get("results")
    if not isinstance(results, dict) or "bpp" not in results:
        raise UsageError(f"{path}: not a curve in CompressAI's form: no results.bpp")
    columns = {"bpp": _numbers(path, results, "bpp")}
    for key, names in {**_KEYS, **{key: (name,) for key, name in _TIMES.items()}}.items():
        name = next((name for name in names if name in results), None)
        if name is not None:
            columns[key] = _numbers(path, results, name)
            if len(columns[key]) != len(columns["bpp"]):
                raise UsageError(f"{path}: {len(columns[key])} values of {name}, {len(columns['bpp'])} of bpp")
    if not columns.keys() & _KEYS.keys():
        raise UsageError(f"{path}: none of {', '.join(names[0] for names in _KEYS.values())} in it")
    if min(columns["bpp"]) <= 0:
        raise UsageError(f"{path}: results.bpp: expected numbers above 0, got {min(columns['bpp']):g}")
    if max(columns.get("ms_ssim", [0])) > 1:
        raise UsageError(f"{path}: MS-SSIM above 1: expected the index itself, not dB")
    name = str(document.get("name") or path.stem)
    points = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {
        "name": name,
        "label": f"{name} (file)",
        "kind": "file",
        "description": {"text": str(document.get("description") or ""), "file": str(path)},
        "points": [{"quality": None, **point} for point in sorted(points, key=lambda point: point["bpp"])],
        "ceiling": None,
        "rows": [],
        "ceiling_rows": [],
    }


def _numbers(path: Path, results: Mapping[str, Any], key: str) -> list[float]:
    values = results[key]
    if not isinstance(values, list) or not values:
        raise UsageError(f"{path}: results.{key}: expected a list of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{path}: results.{key}: expected finite numbers, got {value!r}")
    return [float(value) for value in values]
