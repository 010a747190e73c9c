"""`codec-train head interpolate`, `traverse`, `arithmetic`: ways through the units. Imports torch when it works."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec import options
from codec.console import Exit
from codec.errors import UsageError
from codec.files import check_writable, write_atomic
from train.head import tools
from train.sample_folder import ANY, SHEET_PNG, chosen

if TYPE_CHECKING:
    from codec.head.network import Units
    from eval.class_folders import Photo

KINDS = ("linear", "spherical")

Steps = Annotated[int, typer.Option(min=2, help="Images of a row, both ends among them; 2 or more.")]


def interpolate_command(
    head: tools.HeadPath,
    model: tools.Model,
    out: tools.Out,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE_A IMAGE_B]", help="Both ends; without, they are drawn.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="A,B", help="Draw both ends, by two seeds.", show_default=False)
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A[,B]",
            help=f"Of the ends, one for both or one each; {ANY} = without. Default: the images' folders, where they "
            f"are classes, else {ANY}.",
            show_default=False,
        ),
    ] = None,
    steps: Steps = 9,
    kind: Annotated[str, typer.Option(help=f"{' or '.join(KINDS)}.")] = "spherical",
    guidance: tools.Guidance = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of a flow-matching decoder's noise, the same all the way.")] = 0,
    flow_steps: tools.FlowSteps = None,
    device: options.Device = "auto",
) -> int:
    """Go from one image to another through the units: strip.png, interpolate.json.

    Each row is decoded under one class: of the first end, and of the second where it is another one.

    Example: codec-train head interpolate runs/head a.png b.png -m runs/first/model -o strip --steps 9
    """
    tools.not_negative(guidance=guidance)
    if kind not in KINDS:
        raise UsageError(f"--kind {kind}, expected {' or '.join(KINDS)}")
    two = images or []
    if len(two) != (0 if seeds else 2):
        raise UsageError(f"{len(two)} images{' and --seeds' if seeds else ''}, expected two images, or --seeds A,B")
    numbers = _numbers(seeds, "--seeds") if seeds else []
    if seeds and len(numbers) != 2:
        raise UsageError(f"--seeds {seeds}, expected two numbers, A,B")
    check_writable(out)

    from eval.results import write_json
    from eval.sheet import sheet
    from train.head.latent_walk import PATHS, Spread, between

    both = tools.open_both(head, model, device, flow_steps, "decoder" if seeds else "encoder")
    photos = [tools.read_image(path, both.head.size) for path in two]
    c = _ends(both, classes, photos)
    if photos:
        ends = [both.head.encode(both.latents([one]), [its]) for one, its in zip(photos, c, strict=True)]
    else:
        ends = [both.head.draw_units([its], seed=one, numbers=[0]) for one, its in zip(numbers, c, strict=True)]
    units = between(ends[0], ends[1], steps, PATHS[kind], Spread.of(both.head, c))
    rows = [("originals", [photo.pixels for photo in photos])] if photos else []
    for one in dict.fromkeys(c):
        rows.append((f"as {one or ANY}", both.decoded(units, [one] * steps, guidance, seed)))
    write_atomic(out / "strip.png", sheet(rows))
    given = {"out": out, "seeds": seeds, "classes": classes, "steps": steps, "kind": kind, "guidance": guidance}
    about = both.about("interpolate", [head, *two, "-m", model], given | {"seed": seed, "flow-steps": flow_steps})
    write_json({**about, "ends": [one or ANY for one in c]}, out / "interpolate.json")
    print(out / "strip.png")
    return Exit.OK


def traverse_command(
    head: tools.HeadPath,
    model: tools.Model,
    out: tools.Out,
    image: Annotated[
        Path | None, typer.Argument(metavar="[IMAGE]", help="Where it starts.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            help=f"Without an image: start in the middle of a class, or {ANY} = without. With one: what it is; default "
            "its folder, where that is a class.",
            show_default=False,
        ),
    ] = None,
    units: Annotated[
        str, typer.Option(metavar="N|A,B,...", help="The N units that change most, or these, counted from 0 (one: A,).")
    ] = "8",
    reach: Annotated[float, typer.Option("--range", help="How far, in deviations of the prior; above 0.")] = 3.0,
    steps: Steps = 7,
    guidance: tools.Guidance = 1.0,
    seed: tools.Seed = 0,
    flow_steps: tools.FlowSteps = None,
    device: options.Device = "auto",
) -> int:
    """Move single units of an image or a class, a row each: grid.png, traverse.json.

    A unit goes from -range to range deviations around the prior's mean, all others stay. The JSON says for each unit
    how much latents change between one deviation below and one above; those of a collapsed unit do not.

    Example: codec-train head traverse runs/head photos/hat/1.png -m runs/first/model -o grid --units 10
    """
    tools.not_negative(range=reach, guidance=guidance)
    if reach == 0:
        raise UsageError("--range 0.0, expected above 0")
    if image is None and name is None:
        raise UsageError("expected an image, or --class CLASS")
    asked = list(dict.fromkeys(_numbers(units, "--units")))
    check_writable(out)

    import torch

    from eval.results import write_json
    from eval.sheet import sheet
    from train.head.latent_walk import Spread, along, effects

    both = tools.open_both(head, model, device, flow_steps, "decoder" if image is None else "encoder")
    photos = [] if image is None else [tools.read_image(image, both.head.size)]
    (c,) = both.conditions(photos, None) if name is None else [both.condition(name, "--class")]
    base: Units
    if photos:
        base = both.head.encode(both.latents(photos), [c])
    else:
        base = both.head.draw_units([c], temperature=0.0, seed=seed, numbers=[0])
    spread = Spread.of(both.head, [c])
    found = effects(both.head, base, c, spread)
    n_units = len(found)
    if "," not in units:
        if asked[0] < 1:
            raise UsageError(f"--units {units}, expected 1 or more")
        asked = found.argsort(descending=True, stable=True)[: asked[0]].tolist()
    if wrong := [one for one in asked if one >= n_units]:
        raise UsageError(f"--units {wrong[0]}: the head has {n_units} units, 0 to {n_units - 1}")
    values = torch.linspace(-reach, reach, steps)
    rows: list[Any] = []
    for one in asked:
        moved = along(base, one, values, spread)
        rows.append((f"unit {one}", both.decoded(moved, [c] * steps, guidance, seed)))
    write_atomic(out / "grid.png", sheet(rows, f"{-reach:g} .. {reach:g} deviations, as {c or ANY}"))
    given = {"out": out, "class": name, "units": units, "range": reach, "steps": steps, "guidance": guidance}
    arguments = [head, *([] if image is None else [image]), "-m", model]
    about = both.about("traverse", arguments, given | {"seed": seed, "flow-steps": flow_steps})
    write_json({**about, "units": asked, "effects": found.tolist()}, out / "traverse.json")
    print(out / "grid.png")
    return Exit.OK


def arithmetic_command(
    head: tools.HeadPath,
    model: tools.Model,
    out: tools.Out,
    plus: Annotated[list[Path], typer.Option("--plus", metavar="IMAGE", help="An image whose units are added.")],
    minus: Annotated[list[Path], typer.Option("--minus", metavar="IMAGE", help="One whose units are taken away.")],
    name: Annotated[
        str | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            help=f"What the result is; {ANY} = without. Default: the folder of the first --plus, where it is a class.",
            show_default=False,
        ),
    ] = None,
    guidance: tools.Guidance = 1.0,
    seed: tools.Seed = 0,
    flow_steps: tools.FlowSteps = None,
    device: options.Device = "auto",
) -> int:
    """Add and subtract the units of images, a - b + c: result.png, sheet.png with what it is made of, arithmetic.json.

    There has to be one --plus more than there are --minus, so that the result lies where images do.

    Example: codec-train head arithmetic runs/head -m runs/first/model -o sum --plus a.png --minus b.png --plus c.png
    """
    tools.not_negative(guidance=guidance)
    if len(plus) != len(minus) + 1:
        raise UsageError(f"{len(plus)} --plus and {len(minus)} --minus, expected one --plus more")
    check_writable(out)

    from codec.images import save_png
    from eval.results import write_json
    from eval.sheet import sheet
    from train.head.latent_walk import combined

    both = tools.open_both(head, model, device, flow_steps)
    given_c = None if name is None else both.condition(name, "--class")
    photos = [tools.read_image(path, both.head.size) for path in (*plus, *minus)]
    c = both.conditions(photos, None)
    target = c[0] if name is None else given_c
    units = both.head.encode(both.latents(photos), c)
    summed = combined(units, [1.0] * len(plus) + [-1.0] * len(minus))
    remade = both.decoded(units, c, guidance, seed)
    (result,) = both.decoded(summed, [target], guidance, seed)
    signs = ["+"] * len(plus) + ["-"] * len(minus)
    rows = [(f"{sign} {one.key}", [one.pixels, made]) for sign, one, made in zip(signs, photos, remade, strict=True)]
    write_atomic(out / SHEET_PNG, sheet([*rows, (f"= as {target or ANY}", [result])], "original | reconstruction"))
    write_atomic(out / "result.png", save_png(result))
    given = {"out": out, "plus": plus, "minus": minus, "class": name, "guidance": guidance, "seed": seed}
    about = both.about("arithmetic", [head, "-m", model], given | {"flow-steps": flow_steps})
    write_json({**about, "as": target or ANY}, out / "arithmetic.json")
    print(out / "result.png")
    return Exit.OK


def _ends(both: tools.Opened, classes: str | None, photos: "list[Photo]") -> list[str | None]:
    """Return the condition of each end."""
    if classes is None:
        return both.conditions(photos, None) if photos else [both.condition(ANY, "--classes")] * 2
    names = chosen(classes, both.head.classes)
    if len(names) > 2:
        raise UsageError(f"--classes {classes}, expected one or two")
    return [both.condition(one, "--classes") for one in (names[0], names[-1])]


def _numbers(text: str, option: str) -> list[int]:
    """Return whole numbers separated by commas; raises UsageError for anything else."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"{option} {text}, expected whole numbers from 0 on, separated by commas")
    return [int(word) for word in words]
