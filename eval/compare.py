"""Two results of `codec-eval`, compared image by image, or refused with the reasons.

    A.json, B.json -> refusals: none -> pairs of codecs -> rows of both on the same images -> B - A, bootstrap interval

Entry: `refusals`, then `compare`. Imports neither torch nor diffusers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.errors import UsageError
from eval import bootstrap
from eval.protocol import differences
from eval.results import read_json

Result = Mapping[str, Any]

LISTS = {"rd": "codecs", "recon": "models"}
"""Kind of result -> where its JSON lists what was measured."""
_DECIDING = (
    *("torch", "numpy", "Pillow", "imagecodecs", "scipy", "pytorch-msssim", "ssimulacra2", "flip-evaluator", "lpips"),
    *("DISTS-pytorch", "torchmetrics", "torch-fidelity", "torchvision", "transformers"),
)
"""Packages whose versions may move a number."""


def read(path: Path) -> dict[str, Any]:
    """Read a result that can be compared.

    Raises:
        UsageError: no such file, no JSON, not a result, or one of another command.
    """
    result = read_json(path)
    kind = result.get("kind")
    if not isinstance(kind, str):
        raise UsageError(f"{path}: not a result of codec-eval: it does not say of which kind it is")
    if kind not in LISTS:
        raise UsageError(f"{path}: a result of codec-eval {kind}; compare takes those of {' and '.join(LISTS)}")
    if not _is_whole(result, LISTS[kind], {"image", "quality"} if kind == "rd" else {"image"}):
        raise UsageError(f"{path}: a damaged result: its protocol, dataset or {LISTS[kind]} are not as expected")
    return result


def _is_whole(result: Result, entries: str, row_keys: set[str]) -> bool:
    """Whether all is there that is looked at."""
    protocol, dataset, found = result.get("protocol"), result.get("dataset"), result.get(entries)
    if not (isinstance(protocol, dict) and isinstance(dataset, dict) and isinstance(found, list)):
        return False
    if not isinstance(protocol.get("metrics"), dict):
        return False
    if not (isinstance(dataset.get("names"), list) and isinstance(dataset.get("sha256"), str)):
        return False
    return all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("rows", []), list)  # a curve read from a file has none
        and all(isinstance(row, dict) and row_keys <= set(row) for row in entry.get("rows", []))
        for entry in found
    )


def shared_metrics(a: Result, b: Result) -> list[str]:
    """Return the keys of the metrics that both results have; what only one has is no reason to refuse the others."""
    theirs = b["protocol"]["metrics"]
    return [key for key in a["protocol"]["metrics"] if key in theirs]


def refusals(a: Result, b: Result) -> list[str]:
    """Return why two results cannot be compared, a line each; none where they can.

    They cannot where the protocol, the images, or the settings or weights of a metric of both differ.
    """
    if a["kind"] != b["kind"]:
        return [f"kind: {a['kind']!r} against {b['kind']!r}"]
    keys = shared_metrics(a, b)
    first, second = (
        {**result["protocol"], "metrics": {key: result["protocol"]["metrics"][key] for key in keys}}
        for result in (a, b)
    )
    lines = list(differences(first, second, "protocol."))
    if not keys:
        lines.append("protocol.metrics: none in both")
    lines += [f"dataset: {line}" for line in _other_images(a["dataset"], b["dataset"])]
    weights = [result.get("weights") or {} for result in (a, b)]
    one, other = ({name: found[name] for name in found if name in keys} for found in weights)
    return lines + list(differences(one, other, "weights."))


def notes(a: Result, b: Result) -> list[str]:
    """Return what differs that may move numbers without making them another protocol: versions, number types."""
    versions = [
        {name: version for name, version in (result.get("versions") or {}).items() if name in _DECIDING}
        for result in (a, b)
    ]
    types = [
        {entry["name"]: (entry.get("description") or {}).get("dtype") for entry in result[LISTS[result["kind"]]]}
        for result in (a, b)
    ]
    shared = types[0].keys() & types[1].keys()
    one, other = ({f"{name} computes in": found[name] for name in sorted(shared)} for found in types)
    return [*differences(versions[0], versions[1], "version of "), *differences(one, other)]


def _other_images(a: Result, b: Result) -> list[str]:
    if a.get("sha256_of") != b.get("sha256_of"):
        return [f"hash of {a.get('sha256_of')!r} against hash of {b.get('sha256_of')!r}"]
    if a.get("sha256") == b.get("sha256"):
        return []
    one, other = ({str(name) for name in dataset["names"]} for dataset in (a, b))
    if one == other:
        return [f"{len(one)} images of the same names with other pixels, or in another order"]
    return [
        f"{len(a['names'])} images against {len(b['names'])}, {len(one & other)} of the same name"
        f"{_some(one - other, 'only in the first')}{_some(other - one, 'only in the second')}"
    ]


def _some(names: set[str], where: str) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:3])
    return f"; {where}: {shown}{' ...' if len(names) > 3 else ''}"


@dataclass(frozen=True)
class _Group:
    """What one codec of a result has at one setting.

    Attributes:
        name: of the codec or model.
        quality: of an rd result; "ceiling" for its autoencoder alone; None in a recon result.
        rows: one for each image.
        whole: metrics of the set as a whole, which no single image has.
    """

    name: str
    quality: int | str | None
    rows: Sequence[Mapping[str, Any]]
    whole: Mapping[str, Any]


def _groups(result: Result) -> Iterator[_Group]:
    for entry in result[LISTS[result["kind"]]]:
        rows = entry.get("rows", [])
        if result["kind"] == "recon":
            yield _Group(entry["name"], None, rows, entry.get("distribution") or {})
            continue
        for quality in dict.fromkeys(row["quality"] for row in rows):
            yield _Group(entry["name"], quality, [row for row in rows if row["quality"] == quality], {})
        if entry.get("ceiling_rows"):
            yield _Group(entry["name"], "ceiling", entry["ceiling_rows"], {})


def _pairs(a: Result, b: Result) -> list[tuple[_Group, _Group]]:
    """Pair what has the same name and quality; models of recon results that share no name, each with each."""
    first, second = list(_groups(a)), list(_groups(b))
    by_key = {(group.name, group.quality): group for group in second}
    pairs = [(one, by_key[one.name, one.quality]) for one in first if (one.name, one.quality) in by_key]
    if not pairs and a["kind"] == "recon":
        pairs = [(one, other) for one in first for other in second]
    if not pairs:
        raise UsageError(
            f"no codec of one name and quality in both: {', '.join(dict.fromkeys(group.name for group in first))} "
            f"against {', '.join(dict.fromkeys(group.name for group in second))}"
        )
    return pairs


def _alone(result: Result, paired: Sequence[_Group]) -> list[str]:
    met = {(group.name, group.quality) for group in paired}
    left = [(group.name, group.quality) for group in _groups(result) if (group.name, group.quality) not in met]
    return [name if quality is None else f"{name} at {quality}" for name, quality in left]


def compare(a: Result, b: Result) -> dict[str, Any]:
    """Return how two results differ which `refusals` has nothing against.

    Returns:
        "rows", one for each pair and metric: "a" and "b", means over the images that both have a value for, their
        "difference" b - a, the "interval" of it ([low, high]; None where there is none), "n_images", "beyond" (whether
        0 lies outside the interval; None without one) and "better" ("a", "b", or None where not beyond or unknown).
        "bd", of rd results: for each codec of both and each metric, BD-rate of B against A, see `eval.curves.bd`.
        "alone_a" and "alone_b": codecs, with their quality, and models that have no partner in the other result.
        "only_a" and "only_b": metrics that are in one of them. "notes": see `notes`.

    Raises:
        UsageError: nothing in both has one name and quality.
    """
    keys = shared_metrics(a, b)
    if a["kind"] == "rd":
        keys = ["bpp", *keys]
    names = [[str(name) for name in result["dataset"]["names"]] for result in (a, b)]
    index_of = [{name: index for index, name in enumerate(found)} for found in names]
    rows = []
    paired = _pairs(a, b)
    for one, other in paired:
        # Images have the same pixels in the same order; a folder may have been named from another place.
        found = [
            {index_of[side].get(str(row["image"])): row for row in group.rows}
            for side, group in enumerate((one, other))
        ]
        pairs = [(found[0][index], found[1][index]) for index in found[0] if index is not None and index in found[1]]
        about = {"a_name": one.name, "b_name": other.name, "quality": one.quality}
        for key in keys:
            if row := _row(key, pairs) or _whole(key, one.whole, other.whole):
                rows.append({**about, "metric": key, **row})
    return {
        "rows": rows,
        "bd": _bd(a, b, keys) if a["kind"] == "rd" else [],
        "alone_a": _alone(a, [one for one, _ in paired]),
        "alone_b": _alone(b, [other for _, other in paired]),
        "only_a": [key for key in a["protocol"]["metrics"] if key not in keys],
        "only_b": [key for key in b["protocol"]["metrics"] if key not in keys],
        "notes": notes(a, b),
        "interval": bootstrap.SETTINGS + ", of the differences on the same images",
    }


def _row(key: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any] | None:
    values = [(one[key], other[key]) for one, other in pairs if one.get(key) is not None and other.get(key) is not None]
    if not values:
        return None
    interval = bootstrap.interval([other - one for one, other in values])
    means = [sum(side) / len(values) for side in zip(*values, strict=True)]
    difference = sum(other - one for one, other in values) / len(values)
    beyond = None if interval is None else not interval[0] <= 0 <= interval[1]
    better = None
    if beyond and (higher := higher_is_better(key)) is not None:
        better = "b" if (difference > 0) == higher else "a"
    return {
        "a": means[0],
        "b": means[1],
        "difference": difference,
        "interval": None if interval is None else list(interval),
        "n_images": len(values),
        "beyond": beyond,
        "better": better,
    }


def _whole(key: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any] | None:
    if a.get(key) is None or b.get(key) is None:
        return None
    unknown = {"interval": None, "n_images": None, "beyond": None, "better": None}
    return {"a": a[key], "b": b[key], "difference": b[key] - a[key], **unknown}


def _bd(a: Result, b: Result, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the Bjontegaard differences of B against A for each codec that both have at several rates."""
    from eval.curves import Curve, bd
    from eval.metrics import METRICS

    theirs = {entry["name"]: entry for entry in b["codecs"]}
    rows = []
    for entry in a["codecs"]:
        other = theirs.get(entry["name"])
        if other is None or min(len(entry.get("points", [])), len(other.get("points", []))) < 2:
            continue
        for metric in METRICS:
            if metric.key in keys:
                row = bd(Curve.of(entry, metric), Curve.of(other, metric))
                rows.append({"metric": metric.key, **{key: row[key] for key in row if key != "anchor"}})
    return rows


def higher_is_better(key: str) -> bool | None:
    """Return whether more of a metric is better; None where that is not known."""
    from eval.metrics import METRICS

    known = {metric.key: metric.higher_is_better for metric in METRICS}
    return {"bpp": False, **known}.get(key)
