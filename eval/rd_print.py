"""What `codec-eval rd` prints on stdout: the control, means of every codec, BD-rates, rates at equal metric."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codec.console import note
from eval.bootstrap import FEW
from eval.curves import MIN_OVERLAP, shown_digits, shown_unit
from eval.metrics import KNOWN, Metric

_NOT_THERE = "n/a"


def show(result: Mapping[str, Any]) -> None:
    """Print a result; a value that does not exist is n/a. What small images lack is said on stderr."""
    metrics = [KNOWN[key] for key in result["protocol"]["metrics"]]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 76 + 14 * len(metrics)  # rich would squeeze it into 80 columns
    if control := result["control"]:
        measured = ", ".join(f"{KNOWN[key].label} {_plain(value)}" for key, value in control["measured"].items())
        console.print(f"identity control, PNG round trip of {control['n_images']} images: {escape(measured)}")
    for key, small in result["undefined"].items():
        note(
            f"{KNOWN[key].label}: not defined for {small['n_images']} of {result['dataset']['n_images']} images, which "
            f"have a side below {small['least_side']} pixels; its means are of the others"
        )
    for line in _infinite(result, metrics):
        note(line)
    if 1 < result["dataset"]["n_images"] < FEW:
        note(f"note: of {result['dataset']['n_images']} images the 95 % intervals are narrower than they say")
    console.print(_means(result, metrics))
    comparisons = result["comparisons"]
    labels = {codec["name"]: codec["label"] for codec in result["codecs"]}
    compared = [metric for metric in metrics if metric.key in comparisons["metrics"]]
    if compared:
        console.print(_bd(comparisons, compared, labels))
        for reason in _reasons(comparisons, compared):
            console.print(escape(f"  {reason}"))
        for metric in compared:
            tables = comparisons["metrics"][metric.key]
            if tables["bpp_at_metric"]["levels"] or tables["metric_at_bpp"]["levels"]:  # none of single points
                console.print(_levels(tables, metric, labels))


def _infinite(result: Mapping[str, Any], metrics: Sequence[Metric]) -> Iterator[str]:
    n_images = result["dataset"]["n_images"]
    for metric in metrics:
        large = n_images - result["undefined"].get(metric.key, {"n_images": 0})["n_images"]
        points = [point for codec in result["codecs"] for point in codec["points"] if point.get("n_values")]
        fewest = min((point["n_values"][metric.key] for point in points), default=large)
        if fewest < large:
            yield (
                f"{metric.label}: infinite for up to {large - fewest} of {n_images} images at some quality; means are "
                "then of the others, and not compared"
            )


def _means(result: Mapping[str, Any], metrics: Sequence[Metric]) -> Table:
    dataset, protocol = result["dataset"], result["protocol"]
    table = Table(
        title=escape(
            f"{dataset['name']}: means of {dataset['n_images']} images, protocol {protocol['name']} "
            f"{result['protocol_hash']}"
        )
    )
    table.add_column("codec")
    for heading in ("quality", "bpp", *(metric.label for metric in metrics), "encode ms", "decode ms"):
        table.add_column(heading, justify="right")
    for codec in result["codecs"]:
        for point in codec["points"]:
            values = [_text(point[metric.key], metric.digits) for metric in metrics]
            times = [_text(None if point[key] is None else 1000 * point[key], 0) for key in ("encode_s", "decode_s")]
            quality = "-" if point["quality"] is None else str(point["quality"])
            table.add_row(escape(codec["label"]), quality, _text(point["bpp"], 3), *values, *times)
        if codec["ceiling"]:
            values = [_text(codec["ceiling"][metric.key], metric.digits) for metric in metrics]
            kl_bpp = codec["ceiling"]["kl_bpp"]
            rate = "" if kl_bpp is None else f"KL {kl_bpp:.3f}"
            table.add_row(escape(codec["label"]), "none", rate, *values, "", "")
        table.add_section()
    return table


def _bd(comparisons: Mapping[str, Any], metrics: Sequence[Metric], labels: Mapping[str, str]) -> Table:
    anchor = comparisons["anchor"]
    table = Table(title=escape(f"BD-rate against {labels[anchor]}, % (overlap of the curves, %); negative saves bits"))
    table.add_column("codec")
    for metric in metrics:
        table.add_column(metric.label, justify="right")
    for name, label in labels.items():
        if name != anchor:
            rows = [_row(comparisons, metric, name) for metric in metrics]
            table.add_row(escape(label), *map(_bd_cell, rows))
    return table


def _row(comparisons: Mapping[str, Any], metric: Metric, name: str) -> Mapping[str, Any]:
    pair = (name, comparisons["anchor"])
    rows = comparisons["metrics"][metric.key]["bd"]
    found: Mapping[str, Any] = next(row for row in rows if (row["codec"], row["anchor"]) == pair)
    return found


def _bd_cell(row: Mapping[str, Any]) -> str:
    overlap = "-" if row["overlap"] is None else f"{100 * row['overlap']:.0f}"
    if row["bd_rate_percent"] is None:
        return f"none ({overlap})"
    mark = "*" if row["overlap"] < MIN_OVERLAP else ""
    return f"{row['bd_rate_percent']:+.1f}{mark} ({overlap})"


def _reasons(comparisons: Mapping[str, Any], metrics: Sequence[Metric]) -> list[str]:
    """Say why figures are missing, each reason once, and what the mark means."""
    missing: dict[tuple[str, str], list[str]] = {}
    marked = False
    for metric in metrics:
        for row in comparisons["metrics"][metric.key]["bd"]:
            if row["anchor"] == comparisons["anchor"] and row["reason"]:
                if row["bd_rate_percent"] is None:
                    missing.setdefault((row["codec"], row["reason"]), []).append(metric.label)
                else:
                    marked = True
    lines = [f"none: {codec}, {', '.join(those)}: {reason}" for (codec, reason), those in missing.items()]
    if marked:
        lines.append(f"* less than {100 * MIN_OVERLAP:.0f} % of the curves' range is shared: says little")
    return lines


def _levels(tables: Mapping[str, Any], metric: Metric, labels: Mapping[str, str]) -> Table:
    by_metric, by_rate = tables["bpp_at_metric"], tables["metric_at_bpp"]
    unit = f" {shown_unit(metric)}" if shown_unit(metric) else ""
    table = Table(title=f"bpp at equal {metric.label}{unit}, and {metric.label}{unit} at equal bpp")
    table.add_column("codec")
    for level in by_metric["levels"]:
        table.add_column(f"{level:g}{unit}", justify="right")
    for level in by_rate["levels"]:
        table.add_column(f"{level:g} bpp", justify="right")
    digits = shown_digits(metric)
    for name, label in labels.items():
        rates = [_text(value, 3, "-") for value in by_metric["codecs"][name]]
        values = [_text(value, digits, "-") for value in by_rate["codecs"][name]]
        table.add_row(escape(label), *rates, *values)
    return table


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _text(value: float | None, digits: int, missing: str = _NOT_THERE) -> str:
    return missing if value is None else f"{value:.{digits}f}"
