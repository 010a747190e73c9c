"""`codec-train head sample` and `edit`: images of classes, and images as other classes. Imports torch when it works."""

from pathlib import Path
from typing import Annotated, Any

import typer

from codec import options
from codec.console import Exit, progress
from codec.files import check_writable, write_atomic
from train.head import tools
from train.sample_folder import ANY, SAMPLES_JSON, SHEET_PNG, check_empty, chosen, counts_of, folders_of, write_images

_ROWS = 32  # images in the sheet of `edit`


def sample_command(
    head: tools.HeadPath,
    model: tools.Model,
    out: tools.Images,
    classes: tools.Classes = None,
    per_class: tools.PerClass = 20,
    n: tools.Number = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            metavar="PRIOR",
            help="Draw units from a prior that fit --head fitted to them, in place of the head's own.",
            show_default=False,
        ),
    ] = None,
    temperature: tools.Temperature = 1.0,
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
    stored = None if prior is None else tools.use(both.head, prior)
    counts = counts_of(chosen(classes, both.head.classes), per_class, n)
    folders = folders_of(list(counts))
    conditions = [both.condition(name, "--classes") for name in counts]
    how: dict[str, Any] = {"temperature": temperature, "guidance": guidance, "seed": seed}
    images: dict[str, Any] = {}
    with progress() as bar:
        task = bar.add_task("drawing", total=len(counts))
        for (name, count), one in zip(counts.items(), conditions, strict=True):
            images[name] = both.images(both.head.sample([one] * count, **how))
            bar.advance(task)
    write_images(out, images, folders)
    given: dict[str, Any] = {"out": out, "classes": classes, "per-class": per_class, "n": n, "prior": prior}
    given |= {"temperature": temperature, "guidance": guidance, "seed": seed, "flow-steps": flow_steps, "batch": batch}
    about = both.about("sample", [head, "-m", model], given)
    about["prior"] = None if stored is None else {"folder": str(prior), "prior_id": stored.prior_id}
    write_json({**about, "classes": folders, "n_images": counts}, out / SAMPLES_JSON)
    print(f"{out}: {sum(counts.values())} images of {len(counts)} classes; {out / SHEET_PNG}")
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
