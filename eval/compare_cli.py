"""`codec-eval compare`: two or more results side by side, or why they cannot be. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codec.console import Exit, error
from codec.errors import UsageError


def compare_command(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="A.json B.json...", help="Results of codec-eval rd or recon; all are compared with A."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")] = False,
) -> int:
    """Compare results of one protocol on the same images: differences per metric, with paired bootstrap intervals.

    Results of different protocols or images, or with metrics made by other weights, are refused (exit 2), a line for
    each difference. A metric that only one of them has is left out. Codecs and models of the same name are compared,
    those of rd at the same quality; models of recon results that have no name in common each with each.

    Example: codec-eval compare old/recon.json new/recon.json
    """
    from eval.compare import compare, read, refusals

    if len(results) < 2:
        raise UsageError(f"compare: expected at least two results, got {len(results)}")
    first, *others = [read(path) for path in results]
    reasons = [
        f"{results[0]} against {path}: {line}"
        for path, other in zip(results[1:], others, strict=True)
        for line in refusals(first, other)
    ]
    for reason in reasons:
        error(reason)
    if reasons:
        return Exit.USAGE
    compared = []
    for path, other in zip(results[1:], others, strict=True):
        compared.append({"a": str(results[0]), "b": str(path), "kind": first["kind"], **compare(first, other)})
    if as_json:
        print(json.dumps({"kind": "compare", "comparisons": compared}, indent=1, allow_nan=False))
        return Exit.OK
    for found in compared:
        _print(found)
    return Exit.OK


def _print(found: Mapping[str, Any]) -> None:
    from eval.bootstrap import FEW

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # rich would squeeze it into 80 columns
    table = Table(title=escape(f"A = {found['a']}   B = {found['b']}"))
    table.add_column("model" if found["kind"] == "recon" else "codec")
    for heading in ("quality", "metric", "A", "B", "B - A", "95 % of B - A", "images"):
        if heading != "quality" or found["kind"] == "rd":
            table.add_column(heading, justify="left" if heading == "metric" else "right")
    table.add_column("verdict")
    before = None
    for row in found["rows"]:
        about = (row["a_name"], row["b_name"], row["quality"])
        if before not in (None, about):
            table.add_section()
        name = row["a_name"] if row["a_name"] == row["b_name"] else f"{row['a_name']} -> {row['b_name']}"
        quality = [str(row["quality"])] * (found["kind"] == "rd")
        shown = [escape(name), *quality] if before != about else [""] * (1 + len(quality))
        before = about
        table.add_row(*shown, *_cells(row))
    console.print(table)
    for row in found["bd"]:
        if row["bd_rate_percent"] is None:
            figure = f"none ({row['reason']})"
        else:
            overlap = f"overlap of the curves {100 * row['overlap']:.0f} %{'; says little' if row['reason'] else ''}"
            figure = f"{row['bd_rate_percent']:+.2f} % ({overlap})"
        print(f"BD-rate of B against A, {row['codec']}, {row['metric']}: {figure}")
    for side in "ab":
        if alone := found[f"alone_{side}"]:
            print(f"only in {side.upper()}, with nothing to compare it with: {', '.join(alone)}")
        if only := found[f"only_{side}"]:
            print(f"only in {side.upper()}, not compared: {', '.join(only)}")
    for line in found["notes"]:
        print(f"note: {line}: may move the numbers")
    print(f"interval: {found['interval']}; a verdict only where 0 lies outside it")
    fewest = min((row["n_images"] for row in found["rows"] if row["n_images"] is not None), default=FEW)
    if 1 < fewest < FEW:
        print(f"note: of {fewest} images such an interval is narrower than it says: its verdicts are hints")


def _cells(row: Mapping[str, Any]) -> list[str]:
    interval = "n/a" if row["interval"] is None else "{:+.4g} .. {:+.4g}".format(*row["interval"])
    if row["beyond"] is None:
        verdict = "no interval"
    elif not row["beyond"]:
        verdict = "within the interval"
    else:
        verdict = {"a": "A better", "b": "B better", None: "beyond the interval"}[row["better"]]
    n_images = "all" if row["n_images"] is None else str(row["n_images"])
    values = [f"{row[key]:.5g}" for key in ("a", "b")]
    return [row["metric"], *values, f"{row['difference']:+.4g}", interval, n_images, verdict]
