"""`codec-train head evaluate`: what a head is worth on a latent cache. Imports torch when it works."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from codec import options
from codec.console import Exit, note
from codec.files import check_writable, write_atomic
from train.head import cached, tools
from train.sample_folder import ANY

EVALUATION_JSON, PICTURE = "evaluation.json", "kl.png"


def evaluate_command(
    head: tools.HeadPath,
    cache: cached.Cache,
    out: tools.Out,
    prior: Annotated[
        Path | None,
        typer.Option(metavar="PRIOR", help="Compare a prior that fit --head fitted to its units.", show_default=False),
    ] = None,
    factors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="What is known about images: keys (N,) of the cache, factors (N, F) integers, names (F,).",
            show_default=False,
        ),
    ] = None,
    asked: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="CLASS",
            help=f"What all images are encoded as for --factors: a class, or {ANY} = without, so that no class leaks.",
        ),
    ] = ANY,
    draws: Annotated[int, typer.Option(min=1, help="Of each posterior, for the bounds.")] = 64,
    embeddings: cached.Embeddings = None,
    held_out: cached.HeldOut = None,
    held_out_cache: cached.HeldOutCache = None,
    seed: tools.Seed = 0,
    device: options.Device = "auto",
) -> int:
    """Measure a head on held-out latents: bits, units, holes of its prior; with --factors MIG, DCI and SAP.

    Writes evaluation.json and kl.png, the KL of each unit. Bounds are in bits per number of a normalized latent.

    Example: codec-train head evaluate runs/head latents -o measured --prior runs/units --factors factors.npz
    """
    check_writable(out)

    from codec.head import Head
    from eval.results import header, write_json
    from train.head.evaluation import FEWEST, SETTINGS, evaluate, read_factors, scores_of_factors

    known = None if factors is None else read_factors(factors)
    loaded = Head.load(head, device)
    stored = None if prior is None else tools.use(loaded, prior)
    c = None if known is None else tools.condition_of(loaded, asked, "--as")
    source = cached.Source(
        cache=cache, held_out=held_out, held_out_cache=held_out_cache, embeddings=embeddings, mirror=False
    )
    data = cached.data_of_head(loaded, source)
    found = evaluate(loaded, data, draws, stored, seed)
    found["factors"] = None if known is None else scores_of_factors(loaded, data, known, c, str(factors), seed)
    if found["holes"] is None:
        note(f"note: {found['n_held_out']} held-out samples, {FEWEST} are needed to look for holes")
    if found["bits"]["iwae"] is None:
        note("note: no IWAE bound: the likelihood of a flow-matching decoder is only bounded in expectation")
    given: dict[str, Any] = {"out": out, "prior": prior, "factors": factors, "as": asked, "draws": draws}
    given |= {"embeddings": embeddings, "held-out": held_out, "held-out-cache": held_out_cache, "seed": seed}
    about = tools.record("evaluate", [head, cache], {**given, "device": device})
    result = {
        **header(about["kind"], about["command"]),
        "settings": {**about["settings"], **SETTINGS},
        "head": {"folder": str(loaded.stored.folder), "head_id": loaded.head_id},
        "prior": None if stored is None else {"folder": str(prior), "prior_id": stored.prior_id},
        "data": {"cache": str(cache), "encoder_id": data.origin.encoder_id, "held_out_digest": data.digests[1]},
        **found,
    }
    write_json(result, out / EVALUATION_JSON)
    write_atomic(out / PICTURE, _picture(result["units"]))
    _print(result)
    for path in (out / EVALUATION_JSON, out / PICTURE):
        print(path)
    return Exit.OK


def _picture(levels: list[dict[str, Any]]) -> bytes:
    """Return bars of each level's KL; of variances where a flow or a mixture mixes the units' KL."""
    import numpy as np

    from eval.unit_plots import bars

    drawn = []
    for number, level in enumerate(levels):
        what = "KL [nats]" if level["kl_nats"] is not None else "variance of the mean"
        values = np.array(level["kl_nats"] or level["variance"])
        title = f"level {number + 1}: {level['n_active']} of {len(values)} units say something; others in grey"
        drawn.append((title, what, values, np.array(level["collapsed"])))
    return bars(drawn)


def _print(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    table = Table(title=f"{result['n_held_out']} held-out latents")
    for name in ("", "value", "beside it"):
        table.add_column(name, justify="left" if not name else "right")
    for row in _lines(result):
        table.add_row(*row)
    console.print(table)


def _lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    bits, measured, nats, holes = (result[name] for name in ("bits", "measured", "prior_nats", "holes"))
    yield f"ELBO, bits a number ({bits['k']} draws)", _told(bits["elbo"]), f"channels {_told(bits['channels'])}"
    if bits["iwae"] is not None:
        count = f"{bits['effective_draws']:.1f} draws count"
        yield f"IWAE, bits a number ({bits['k']} draws)", _told(bits["iwae"]), count
    yield "KL, nats an image", f"{measured['kl']:.2f}", ""
    for number, level in enumerate(result["units"]):
        yield f"active units, level {number + 1}", str(level["n_active"]), f"of {len(level['variance'])}"
    if "recon_db" in measured:
        used = f"condition {measured['condition_db']:+.2f}" if "condition_db" in measured else ""
        yield "reconstructed latents, dB", f"{measured['recon_db']:.2f}", used
    yield (
        "-log p(u|c), nats",
        f"own prior {nats['own']:.2f}",
        f"fitted {nats['fitted']:.2f}" if "fitted" in nats else "",
    )
    if holes is not None:
        fitted = f"fitted {holes['fitted']['share']:.1%}" if "fitted" in holes else ""
        yield "prior in holes (none = 5 %)", f"own prior {holes['own']['share']:.1%}", fitted
    if (factors := result["factors"]) is not None:
        dci, where = factors["dci"], f"{factors['n']} images"
        yield "MIG", f"{factors['mig']['score']:.3f}", where
        yield "DCI disentanglement, completeness", f"{dci['disentanglement']:.3f}, {dci['completeness']:.3f}", where
        yield "DCI informativeness", f"{dci['informativeness']:.3f}", f"chance {dci['chance']:.3f}"
        yield "SAP", f"{factors['sap']['score']:.3f}", f"at most {factors['sap']['limit']:.3f}"


def _told(score: Mapping[str, Any]) -> str:
    if score["interval"] is None:
        return f"{score['value']:.3f}"
    low, high = score["interval"]
    return f"{score['value']:.3f} ({low:.3f} .. {high:.3f})"
