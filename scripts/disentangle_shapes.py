"""Which objective gives a head units that each stand for one factor? Rectangles, whose factors are known, tell.

    rectangles (x, y, width, height, colour) -> shards -> a small codec -> cache -> heads of each objective and seed
    units of all images, factors -> MIG, DCI, SAP, and how well each head reconstructs

python scripts/disentangle_shapes.py FOLDER

Everything but the pictures is made by the commands (`codec-train shards`, `run`, `cache`, `run` of a head without a
condition) and scored by `eval.disentanglement`. Prints a table; FOLDER/scores.json holds all of it. What is there
already is not made again.
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
from eval.disentanglement import SETTINGS, disentanglement, mig
from eval.results import write_json
from train.cli import main as codec_train
from train.latent_dataset import LatentDataset

SIDE = 16
COLOURS = np.array([[255.0, 60.0, 20.0], [20.0, 120.0, 255.0]])
FACTORS: Mapping[str, tuple[float, ...]] = {
    "x": tuple(np.linspace(4, 12, 8).tolist()),
    "y": tuple(np.linspace(4, 12, 8).tolist()),
    "width": (2.0, 3.0, 4.5, 6.5),
    "height": (2.0, 3.0, 4.5, 6.5),
    "colour": (0.0, 1 / 3, 2 / 3, 1.0),
}
CODEC = (
    *("model.family=tiny", "model.block_out_channels=[16,16,16]", "model.latent_channels=8", "kl.weight=0"),
    *(f"data.crop={SIDE}", f"data.validation_crop={SIDE}", "data.n_validation=64", "loss.perceptual_weight=0"),
    *("loss.pixel=l2", "optim.lr=3e-3", "optim.batch_size=16", "run.log_every=50", "run.validate_every=4000"),
)
HEAD = (
    *("head.units=8", "head.width=16", "head.depth=1", "head.prior=standard", "data.condition=none"),
    *("data.mirror=false", "objective.schedule=constant", "optim.lr=3e-3", "optim.weight_decay=0"),
    *("optim.batch_size=64", "optim.ema_decay=0.99", "run.precision=no"),
)
OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "beta = 1": ("objective.kind=beta", "objective.beta=1"),
    "beta = 4": ("objective.kind=beta", "objective.beta=4"),
    "tcvae": ("objective.kind=tcvae", "objective.beta=1", "objective.total_correlation=15"),
    "factor": (
        "objective.kind=factor",
        "objective.beta=1",
        "objective.total_correlation=15",
        "objective.critic_lr=1e-3",
    ),
}


def render(x: float, y: float, width: float, height: float, colour: float) -> np.ndarray:
    """Return the picture of a rectangle around (x, y), (SIDE, SIDE, 3) uint8; edges by the covered part of a pixel."""
    at = np.arange(SIDE)
    columns, rows = (
        np.clip(np.minimum(at + 1, middle + size / 2) - np.maximum(at, middle - size / 2), 0, 1)
        for middle, size in ((x, width), (y, height))
    )
    shade = (1 - colour) * COLOURS[0] + colour * COLOURS[1]
    pixels: np.ndarray = np.round(rows[:, None, None] * columns[:, None] * shade)
    return pixels.astype(np.uint8)


def draw(folder: Path, every: int) -> None:
    """Write the pictures of every n-th combination of the factors' values; a name holds the values' numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for numbers in list(itertools.product(*(range(len(values)) for values in FACTORS.values())))[::every]:
        values = (values[number] for values, number in zip(FACTORS.values(), numbers, strict=True))
        write_atomic(folder / f"{'-'.join(map(str, numbers))}.png", images.save_png(render(*values)))


def made(out: Path, holds: str, command: Sequence[str]) -> Path:
    """Return a folder that a command makes, unless it holds what it should already."""
    if not (out / holds).exists():
        shutil.rmtree(out, ignore_errors=True)
        if status := codec_train([*command]):
            sys.exit(status)
    return out


