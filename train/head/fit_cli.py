"""`codec-train head fit` and `draw`: priors fitted after training, and images of a codec without any head.

Imports torch when it works.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec import options
from codec.console import Exit, note, progress
from codec.errors import NonFiniteError, UsageError
from codec.files import write_atomic
from train.head import cached, tools
from train.sample_folder import ANY, SAMPLES_JSON, SHEET_PNG, check_empty, chosen, counts_of, folders_of, write_images

if TYPE_CHECKING:
    import numpy as np

    from train.head.fitting import FlowFitConfig, MixtureConfig
    from train.head.second_stage import PriorFit

KINDS = ("mixture", "flow", "standard")
PICTURE = "prior.png"


def fit_command(
    cache: cached.Cache,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="PRIOR", help="Folder of the prior; empty, or not there.")
    ],
    head: Annotated[
        Path | None,
        typer.Option(
            metavar="HEAD", help="Fit to the units of this head; without, to latents themselves.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help=f"{', '.join(KINDS)}: Gaussians with full covariances, coupling flow, N(0, I) unfitted.")
    ] = "mixture",
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="One distribution for all, also where there are classes.")
    ] = False,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class",
            help="Fit a mixture to each class by itself; else classes share Gaussians and have weights of their own.",
        ),
    ] = False,
    components: Annotated[
        int, typer.Option(min=1, help="Gaussians of a mixture; of each class with --per-class.")
    ] = 16,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Vectors that a diagonal covariance counts as, in each Gaussian; above 0.",
            show_default="as many as a vector has numbers",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a flow's training, at most.")] = 5000,
    flow_steps: Annotated[int, typer.Option(min=1, help="Maps that a flow is made of.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Of a flow's hidden layers.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of a flow; above 0.")] = 1e-3,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror", help="Learn from mirrors too.", show_default="as the head did; without one, no"
        ),
    ] = None,
    embeddings: cached.Embeddings = None,
    held_out: cached.HeldOut = None,
    held_out_cache: cached.HeldOutCache = None,
    seed: tools.Seed = 0,
    device: options.Device = "auto",
) -> int:
    """Fit a prior to what occurs: the units of a head, or a codec's normalized latents. A folder, with prior.png.

    fitted.json says what it is worth: -log p in nats of held-out vectors that chose nothing of it, beside the head's
    own prior and N(0, I). A flow stops by a tenth of the training images, whose figure is given apart.

    Example: codec-train head fit latents -o runs/units --head runs/head --kind flow
    """
    if kind not in KINDS:
        raise UsageError(f"--kind {kind}, expected {', '.join(KINDS)}")
    if per_class and (kind != "mixture" or unconditional):
        raise UsageError("--per-class, expected with --kind mixture and without --unconditional")
    given: dict[str, Any] = {
        "out": out,
        "head": head,
        "kind": kind,
        "unconditional": unconditional,
        "per-class": per_class,
    }
    given |= {"components": components, "strength": strength, "steps": steps, "flow-steps": flow_steps, "width": width}
    given |= {"lr": lr, "mirror": mirror is True, "no-mirror": mirror is False, "embeddings": embeddings}
    given |= {"held-out": held_out, "held-out-cache": held_out_cache, "seed": seed, "device": device}
    check_empty(out)

    from codec.engine import pick_device
    from codec.head import Head
    from codec.head.fitted_folder import write_fitted
    from train.head.second_stage import figures, fit_prior

    source = cached.Source(
        cache=cache, held_out=held_out, held_out_cache=held_out_cache, embeddings=embeddings, mirror=mirror
    )
    config = _config(given)
    loaded = None if head is None else Head.load(head, device)
    data = cached.data_of_codec(source, unconditional) if loaded is None else cached.data_of_head(loaded, source)
    if loaded is not None and data.embeddings is not None:
        note(f"note: {loaded.stored.folder}: conditions are embeddings: the prior is unconditional")
    if per_class and not data.classes:
        raise UsageError(f"--per-class: {cache if loaded is None else head}: there are no classes")
    network = None if loaded is None else loaded.network
    try:
        fit = fit_prior(network, data, config, by_class=not unconditional, seed=seed, device=pick_device(device))
    except ValueError as exception:
        raise UsageError(f"{cache}: {exception}") from exception
    except RuntimeError as exception:
        if "non-finite" not in str(exception):
            raise
        raise UsageError("the flow's gradient is not finite: lower --lr") from exception
    shape = data.training.shape if loaded is None else loaded.network.unit_shapes[0]
    classes = data.classes if fit.prior.n_classes else []
    head_id = "" if loaded is None else loaded.head_id
    more = {key: value for key, value in tools.record("fit", [cache], given).items() if key != "kind"}
    more |= {"figures": figures(fit), "data": {"cache": str(cache), "digests": list(data.digests)}}
    about = write_fitted(out, fit.prior, data.origin, classes, (head_id, shape), more)
    what = "latents" if loaded is None else "units"
    if fit.prior.n_units > 1:
        write_atomic(out / PICTURE, _picture(fit, kind, what, seed))
    for line in _sentences(fit, kind):
        print(line)
    print(f"{out}: prior {about['prior_id']}, of {fit.prior.n_units} numbers, {len(classes) or 'no'} classes")
    return Exit.OK


def _config(given: Mapping[str, Any]) -> "MixtureConfig | FlowFitConfig | None":
    """Return how a prior is to be fitted, None = not at all; raises UsageError for options that are none."""
    from codec.head.flows import FlowSize
    from train.head.fitting import FlowFitConfig, MixtureConfig

    kind, seed = given["kind"], given["seed"]
    try:
        if kind == "mixture":
            return MixtureConfig(
                components=given["components"], per_class=given["per-class"], strength=given["strength"], seed=seed
            )
        size = FlowSize(steps=given["flow-steps"], width=given["width"])
        return FlowFitConfig(size=size, steps=given["steps"], lr=given["lr"], seed=seed) if kind == "flow" else None
    except ValueError as exception:
        raise UsageError(f"--kind {kind}: {exception}") from exception


def _picture(fit: "PriorFit", kind: str, what: str, seed: int) -> bytes:
    import torch

    from eval.unit_plots import clouds

    held_out, labels = (part.cpu() for part in fit.held_out)
    with torch.inference_mode():
        rng = torch.Generator().manual_seed(seed)
        drawn = fit.prior.cpu().sample(len(held_out), labels if fit.prior.n_classes else None, generator=rng)
    return clouds(held_out.numpy(), [(kind, drawn.numpy())], what)


def _sentences(fit: "PriorFit", kind: str) -> list[str]:
    """Return what a fit is worth, a line each, for the user."""
    parts = [f"{kind} {fit.held_out_nats:.2f}"] if kind != "standard" else []
    parts += [f"the head's own {fit.own_nats:.2f}"] if fit.own_nats is not None else []
    n = fit.n_vectors
    lines = [
        f"-log p of {n['held_out']} held-out vectors, nats (lower is better): "
        f"{', '.join([*parts, f'N(0, I) {fit.standard_nats:.2f}'])}"
    ]
    if fit.stop_nats is not None:
        lines.append(f"{fit.stop_nats:.2f} of the {n['stop']} by which it stopped, fitted to {n['fit']}")
    return lines


def draw_command(
    prior: Annotated[
        Path, typer.Argument(metavar="PRIOR", help="Folder of a prior of latents, of fit without --head.")
    ],
    model: tools.Model,
    out: tools.Images,
    classes: tools.Classes = None,
    per_class: tools.PerClass = 20,
    n: tools.Number = None,
    temperature: tools.Temperature = 1.0,
    seed: tools.Seed = 0,
    device: options.Device = "auto",
) -> int:
    """Draw images of a codec without a head: latents of a fitted prior, decoded. As codec-train head sample.

    Example: codec-train head draw runs/latents-prior -m runs/first/model -o samples --n 1000
    """
    tools.not_negative(temperature=temperature)
    check_empty(out)

    from codec.engine import Engine, EngineConfig
    from codec.head.fitted_folder import read_fitted
    from codec.model_folder import resolve
    from eval.results import write_json

    stored = read_fitted(prior, device)
    stored.require_latents()
    counts = counts_of(chosen(classes, stored.classes), per_class, n)
    folders, folder = folders_of(list(counts)), resolve(model)
    engine = Engine.load(folder, EngineConfig(device=device, dtype="float32"))
    if told := stored.origin.require(engine, str(prior)):
        note(f"note: {prior}: {told}")
    normalisation, f = stored.origin.normalisation, stored.origin.f
    height, width = (f * side for side in stored.shape[1:])
    images: dict[str, list[np.ndarray]] = {name: [] for name in counts}
    with progress() as bar:
        task = bar.add_task("drawing", total=sum(counts.values()))
        for name, count in counts.items():
            c = None if name == ANY and ANY not in stored.classes else name
            for number in range(count):
                z = stored.draw([c], temperature=temperature, seed=seed, numbers=[number])
                try:
                    images[name].append(engine.decode(normalisation.denormalize(z).cpu().numpy()[0], height, width))
                except NonFiniteError as exception:
                    raise UsageError(f"{exception}: lower --temperature") from exception
                bar.advance(task)
    write_images(out, images, folders)
    given = {"out": out, "classes": classes, "per-class": per_class, "n": n, "temperature": temperature, "seed": seed}
    ids = {"folder": str(folder), "encoder_id": stored.origin.encoder_id, "decoder_id": engine.decoder_id}
    about = tools.record("draw", [prior, "-m", model], {**given, "device": device})
    about |= {"prior": {"folder": str(prior), "prior_id": stored.prior_id}, "model": ids}
    write_json({**about, "classes": folders, "n_images": counts}, out / SAMPLES_JSON)
    print(f"{out}: {sum(counts.values())} images of {len(counts)} classes; {out / SHEET_PNG}")
    return Exit.OK
