"""`codec-eval bench`: how fast autoencoders and the coder are here. Imports torch only when it measures."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from codec import console
from codec.console import Exit
from codec.errors import UsageError
from codec.files import check_writable, write_atomic


def bench_command(
    images: Annotated[
        list[Path] | None, typer.Argument(help="For --what coder: images, or folders searched for images.")
    ] = None,
    what: Annotated[
        str, typer.Option(help="vae: encode and decode of diffusers' autoencoders; coder: the codec of a model.")
    ] = "vae",
    model: Annotated[
        Path | None,
        typer.Option(
            "-m",
            "--model",
            help="Folder or name; needed by --what coder.",
            show_default="SD's and Tiny, random weights",
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="vae: height and width in pixels.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="vae: images in a call.")] = 1,
    dtypes: Annotated[
        str, typer.Option(help="vae: of float32,bfloat16,float16.", show_default="float32 and the device's best")
    ] = "",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="vae: also with torch.compile; GPU only.")
    ] = False,
    qualities: Annotated[
        str, typer.Option("-q", "--qualities", help="coder: integers 0 to 100; not used of a VQ model.")
    ] = "10,50,90",
    repeats: Annotated[int, typer.Option(min=1, help="vae: timed calls of each side, which take turns.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch.", show_default="torch's own choice")
    ] = None,
    device: Annotated[str, typer.Option(help="vae: torch device: cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Write everything measured here, as JSON.")
    ] = None,
) -> int:
    """Measure speed, side by side in one process: diffusers as it is against `codec.fast`, or the coder.

    Measure on a machine that does nothing else. Times are medians; the first call of each side is not counted.

    Example: codec-eval bench --size 512 --threads 2 -o vae.json
    """
    if what not in ("vae", "coder"):
        raise UsageError(f"--what: {what!r}, expected vae or coder")
    if what == "coder" and (model is None or not images):
        raise UsageError("--what coder: needs a model (-m) and images")
    if what == "vae" and images:
        raise UsageError("--what vae: takes no images")
    if out is not None:
        check_writable(out.parent)
    command = ["codec-eval", "bench", *map(str, images or []), f"--what={what}", *[f"-m={model}"] * bool(model)]
    options = {"size": size, "batch": batch, "repeats": repeats, "device": device}
    if what == "vae":
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [f"--dtypes={dtypes}"] * bool(dtypes) + ["--compile"] * compiled
    else:
        command += [f"--qualities={qualities}"]
    command += [f"--threads={threads}"] * bool(threads) + [f"--out={out}"] * bool(out)
    with _threads(threads):
        if what == "vae":
            result = _vae({**options, "model": model, "dtypes": _names(dtypes), "compiled": compiled})
            print("\n".join(table(result)))
        else:
            assert model is not None
            result = _coder(model, images or [], _qualities(qualities))
            print("\n".join(coder_table(result)))
    result = {"command": shlex.join(command), **result}
    if out is not None:
        write_atomic(out, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        print(out)
    return Exit.OK


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines to print for a result of `eval.bench.run_vae`."""
    hardware, settings = result["hardware"], result["settings"]
    size = settings["size"]
    lines = [
        f"{size} x {size}, batch {settings['batch']}; {hardware['gpu'] or hardware['cpu']}, "
        f"{hardware['threads']} thread(s); medians of {settings['repeats']} turns; "
        "speed-up, PSNR and largest difference against diffusers in float32"
    ]
    before = None
    for row in result["rows"]:
        if (row["network"], row["operation"]) != before:
            before = (row["network"], row["operation"])
            lines += ["", _line(": ".join(before), "dtype", "s", "speed-up", "PSNR dB", "max diff")]
        lines.append(
            _line(
                f"  {row['side']}",
                row["dtype"],
                f"{row['median_s']:.4g}",
                f"{row['speedup']:.2f}x",
                "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
                "-" if row["max_difference"] is None else f"{row['max_difference']:.1e}",
            )
        )
    return lines


def coder_table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines to print for a result of `eval.bench_coder.run`."""
    lines = [f"{result['model']}: {result['n_images']} images; milliseconds for 24,576 latents", ""]
    lines.append(_line("", "quality", "bytes", "ideal", "encode ms", "decode ms"))
    for row in result["rows"]:
        if "entropy_bytes" in row:
            own = f"their own entropy {row['entropy_bytes']:.0f} bytes"
            lines.append(f"{row['n_latents']} indices of {row['codebook_size']}; {own}")
        for mode, ms in row["ms"].items():
            size, ideal = row[f"{mode}_bytes"], row[f"ideal_{mode}_bytes"]
            cells = (_quality(row), str(size), f"{ideal:.0f}", f"{ms['encode']:.3g}", f"{ms['decode']:.3g}")
            lines.append(_line(f"  {mode}", *cells))
        for level, found in row["effort"].items():
            cells = (str(row["quality"]), "-", f"{found['ideal_context_bytes']:.0f}", f"{found['ms']:.3g}", "-")
            lines.append(_line(f"  effort {level}, its search alone", *cells))
    return lines


def _quality(row: Mapping[str, Any]) -> str:
    return "-" if row["quality"] is None else str(row["quality"])


def _line(name: str, *cells: str) -> str:
    return f"{name:<38}" + "".join(f"{cell:>11}" for cell in cells)


def _vae(options: Mapping[str, Any]) -> dict[str, Any]:
    from eval.bench import VaeBench, run_vae

    return run_vae(VaeBench(**options), say=console.stderr.print)


def _coder(model: Path, images: Sequence[Path], qualities: Sequence[int]) -> dict[str, Any]:
    from codec import files
    from codec.images import EXTENSIONS
    from eval.bench_coder import run
    from eval.environment import commit, hardware, versions

    paths = [source.path for source in files.find(images, EXTENSIONS)]
    about = {"versions": versions(), "hardware": hardware(), "commit": commit()}
    return {"benchmark": "coder", **about, **run(model, paths, qualities)}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _qualities(text: str) -> list[int]:
    values = [int(name) for name in _names(text) if name.isdecimal()]
    if not values or len(values) != len(_names(text)) or max(values) > 100:
        raise UsageError(f"--qualities: expected integers from 0 to 100 separated by commas, got {text!r}")
    return values


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """Run with n of torch's threads; None = as many as it chose."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
