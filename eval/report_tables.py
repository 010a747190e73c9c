"""The tables of a report, as text: from results of `codec-eval rd` and `recon`. Imports neither torch nor numpy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.curves import shown_digits, shown_unit
from eval.metrics import METRICS, Metric
from eval.report_pictures import Worst
from eval.results import codebooks

NOT_THERE = "n/a"


@dataclass(frozen=True)
class Cell:
    """Text, and small text below it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        cells: as many as the head has.
        first: begins a group.
        show: the picture that it is about, its place in the viewer; None = none.
    """

    cells: Sequence[Cell]
    first: bool = False
    show: int | None = None


@dataclass(frozen=True)
class Table:
    """A table with its title, its head, and a sentence above it; a small one may stand beside another."""

    title: str
    head: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    small: bool = False


def tables(result: Mapping[str, Any], worst: Worst | None, places: Mapping[str, int]) -> list[Table]:
    """Return the tables of a result, those without rows left out.

    Args:
        result: the content of rd.json or recon.json.
        worst: the images for the table of the worst.
        places: image's name -> its place in the viewer.
    """
    found = [_points(result)] if "codecs" in result else [*_means(result)]
    found += _comparisons(result)
    found += [_worst(worst, places)] if worst else []
    return [table for table in found if table.rows]


def number(value: float | None, digits: int) -> str:
    """Return a number as text, n/a for none."""
    return NOT_THERE if value is None else f"{value:.{digits}f}"


def _present(values: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """Return the metrics that have a value anywhere, in the usual order."""
    return [known for known in METRICS if any(value.get(known.key) is not None for value in values)]


def _head(known: Metric) -> str:
    direction = "↑" if known.higher_is_better else "↓"
    return f"{known.label} {direction}" + (f" [{known.unit}]" if known.unit else "")


def _with_interval(values: Mapping[str, Any], intervals: Mapping[str, Any] | None, key: str, digits: int) -> Cell:
    value, ends = values.get(key), (intervals or {}).get(key)
    small = f"{number(ends[0], digits)} to {number(ends[1], digits)}" if ends and value is not None else ""
    return Cell(number(value, digits), small)


def _points(result: Mapping[str, Any]) -> Table:
    codecs = result["codecs"]
    points = [point for codec in codecs for point in codec["points"]]
    present = _present(points + [codec["ceiling"] for codec in codecs if codec.get("ceiling")])
    head = ["codec", "quality", "bpp", *map(_head, present), "encode [ms]", "decode [ms]"]
    columns = [("bpp", 3), *((known.key, known.digits) for known in present)]
    rows = []
    for codec in codecs:
        for index, point in enumerate(codec["points"]):
            values = [_with_interval(point, point.get("intervals"), *column) for column in columns]
            times = [Cell(number(None if (s := point.get(key)) is None else 1000 * s, 0)) for key in _TIMES]
            rows.append(
                Row(
                    [
                        Cell(codec["label"]),
                        Cell("–" if point["quality"] is None else str(point["quality"])),
                        *values,
                        *times,
                    ],
                    index == 0,
                )
            )
        if codec.get("ceiling"):
            ends = codec["ceiling"].get("intervals")
            values = [_with_interval(codec["ceiling"], ends, *column) for column in columns[1:]]
            empty = [Cell(""), Cell("")]
            rows.append(
                Row([Cell(codec["label"], "not quantised"), Cell("none"), _kl(codec["ceiling"]), *values, *empty])
            )
    note = "Means over the images at constant quality" + _intervals_note(result)
    return Table("Rate and distortion", head, rows, note + " ↑ higher is better, ↓ lower is better.")


_TIMES = ("encode_s", "decode_s")


def _kl(ceiling: Mapping[str, Any]) -> Cell:
    """Return the information in the posterior, which is the nearest thing to a rate that is not quantised."""
    bpp = ceiling.get("kl_bpp")
    return Cell("") if bpp is None else Cell(number(bpp, 3), "KL of the posterior")


def _intervals_note(result: Mapping[str, Any]) -> str:
    said = result.get("intervals")
    return f"; small: confidence interval, {said}." if isinstance(said, str) else "."


def _means(result: Mapping[str, Any]) -> Iterator[Table]:
    models = result["models"]
    present = _present([model["means"] for model in models])
    columns = [(known.key, known.digits) for known in present]
    rows = [
        Row([Cell(model["name"]), *(_with_interval(model["means"], model["intervals"], *column) for column in columns)])
        for model in models
    ]
    note = "Means over the images" + _intervals_note(result) + " ↑ higher is better, ↓ lower is better."
    yield Table("Reconstruction", ["model", *map(_head, present)], rows, note)
    keys = list(dict.fromkeys(key for model in models for key in model["distribution"]))
    if keys:
        rows = [
            Row([Cell(model["name"]), *(Cell(_value(model["distribution"].get(key))) for key in keys)])
            for model in models
        ]
        yield Table("Sets of images", ["model", *keys], rows, "Of all images together.")
    books = [
        (model["name"] if n == 0 else f"{model['name']}, index map {n + 1}", book)
        for model in models
        for n, book in enumerate(codebooks(model))
    ]
    if books:
        keys = list(books[0][1])
        rows = [Row([Cell(name), *(Cell(_value(book[key])) for key in keys)]) for name, book in books]
        yield Table("Codebooks", ["model", *keys], rows)


def _value(value: Any) -> str:
    """Return a value of JSON as text: numbers with four significant digits."""
    if value is None:
        return NOT_THERE
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(map(_value, value))
    return str(value)


def _comparisons(result: Mapping[str, Any]) -> Iterator[Table]:
    """Yield BD-rates against the anchor, and the tables of rates at equal metric and metrics at equal rate."""
    found = result.get("comparisons")
    if not found or not found["metrics"]:
        return
    labels = {codec["name"]: codec["label"] for codec in result["codecs"]}
    known = [metric for metric in METRICS if metric.key in found["metrics"]]
    anchor = found["anchor"]
    rows = []
    for name in (name for name in labels if name != anchor):
        cells = [Cell(labels[name])]
        for metric in known:
            pairs = found["metrics"][metric.key]["bd"]
            row = next((row for row in pairs if (row["codec"], row["anchor"]) == (name, anchor)), None)
            cells.append(_bd_cell(row))
        rows.append(Row(cells))
    note = (
        f"Mean difference of rate at equal metric against {labels.get(anchor, anchor)}, by Akima splines; negative"
        f" saves bits. Small: the shared part of the metric's range; a figure from less than "
        f"{100 * found['settings']['min_overlap']:.0f} % says little."
    )
    yield Table("BD-rate", ["codec", *(metric.label for metric in known)], rows, note)
    for metric in known:
        tables = found["metrics"][metric.key]
        unit = f" [{shown_unit(metric)}]" if shown_unit(metric) else ""
        if tables["bpp_at_metric"]["levels"]:
            yield _levels(f"bpp at equal {metric.label}{unit}", tables["bpp_at_metric"], labels, 3)
        if tables["metric_at_bpp"]["levels"]:
            yield _levels(f"{metric.label}{unit} at equal bpp", tables["metric_at_bpp"], labels, shown_digits(metric))


def _bd_cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None or row["bd_rate_percent"] is None:
        return Cell(NOT_THERE, "" if row is None else row["reason"] or "")
    return Cell(
        f"{row['bd_rate_percent']:+.1f} %",
        f"{'' if row['reason'] is None else 'little: '}{100 * row['overlap']:.0f} % shared",
    )


def _levels(title: str, table: Mapping[str, Any], labels: Mapping[str, str], digits: int) -> Table:
    rows = [
        Row(
            [Cell(labels.get(name, name)), *(Cell("–" if value is None else number(value, digits)) for value in values)]
        )
        for name, values in table["codecs"].items()
    ]
    return Table(
        title, ["codec", *(f"{level:g}" for level in table["levels"])], rows if table["levels"] else [], small=True
    )


def _worst(worst: Worst, places: Mapping[str, int]) -> Table:
    present = _present(worst.rows)
    has_rate = worst.quality is not None
    rows = []
    for row in worst.rows:
        values = [Cell(number(row.get(known.key), known.digits)) for known in present]
        rate = [Cell(number(row["bpp"], 3)), Cell(str(row["size_bytes"]))] if has_rate else []
        rows.append(Row([Cell(row["image"]), *rate, *values], show=places.get(row["image"])))
    at = f" at quality {worst.quality}" if has_rate else ""
    direction = "lowest" if worst.metric.higher_is_better else "highest"
    head = ["image", *(["bpp", "bytes"] if has_rate else []), *map(_head, present)]
    title = f"The worst {len(worst.rows)} images of {worst.codec}{at}"
    return Table(title, head, rows, f"By {worst.metric.label}, {direction} first.")
