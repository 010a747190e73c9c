"""Which objective gives a head units that each stand for one factor? Discs whose factors are known tell.

    discs (x, y, radius, colour) -> shards -> a small codec -> cache -> heads of each objective and seed
    units of all images, factors -> MIG, DCI, SAP, and how well each head reconstructs

python scripts/disentangle_shapes.py FOLDER

Everything but the pictures is made by the commands: `codec-train shards`, `run`, `cache`, `run` of a head without a
condition, `head evaluate`. Prints a table; FOLDER/scores.json holds all of it. What is there already is not made again.
"""

import argparse
import itertools
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codec import images
from codec.files import write_atomic
from codec.head import Head
from eval.results import header, read_json, write_json
from train.cli import main as codec_train
from train.latent_dataset import LatentDataset

SIDE = 16
COLOURS = np.array([[255.0, 60.0, 20.0], [20.0, 120.0, 255.0]])
FACTORS: Mapping[str, tuple[float, ...]] = {
    "x": tuple(np.linspace(4.5, 11.5, 16).tolist()),
    "y": tuple(np.linspace(4.5, 11.5, 16).tolist()),
    "radius": (1.5, 2.25, 3.0, 3.75),
    "colour": (0.0, 1 / 3, 2 / 3, 1.0),
}
"""Values of each, pixels; colour: 0 .. 1 from the first of COLOURS to the second. All 4,096 combinations are drawn."""
CODEC = (
    *("model.family=tiny", "model.block_out_channels=[16,16,16]", "model.latent_channels=4", "kl.weight=0"),
    *(f"data.crop={SIDE}", f"data.validation_crop={SIDE}", "data.n_validation=64", "loss.perceptual_weight=0"),
    *("loss.pixel=l2", "optim.lr=3e-3", "optim.batch_size=16", "run.log_every=50", "run.n_images=8000"),
    "run.validate_every=4000",
)
HEAD = (
    *("head.units=8", "head.width=16", "head.depth=1", "head.prior=standard", "data.condition=none"),
    *("data.mirror=false", "objective.schedule=constant", "optim.lr=3e-3", "optim.weight_decay=0"),
    *("optim.batch_size=256", "optim.ema_decay=0.99", "run.precision=no", "run.time_limit_min=0"),
)
OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "beta-1": ("objective.kind=beta", "objective.beta=1"),
    "beta-10": ("objective.kind=beta", "objective.beta=10"),
    "tcvae": ("objective.kind=tcvae", "objective.beta=1", "objective.total_correlation=10"),
    "factor": (
        "objective.kind=factor",
        "objective.beta=1",
        "objective.total_correlation=9",
        "objective.critic_lr=1e-3",
    ),
}
"""The weight of the total correlation is 1, 10, 10 and 10: in the KL once, with factor 9 times more."""


def render(x: float, y: float, radius: float, colour: float) -> np.ndarray:
    """Return the picture of a disc around (x, y), (SIDE, SIDE, 3) uint8; its edge fades over about two pixels."""
    at = np.arange(SIDE) + 0.5
    inside = 1 / (1 + np.exp(2 * (np.hypot(at - x, at[:, None] - y) - radius)))
    shade = (1 - colour) * COLOURS[0] + colour * COLOURS[1]
    pixels: np.ndarray = np.round(inside[..., None] * shade)
    return pixels.astype(np.uint8)


def draw(folder: Path) -> Path:
    """Write a picture of each combination of the factors' values, and factors.npz beside them; return that file.

    A picture is called by the numbers of the values; the file is what `head evaluate --factors` reads.
    """
    numbers = list(itertools.product(*(range(len(values)) for values in FACTORS.values())))
    names = ["-".join(map(str, row)) for row in numbers]
    for name, row in zip(names, numbers, strict=True):
        values = (values[number] for values, number in zip(FACTORS.values(), row, strict=True))
        write_atomic(folder / "pictures" / f"{name}.png", images.save_png(render(*values)))
    known = folder / "factors.npz"
    np.savez(known, keys=np.array(names), factors=np.array(numbers), names=np.array(list(FACTORS)))
    return known


def made(out: Path, holds: str, command: Sequence[str]) -> Path:
    """Return a folder that a command makes, unless it holds what it should already."""
    if not (out / holds).exists():
        shutil.rmtree(out, ignore_errors=True)
        status = codec_train([*command])
        if status or not (out / holds).exists():  # one that is stopped by a signal saves, and returns 0
            sys.exit(status or f"error: {out}: was not finished; give the command again")
    return out


