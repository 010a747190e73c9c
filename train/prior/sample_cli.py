"""`codec-train sample`: images of classes, drawn by a prior, decoded by its VQ model. Imports torch when it works."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec import options
from codec.console import Exit, note, progress
from codec.errors import ModelError, UsageError
from codec.files import write_atomic
from train.sample_folder import ANY, SAMPLES_JSON, SHEET_PNG, check_empty, chosen, folders_of, write_images

if TYPE_CHECKING:
    import torch

    from codec.engine import Engine
    from train.prior.folder import Prior


def sample_command(
    prior: Annotated[
        Path, typer.Argument(metavar="RUN_OR_PRIOR", help="Run folder of a prior, or the folder of the prior itself.")
    ],
    model: Annotated[
        str, typer.Option("-m", "--model", metavar="VQ_MODEL", help="The VQ model whose indices the prior learned.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the images; empty, or not there.")],
    classes: Annotated[
        str | None,
        typer.Option(
            help=f"Names separated by commas; {ANY}: of no class, unless one is called so.",
            show_default="all classes of the prior",
        ),
    ] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 20,
    temperature: Annotated[float, typer.Option(help="Above 0; below 1 likelier indices, fewer kinds of images.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest indices; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest indices of this probability; 1 = all.")] = 1.0,
    guidance: Annotated[
        float, typer.Option(min=0, help="Weight of classifier-free guidance; 1 = none, and half the time.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once; changes memory and time alone.")] = 32,
    device: options.Device = "auto",
) -> int:
    """Draw images: OUT/<class>/NNN.png, sheet.png with a row for each class, samples.json with settings and ids.

    Image number N of a class is the same whatever the number of images, the other classes and the batch.

    Example: codec-train sample runs/prior -m runs/vq/model -o samples --per-class 20 --guidance 2
    """
    check_empty(out)

    from codec.engine import Engine, EngineConfig  # torch takes seconds to import
    from codec.model_folder import resolve
    from train.cache.codebook import Codebook
    from train.prior.folder import read_folder
    from train.prior.sampling import Sampling

    try:
        how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, seed=seed)
    except ValueError as exception:
        raise UsageError(str(exception)) from exception
    loaded = read_folder(prior)
    names = chosen(classes, loaded.classes)
    folders = folders_of(names)
    folder = resolve(model)
    codebook = Codebook.of(folder, "a prior needs")
    loaded.codebook.require(codebook, str(loaded.folder))
    if codebook.decoder_id != loaded.codebook.decoder_id:
        note(f"note: {folder}: another decoder ({codebook.decoder_id}) than when the indices were made; it serves")
    engine = Engine.load(folder, EngineConfig(device=device, dtype="float32"))
    loaded.network.to(engine.device)
    indices = _draw(loaded, names, per_class, how, batch)
    write_images(out, {name: [_decoded(engine, one) for one in indices[name]] for name in names}, folders)
    about = {
        "command": shlex.join(["codec-train", "sample", str(prior), "-m", model, "-o", str(out)]),
        "prior": {"folder": str(loaded.folder), "prior_id": loaded.prior_id},
        "model": {"folder": str(folder), **{k: v for k, v in codebook.to_json().items() if k != "name"}},
        "settings": how.to_json(),
        "classes": {name: folders[name] for name in names},
        "per_class": per_class,
        "tokens": {name: indices[name].flatten(1).tolist() for name in names},
    }
    write_atomic(out / SAMPLES_JSON, (json.dumps(about) + "\n").encode())
    print(f"{out}: {per_class} images of each of {len(names)} classes; {out / SHEET_PNG}")
    return Exit.OK


def _draw(prior: "Prior", names: list[str], count: int, how: Any, batch: int) -> "dict[str, torch.Tensor]":
    """Return the indices of each class's images, (count, h, w)."""
    import torch

    from train.prior.sampling import draw, numbers_of

    number = {ANY: prior.network.grid.n_classes} | {name: n for n, name in enumerate(prior.classes)}
    labels = [number[name] for name in names for _ in range(count)]
    numbers = torch.cat([numbers_of(how.seed, name, count, prior.network.grid.n) for name in names])
    with progress() as bar:
        task = bar.add_task("drawing", total=len(labels))
        indices = draw(prior.network, labels, numbers, how, batch=batch, advance=lambda n: bar.advance(task, n))
    return dict(zip(names, torch.split(indices, count), strict=True))


def _decoded(engine: "Engine", indices: "torch.Tensor") -> Any:
    """Return one image, (H, W, 3) uint8; alone, so that no batch changes a pixel."""
    import torch

    from codec.latent_model import CodebookModel
    from codec.pixels import to_uint8

    assert isinstance(engine.model, CodebookModel), "it has a codebook"
    with torch.inference_mode():
        x = engine.model.decode_indices(indices[None].to(engine.device)).float()
    if not bool(torch.isfinite(x).all()):
        raise ModelError("the decoder's image is not finite")
    return to_uint8(x[0])
