"""The losses of an entrant of a race as numbers: by bin of t, with intervals, and over its training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.jackknife import jackknife
from train.denoiser_flow import N_BINS


def losses(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the held-out loss of `train.denoiser.measure`'s rows, whole and by bin of t.

    Returns:
        "loss": the squared error; "marginal": that of the best prediction from each element alone; "unexplained":
        their ratio, a score with its interval; "bins": the same of each tenth of t.
    """
    names = [f"{what}{at}" for what in ("loss", "marginal") for at in ("", *(f"_{n}" for n in range(N_BINS)))]
    table = np.array([[row[name] for name in names] for row in rows])  # (n, 2 * (1 + N_BINS))
    half = 1 + N_BINS

    def ratios(members: np.ndarray) -> dict[str, float]:
        mean = members.mean(0)
        return {name: float(mean[n] / mean[half + n]) for n, name in enumerate(names[:half])}

    mean = table.mean(0)
    found = jackknife(ratios, [table])
    bins = [
        {
            "t": [n / N_BINS, (n + 1) / N_BINS],
            "loss": float(mean[1 + n]),
            "marginal": float(mean[half + 1 + n]),
            "unexplained": found[f"loss_{n}"],
        }
        for n in range(N_BINS)
    ]
    return {
        "loss": float(mean[0]),
        "marginal": float(mean[half]),
        "unexplained": found["loss"],
        "n_images": len(rows),
        "bins": bins,
    }


def curve(log: Path) -> list[dict[str, float]]:
    """Return the validations of a run: images seen, loss and the share of it that is unexplained."""
    found: dict[int, dict[str, float]] = {}  # by images: a resumed run repeats some
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "validation":
            share = event["loss"] / event["marginal"]
            found[event["images"]] = {"images": event["images"], "loss": event["loss"], "unexplained": share}
    return [found[images] for images in sorted(found)]