def score(run: Path, cache: Path) -> dict[str, Any]:
    """Return the scores of a head's units, of all images of a cache, and what its last validation said."""
    head, items = Head.load(run, "cpu"), LatentDataset(cache, sample=False, mirror=False)
    z = np.stack([items[number]["latents"].numpy() for number in range(len(items))])
    keys = [items[number]["key"] for number in range(len(items))]
    factors = np.array([[int(number) for number in Path(key).stem.split("-")] for key in keys])
    means, drawn = (head.encode(z, [None] * len(z), seed=seed)[0].numpy() for seed in (None, 0))
    found = disentanglement(means, factors)
    validation = head.stored.about["record"]["validation"]
    return {
        "mig": found["mig"]["score"],
        "mig_of_draws": mig(drawn, factors)["score"],
        "dci": found["dci"]["disentanglement"],
        "informativeness": found["dci"]["informativeness"],
        "sap": found["sap"]["score"],
        "mig_per_factor": dict(zip(FACTORS, found["mig"]["per_factor"], strict=True)),
        "images_seen": head.stored.about["record"]["images_seen"],
        **{name: validation[name] for name in ("recon_db", "kl", "bits", "marginal_bits", "active_units")},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: a line for each objective, means over its seeds."""
    names = ("mig", "mig_of_draws", "dci", "sap", "recon_db", "kl", "active_units")
    lines = [f"| objective | MIG of each seed | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for objective in dict.fromkeys(row["objective"] for row in rows):
        some = [row for row in rows if row["objective"] == objective]
        digits = {"recon_db": 1, "kl": 1, "active_units": 1}
        means = (f"{np.mean([row[name] for row in some]):.{digits.get(name, 3)}f}" for name in names)
        each = ", ".join(f"{row['mig']:.3f}" for row in some)
        lines.append(f"| {objective} | {each} | {' | '.join(means)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, score it, print the table; return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes everything that is made")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the heads (default 0 1 2)")
    parser.add_argument("--images", type=int, default=64_000, help="that each head sees (default 64000)")
    parser.add_argument("--codec-images", type=int, default=8000, help="that the codec sees (default 8000)")
    parser.add_argument("--every", type=int, default=1, help="take every n-th combination of factors (default 1)")
    asked = parser.parse_args(arguments)
    folder: Path = asked.folder
    shards, codec, cache = (folder / name for name in ("shards", "codec", "cache"))
    if not shards.exists():
        draw(folder / "pictures", asked.every)
        made(shards, ".", ["shards", str(folder / "pictures"), "-o", str(shards), "--jobs", "1"])
    length = [f"run.n_images={asked.codec_images}"]
    made(codec, "model", ["run", "tiny", f"data.shards={shards}", f"run.out={codec}", *CODEC, *length])
    how = ["--size", str(SIDE), "--device", "cpu", "--dtype", "float32", "--jobs", "1", "--batch", "32"]
    made(cache, "cache.json", ["cache", str(shards), "-m", str(codec / "model"), "-o", str(cache), *how])
    length = [f"run.n_images={asked.images}", f"run.validate_every={max(asked.images // 4, 64)}"]
    length += [f"run.checkpoint_every={max(asked.images // 4, 64)}", f"optim.warmup_images={asked.images // 40}"]
    rows = []
    for objective, seed in itertools.product(asked.objectives, asked.seeds):
        run = folder / f"{objective.replace(' ', '')}-{seed}"
        more = [f"data.cache={cache}", f"run.out={run}", f"run.seed={seed}", *HEAD, *OBJECTIVES[objective], *length]
        made(run, "model", ["run", "small-head-gaussian", *more])
        rows.append({"objective": objective, "seed": seed, **score(run, cache)})
    settings = {"codec": CODEC, "head": [*HEAD, *length], "objectives": OBJECTIVES, "scores": SETTINGS}
    write_json({"kind": "disentanglement of shapes", "settings": settings, "runs": rows}, folder / "scores.json")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
