"""`codec-train bench`: what a recipe's training costs here. Imports torch only when it measures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from codec import console
from codec.console import Exit
from codec.files import check_writable, write_atomic
from train.recipe import load_recipe

_SPEED = ("images/s", "TFLOP/s", "of peak")


def bench_command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a recipe of the package.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, e.g. data.shards=SHARDS.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a block, and batches for the loader; 1 or more.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Blocks of each side, which take turns; 1 or more.")] = 5,
    random: Annotated[
        bool, typer.Option("--random", help="Random tensors in place of images; needs no shards, skips the loader.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also measure with torch.compile (minutes to compile).")
    ] = True,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Double the batch until the GPU's memory is used up.")
    ] = False,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Peak of the hardware in TFLOP/s, 10^12.", show_default="by the GPU's name, dense bf16"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Write everything measured here, as JSON.")
    ] = None,
) -> int:
    """Measure a recipe: its step against a plain eager loop of the same losses, its loader against webdataset.

    Leaves no run folder behind. Set the threads with OMP_NUM_THREADS; measure on a machine that does nothing else.

    Example: codec-train bench small-f8c8 data.shards=shards -o bench.json
    """
    config = load_recipe(recipe, overrides or [])
    if out is not None:
        check_writable(out.parent)

    from train.bench import Effort, run_bench  # after the config is known to be good: torch takes seconds to import
    from train.journal import environment
    from train.trainer import TrainingError

    effort = Effort(steps=steps, repeats=repeats, compiled=compiled, largest=largest_batch)
    try:
        found = run_bench(config, effort, random=random, peak_tflops=peak_tflops, say=console.stderr.print)
    except TrainingError as exception:
        console.error(str(exception))
        return Exit.SOME_FAILED
    head = {"benchmark": "train", "recipe": Path(recipe).name, "steps": steps, "repeats": repeats}
    result = {**environment(), **head, **found}
    print("\n".join(table(result)))
    if out is not None:
        write_atomic(out, (json.dumps(result, indent=2) + "\n").encode())
        print(out)
    return Exit.OK


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines to print for a result of `train.bench.run_bench` with head and environment."""
    hardware = result["hardware"]
    lines = [
        f"{result['recipe']}: batch {result['batch_size']}, crop {result['crop']}, precision {result['precision']}, "
        f"{result['data']}, {result['gflop_per_image']:.4g} GFLOP an image; {hardware['gpu'] or hardware['cpu']}, "
        f"{hardware['threads']} thread(s); medians of {result['repeats']} blocks of {result['steps']}"
    ]
    if result["changed"]:
        changed = ", ".join(f"{name}={value}" for name, value in result["changed"].items())
        lines.append(f"changed, so that both sides compute the same: {changed}")
    lines += ["", _line("step", "ours s", "plain s", "plain/ours", *_SPEED)]
    lines += [_row(row, "ours_s", "plain_s", "plain_over_ours") for row in result["step"]]
    if "throughput" in result:
        lines += ["", _line("ours alone", "batch", "step s", "GB", *_SPEED)]
        lines += [_row(row, "batch_size", "ours_s", "peak_memory_gb") for row in result["throughput"]]
    if "loader" in result:
        lines += ["", *_loader_lines(result["loader"], result["step"])]
    return lines


def _loader_lines(loader: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[str]:
    formats = ", ".join(f"{n} {name}" for name, n in loader["formats"].items())
    lines = [
        f"loader, images/s: {formats} in {loader['n_shards']} shard(s), {loader['mean_megapixels']:.3g} megapixels and "
        f"{loader['mean_size_bytes'] / 1e3:.3g} kB on average",
        _line("workers", "ours", "webdataset", "decoding", "of wds", "of decoding", "of a step"),
    ]
    fastest = max((row["images_per_s"] for row in steps if "images_per_s" in row), default=None)
    for row in loader["rows"]:
        found = row["images_per_s"]
        needed = found["ours"] / fastest if fastest else None
        shares = (row["ours_over_webdataset"], row["share_of_decoding"], needed)
        lines.append(_line(str(row["workers"]), found["ours"], found["webdataset"], found["decoding"], *shares))
    return lines


def _row(row: Mapping[str, Any], *names: str) -> str:
    if "unavailable" in row:
        at = f"batch {row['batch_size']}: " if "batch_size" in row else ""
        return f"{row['setting']:<24} {at}n/a: {row['unavailable']}"
    return _line(row["setting"], *(row[name] for name in (*names, "images_per_s", "tflops", "share_of_peak")))


def _line(name: str, *cells: str | float | None) -> str:
    texts = ("n/a" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells)
    return f"{name:<24}" + "".join(f"{text:>12}" for text in texts)
