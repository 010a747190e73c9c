"""`codec-train head sample` and `edit`: images of classes, and images as other classes. Imports torch when it works."""

from pathlib import Path
from typing import Annotated, Any

import typer

from codec import options
from codec.console import Exit, progress
from codec.files import check_writable, write_atomic
from train.head import tools
from train.sample_folder import ANY, SAMPLES_JSON, SHEET_PNG, check_empty, chosen, folders_of, write_images

_ROWS = 32  # images in the sheet of `edit`


def sample_command(
    head: tools.HeadPath,
    model: tools.Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the images; empty, or not there.")],
    classes: Annotated[
        str | None,
        typer.Option(
            help=f"Names separated by commas; {ANY}: of no class, unless one is called so.",
            show_default="all classes of the head",
        ),
    ] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 20,
    temperature: Annotated[float, typer.Option(help="Of the units: 0 or more, 1 = as they are distributed.")] = 1.0,
    guidance: tools.Guidance = 1.0,
    seed: tools.Seed = 0,
    flow_steps: tools.FlowSteps = None,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once; changes memory and time.")] = 32,
    device: options.Device = "auto",
) -> int:
    """Draw images: OUT/<class>/NNN.png, sheet.png with a row for each class, samples.json with settings and ids.

    Image number N has the same draws in every class, whatever the number of images and the other classes. Another
    --batch or --per-class may round a pixel by a level.

    Example: codec-train head sample runs/head -m runs/first/model -o samples --per-class 20 --guidance 2
    """
    tools.not_negative(temperature=temperature, guidance=guidance)
    check_empty(out)

    from eval.results import write_json

    both = tools.open_both(head, model, device, flow_steps, "decoder")
    both.head.batch = batch
    names = chosen(classes, both.head.classes)
    folders = folders_of(names)
    conditions = [both.condition(name, "--classes") for name in names]
    how: dict[str, Any] = {"temperature": temperature, "guidance": guidance, "seed": seed}
    images: dict[str, Any] = {}
    with progress() as bar:
        task = bar.add_task("drawing", total=len(names))
        for name, one in zip(names, conditions, strict=True):
            images[name] = both.images(both.head.sample([one] * per_class, **how))
            bar.advance(task)
    write_images(out, images, folders)
    given = {"out": out, "classes": classes, "per-class": per_class, "temperature": temperature, "guidance": guidance}
    given |= {"seed": seed, "flow-steps": flow_steps, "batch": batch}
    about = both.about("sample", [head, "-m", model], given)
    write_json({**about, "classes": folders, "per_class": per_class}, out / SAMPLES_JSON)
    print(f"{out}: {per_class} images of each of {len(names)} classes; {out / SHEET_PNG}")
    return Exit.OK


def edit_command(
    head: tools.HeadPath,
    images: tools.Sources,
    model: tools.Model,
    out: tools.Out,
    to: Annotated[str, typer.Option("--to", metavar="CLASS", help=f"What they become: a class, or {ANY} = without.")],
    source: tools.From = None,
    guidance: tools.Guidance = 1.0,
    seed: tools.Seed = 0,
    flow_steps: tools.FlowSteps = None,
    device: options.Device = "auto",
) -> int:
    """Show images as another class: their units stay, the condition changes. OUT/edited/*.png, sheet.png, edit.json.

    A row of the sheet: the original, what the head makes of it, the same under the other class.

    Example: codec-train head edit runs/head photos/shirt -m runs/first/model -o edited --to coat
    """
    tools.not_negative(guidance=guidance)
    check_writable(out)

    from codec.images import save_png
    from eval.results import write_json
    from eval.sheet import sheet

    both = tools.open_both(head, model, device, flow_steps)
    target = both.condition(to, "--to")
    if source is not None:
        both.condition(source, "--from")
    failed: list[str] = []
    photos = tools.read_images(images, both.head.size, failed)
    c, n = both.conditions(photos, source), len(photos)
    units = both.head.encode(both.latents(photos), c)
    remade, edited = (both.decoded(units, each, guidance, seed) for each in (c, [target] * n))
    rows = []
    for number, (photo, name, pixels) in enumerate(zip(photos, c, edited, strict=True)):
        file = f"edited/{number:03d}-{Path(photo.key).stem}.png"
        write_atomic(out / file, save_png(pixels))
        rows.append({"image": photo.key, "from": ANY if name is None else name, "file": file})
    cells = [(name or ANY, [photo.pixels, *pair]) for photo, name, *pair in zip(photos, c, remade, edited, strict=True)]
    write_atomic(out / SHEET_PNG, sheet(cells[:_ROWS], f"original | reconstruction | as {to}"))
    given = {"out": out, "to": to, "from": source, "guidance": guidance, "seed": seed, "flow-steps": flow_steps}
    about = both.about("edit", [head, *images, "-m", model], given)
    write_json({**about, "images": rows, "failed": failed}, out / "edit.json")
    print(f"{out}: {n} images as {to}; {out / SHEET_PNG}")
    return tools.exit_of(failed, n)
