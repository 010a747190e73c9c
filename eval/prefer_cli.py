"""`codec-eval prefer`: which codec is closer to the original, to somebody who looks? Imports torch only for models."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from codec.console import Exit, error, note
from codec.errors import UsageError
from codec.files import check_writable, find


def prefer_command(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES...",
            help="Images, or folders of images; with --score: files of answers.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder for the page; with --score for preferences.json, default there."),
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Score answers to the page in this folder.", show_default=False),
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option("-m", "--model", help="Folder or name; may be repeated.", show_default=False),
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="Classical codecs, of jpeg, webp, avif, jxl; '' for none.")
    ] = "jpeg,avif",
    bpp: Annotated[
        float, typer.Option(min=0.01, max=24, help="Rate to aim at, in bits per pixel of the whole file.")
    ] = 0.3,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs/--first-pairs", help="Every codec against every other, or only the first.")
    ] = False,
    max_difference: Annotated[
        float, typer.Option(min=0, max=1, help="Pairs whose sizes differ by a larger share are left out, 0 to 1.")
    ] = 0.05,
    crop: Annotated[int, typer.Option(min=64, max=4096, help="Side of what is shown, in pixels.")] = 384,
    controls: Annotated[
        float, typer.Option(min=0, max=1, help="Control pairs per pair, 0 to 1, at least two; 0 for none.")
    ] = 0.15,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of pairs and sides, 0 or more.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N images; default all.", show_default=False)
    ] = None,
    drop_flagged: Annotated[
        bool, typer.Option("--drop-flagged", help="With --score: judges who fail the controls do not count.")
    ] = False,
    device: Annotated[str, typer.Option(help="Torch device of the models: auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> int:
    """Make a blinded page of pairs at equal file size, or score the answers to it.

    OUT/page.html holds all it needs: send it to judges, who save answers.json. Whoever cannot use it looks at OUT/pairs
    and fills in OUT/answers.csv. OUT/key.json says what is what: keep it from the judges.

    Example: codec-eval prefer photos -m model --baselines avif,jpeg --bpp 0.3 -o pairs; later: codec-eval prefer
    --score pairs answers.json
    """
    if score is not None:
        return _score(score, files, drop_flagged, out)
    if out is None:
        raise UsageError("give a folder for the page with -o, or --score OUT with files of answers")
    from codec.images import EXTENSIONS
    from eval import baselines as classical

    check_writable(out)
    sources = find(files, EXTENSIONS)[:limit]
    chosen = classical.get([name.strip() for name in baselines.split(",") if name.strip()])
    if len(model or []) + len(chosen) < 2:
        raise UsageError("a preference needs at least two codecs: give -m and --baselines, or one of them twice")

    from eval.prefer import PAGE_BYTES, Pairing, make

    how = Pairing(
        bpp=bpp, seed=seed, crop=crop, max_difference=max_difference, control_share=controls, all_pairs=all_pairs
    )
    command = ["codec-eval", "prefer", *map(str, files), *(f"-m={folder}" for folder in model or [])]
    command += [f"--baselines={baselines}", f"--bpp={bpp}", "--all-pairs" if all_pairs else "--first-pairs"]
    command += [f"--max-difference={max_difference}", f"--crop={crop}", f"--controls={controls}", f"--seed={seed}"]
    command += [f"--limit={limit}"] * bool(limit) + [f"--device={device}", f"--out={out}"]
    key = make(sources, _load(model or [], device), chosen, how, out, shlex.join(command))
    for item in key["left_out"]:
        sizes = " and ".join(map(str, item["size_bytes"]))
        note(f"note: {item['image']}: {' against '.join(item['codecs'])} left out: {sizes} bytes")
    n_controls = sum(pair["kind"] == "control" for pair in key["pairs"])
    print(f"{len(key['pairs']) - n_controls} pairs and {n_controls} controls, page {key['page']}")
    size_bytes = (out / "page.html").stat().st_size
    if size_bytes > PAGE_BYTES:
        note(f"note: the page has {size_bytes / 1e6:.0f} MB; --limit and --crop make it smaller")
    for name in ("page.html", "pairs", "answers.csv", "key.json"):
        print(out / name)
    for failure in key["failed"]:
        error(failure["reason"])
    return Exit.SOME_FAILED if key["failed"] else Exit.OK


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines to print for a result of `eval.prefer_score.score`."""
    lines = []
    for judge in result["judges"]:
        flag = "  FLAGGED: fails the controls" if judge["flagged"] else ""
        lines.append(
            f"{judge['judge']}: {judge['n_answers']} answers (A {judge['n_a']}, B {judge['n_b']}, ties "
            f"{judge['n_ties']}), controls right {judge['n_controls_right']} of {judge['n_controls']}{flag}"
        )
    for row in result["preferences"]:
        (first, second), (low, high) = row["codecs"], row["interval"]
        lines += [
            "",
            f"{first} against {second}: {row['n']} answers on {row['n_images']} images, "
            f"wins {row['wins'][0]} and {row['wins'][1]}, ties {row['ties']}",
        ]
        if row["n"]:
            p = "" if row["p"] is None else f", p {row['p']:.3g}"
            lines.append(
                f"  {first} preferred in {row['share']:.1%}, interval {low:.1%} to {high:.1%}{p}; ties count half"
            )
        lines += [
            f"  {image['image']:<40} {image['wins'][0]:>3} {image['wins'][1]:>3} {image['ties']:>3}"
            for image in row["images"]
        ]
    return lines


def _score(folder: Path, files: Sequence[Path], drop_flagged: bool, out: Path | None) -> int:
    from eval.prefer_score import read_answers, read_key, score
    from eval.results import header, write_json

    key = read_key(folder)
    result = score(key, [read_answers(path, key) for path in files], drop_flagged)
    command = ["codec-eval", "prefer", f"--score={folder}", *map(str, files), *["--drop-flagged"] * drop_flagged]
    where = (out or folder) / "preferences.json"
    write_json({**header("preferences", shlex.join(command)), **result}, where)
    print("\n".join(table(result)))
    print(where)
    return Exit.OK


def _load(folders: Sequence[Path], device: str) -> list[Any]:
    if not folders:
        return []
    import codec

    return [codec.Codec.load(folder, device=device) for folder in folders]