def posteriors(head: Head, cache: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a draw of q(u|z) of each image of a cache, its mean and its deviation, (N, U) float64 each."""
    items = LatentDataset(cache, sample=False, mirror=False)
    z = np.stack([items[number]["latents"].numpy() for number in range(len(items))])
    c: list[str | None] = [None] * len(z)
    u, mean, deviation = head.encode(z, c, seed=0)[0], head.encode(z, c)[0], head.deviations(z, c)[0]
    return u.double().numpy(), mean.double().numpy(), deviation.double().numpy()


def total_correlation(u: np.ndarray, mean: np.ndarray, deviation: np.ndarray, chunk: int = 256) -> float:
    """Return KL(q(u) || prod q(u_j)) in nats, mean over a draw of each posterior; q(u) is the mean of all N of them.

    Args:
        u: (N, U) draws.
        mean: (N, U) of the posteriors.
        deviation: (N, U).
        chunk: draws at a time.
    """
    found = []
    for start in range(0, len(u), chunk):
        each = -0.5 * ((u[start : start + chunk, None] - mean) / deviation) ** 2 - np.log(deviation)  # (chunk, N, U)
        joint, product = np.logaddexp.reduce(each.sum(2), axis=1), np.logaddexp.reduce(each, axis=1)
        found.append(joint - product.sum(1) + (u.shape[1] - 1) * np.log(len(u)))
    return float(np.concatenate(found).mean())


def score(run: Path, cache: Path) -> dict[str, Any]:
    """Return what `head evaluate` says of a head, and the total correlation of its units."""
    found, head = read_json(run / "evaluation" / "evaluation.json"), Head.load(run, "cpu")
    factors = found["factors"]
    return {
        "mig": factors["mig"]["score"],
        "mig_per_factor": dict(zip(FACTORS, factors["mig"]["per_factor"], strict=True)),
        "dci": factors["dci"]["disentanglement"],
        "informativeness": factors["dci"]["informativeness"],
        "sap": factors["sap"]["score"],
        "total_correlation": total_correlation(*posteriors(head, cache)),
        "active_units": found["units"][0]["n_active"],
        "elbo_bits": found["bits"]["elbo"]["value"],
        "recon_db": found["measured"]["recon_db"],
        "kl": found["measured"]["kl"],
        "images_seen": head.stored.about["record"]["images_seen"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: a line for each objective, means over its seeds."""
    digits = {"mig": 3, "dci": 2, "sap": 2, "recon_db": 1, "kl": 1, "total_correlation": 2, "active_units": 1}
    lines = [f"| objective | MIG of each seed | {' | '.join(digits)} |", f"|{'---|' * (len(digits) + 2)}"]
    for objective in dict.fromkeys(row["objective"] for row in rows):
        some = [row for row in rows if row["objective"] == objective]
        means = (f"{np.mean([row[name] for row in some]):.{n}f}" for name, n in digits.items())
        each = ", ".join(f"{row['mig']:.3f}" for row in some)
        lines.append(f"| {objective} | {each} | {' | '.join(means)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, score it, print the table; return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes everything that is made")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the heads (default 0 1 2)")
    parser.add_argument("--images", type=int, default=200_000, help="that each head sees (default 200000)")
    asked = parser.parse_args(arguments)
    folder: Path = asked.folder
    shards, codec, cache = (folder / name for name in ("shards", "codec", "cache"))
    known = folder / "factors.npz"
    if not known.exists():
        draw(folder)
    if status := codec_train(["shards", str(folder / "pictures"), "-o", str(shards), "--jobs", "1"]):  # goes on
        return status
    made(codec, "model", ["run", "tiny", f"data.shards={shards}", f"run.out={codec}", *CODEC])
    how = ["--size", str(SIDE), "--device", "cpu", "--dtype", "float32", "--jobs", "1", "--batch", "32"]
    made(cache, "cache.json", ["cache", str(shards), "-m", str(codec / "model"), "-o", str(cache), *how])
    often = max(asked.images // 4, 256)
    length = [f"run.n_images={asked.images}", f"run.validate_every={often}", f"run.checkpoint_every={often}"]
    length += [f"optim.warmup_images={asked.images // 20}"]
    rows = []
    for objective, seed in itertools.product(asked.objectives, asked.seeds):
        run = folder / f"{objective}-{seed}"
        more = [f"data.cache={cache}", f"run.out={run}", f"run.seed={seed}", *HEAD, *OBJECTIVES[objective], *length]
        made(run, "model", ["run", "small-head-gaussian", *more])
        measured = ["-o", str(run / "evaluation"), "--factors", str(known), "--draws", "16", "--device", "cpu"]
        made(run / "evaluation", "evaluation.json", ["head", "evaluate", str(run), str(cache), *measured])
        rows.append({"objective": objective, "seed": seed, **score(run, cache)})
    command = " ".join(["scripts/disentangle_shapes.py", *map(str, sys.argv[1:] if arguments is None else arguments)])
    settings = {"codec": CODEC, "head": [*HEAD, *length], "objectives": OBJECTIVES}
    about = header("disentanglement of shapes", command)
    write_json({**about, "settings": settings, "runs": rows}, folder / "scores.json")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
