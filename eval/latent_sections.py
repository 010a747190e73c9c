"""The sections of a result of `codec-eval latents`, from what all ranks measured together. Imports no torch."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import latent_posterior, latent_spectrum
from eval.draws import generator
from eval.latent_posterior import PosteriorTally, Samples

if TYPE_CHECKING:
    from codec.latent_model import LatentModel
    from eval.latent_measure import ImageRecord, LatentsConfig, Share

_N_DIRECTIONS = 128
_N_PCA_POINTS = 2000


def sections(whole: "Share", model: "LatentModel", config: "LatentsConfig") -> dict[str, Any]:
    """Return every section but that of float16.

    Args:
        whole: of all ranks, at least one image.
        model: the autoencoder.
        config: what was measured.
    """
    tally, records = whole.tally, whole.records
    samples = Samples.join([record.samples for record in records])
    has_variance = samples.logvar is not None
    spectrum, slopes = _spectrum(records)
    return {
        "posterior": _posterior(tally, samples, model, config, has_variance),
        "channels": _channels(tally, model, has_variance, slopes),
        "aggregate": _aggregate(tally, samples, model, config.seed),
        "correlation": _correlation(tally),
        "spectrum": spectrum,
        "noise": _noise(records, config.sigmas),
        "equivariance": _equivariance(records),
        "locality": _locality(records, model.f),
        "drift": _drift(records),
        "grid": _grid([row for _, row in whole.colours]),
    }


def _posterior(
    tally: PosteriorTally, samples: Samples, model: "LatentModel", config: "LatentsConfig", has_variance: bool
) -> dict[str, Any]:
    summary = tally.statistics.summary()
    verdict = latent_posterior.judge(summary, has_variance)
    active = int((summary.std**2 > latent_posterior.ACTIVE_VARIANCE).sum())
    found: dict[str, Any] = {
        "verdict": verdict.name,
        "rule": latent_posterior.RULE,
        "n_collapsed": sum(verdict.collapsed),
        "active_units": active,
        "active_threshold": latent_posterior.ACTIVE_VARIANCE,
        "kl_nats_per_position": None,
    }
    if not has_variance:
        return found
    kl = float(summary.kl_nats.sum())
    n_positions = (config.size // model.f) ** 2
    matched = latent_posterior.gaussian_distances(summary.mean, tally.covariance + np.diag(summary.posterior_std**2))
    return found | {
        "kl_nats_per_position": kl,
        "kl_nats_per_image": kl * n_positions,
        "kl_bpp": kl / np.log(2) / model.f**2,
        "noise_share": float(np.median(summary.posterior_std / np.maximum(summary.std, 1e-30))),
        "clamped_share": float(tally.clamped.sum() / tally.n / model.channels),
        "mutual_information": {
            "lower_nats": latent_posterior.mutual_information_lower(samples),
            "lower_limit_nats": float(np.log(len(samples.z))),
            "upper_nats": kl - matched["kl_nats"],
            "n_positions": len(samples.z),
        },
    }


def _channels(
    tally: PosteriorTally, model: "LatentModel", has_variance: bool, slopes: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    summary = tally.statistics.summary()
    collapsed = latent_posterior.judge(summary, has_variance).collapsed
    rows = []
    for c in range(model.channels):
        row: dict[str, Any] = {
            "channel": c,
            "mean": float(summary.mean[c]),
            "std": float(summary.std[c]),
            "normalized_std": float(summary.std[c] * model.scaling_factor),
            "largest": float(tally.largest[c]),
            "active": bool(summary.std[c] ** 2 > latent_posterior.ACTIVE_VARIANCE),
            "kl_nats": None,
        }
        if has_variance:
            row |= {
                "posterior_std": float(summary.posterior_std[c]),
                "kl_nats": float(summary.kl_nats[c]),
                "clamped_low_share": float(tally.clamped[0, c] / tally.n),
                "clamped_high_share": float(tally.clamped[1, c] / tally.n),
                "collapsed": collapsed[c],
            }
        rows.append(row | slopes[c])
    return rows


def _aggregate(tally: PosteriorTally, samples: Samples, model: "LatentModel", seed: int) -> dict[str, Any]:
    """Compare all latents together, drawn from their posteriors, with N(0, I), raw and normalized."""
    summary = tally.statistics.summary()
    covariance = tally.covariance + np.diag(summary.posterior_std**2)
    scale, shift = model.scaling_factor, model.shift_factor
    z = (samples.z - shift) * scale
    directions = generator(seed, "", "directions").standard_normal((_N_DIRECTIONS, z.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    quantiles = np.array([NormalDist().inv_cdf((n + 0.5) / len(z)) for n in range(len(z))])
    projected = np.sort(z @ directions.T, axis=0)
    eigenvalues, axes = np.linalg.eigh(np.cov(z.T).reshape(z.shape[1], z.shape[1]))
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.where(axes.sum(axis=0) < 0, -1.0, 1.0)  # the sign of an eigenvector is anybody's choice
    total = max(float(eigenvalues.sum()), 1e-30)
    step = max(1, len(z) // _N_PCA_POINTS)
    return {
        "raw": latent_posterior.gaussian_distances(summary.mean, covariance),
        "normalized": latent_posterior.gaussian_distances((summary.mean - shift) * scale, covariance * scale**2),
        "normalized_mean": (summary.global_mean - shift) * scale,
        "normalized_std": summary.global_std * scale,
        "measured_scaling_factor": 1 / summary.global_std if summary.global_std > 0 else None,
        "measured_shift_factor": summary.global_mean,
        "sliced_wasserstein": float(np.sqrt(((projected - quantiles[:, None]) ** 2).mean())),
        "n_directions": _N_DIRECTIONS,
        "pca": {
            "explained": [float(value) / total for value in eigenvalues[::-1][:2]],
            "points": np.round((z @ axes)[::step][:_N_PCA_POINTS], 4).tolist(),
        },
    }


def _correlation(tally: PosteriorTally) -> dict[str, Any]:
    matrix = latent_posterior.correlation(tally.covariance)
    found: dict[str, Any] = {"matrix": matrix.tolist(), "largest": None, "pair": None}
    if len(matrix) > 1:
        beside = np.abs(matrix - np.diag(np.diag(matrix)))
        row, column = np.unravel_index(int(beside.argmax()), beside.shape)
        found |= {"largest": float(matrix[row, column]), "pair": [int(row), int(column)]}
    return found | {"effective_rank": latent_posterior.effective_rank(tally.covariance), "channels": len(matrix)}


def _spectrum(records: Sequence["ImageRecord"]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the section, and slope and share of each channel."""
    latent = np.mean([record.latent_power for record in records], axis=0)  # (D, h // 2)
    found: dict[str, Any] = {}
    for name, power in (
        ("image", np.mean([record.image_power for record in records], axis=0)),
        ("image_on_grid", np.mean([record.coarse_power for record in records], axis=0)),
        ("latent", latent.mean(axis=0)),
    ):
        found[name] = _described(power) | {"power": power.tolist()}
    return found, [{f"spectrum_{key}": value for key, value in _described(power).items()} for power in latent]


def _described(power: np.ndarray) -> dict[str, float | None]:
    return {"slope": latent_spectrum.slope(power), "high_share": latent_spectrum.high_share(power)}


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what exists; None where nothing does."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _noise(records: Sequence["ImageRecord"], sigmas: Sequence[float]) -> list[dict[str, Any]]:
    table = np.array([record.row["noise_db"] for record in records])
    return [
        {"sigma": sigma, "psnr_db": float(table[:, n].mean()), "drop_db": float((table[:, 0] - table[:, n]).mean())}
        for n, sigma in enumerate(sigmas)
    ]


def _equivariance(records: Sequence["ImageRecord"]) -> dict[str, Any]:
    found = {}
    for name in records[0].row["equivariance"]:
        rows = [record.row["equivariance"][name] for record in records]
        found[name] = {key: _mean([row[key] for row in rows]) for key in rows[0]}
    return found


def _locality(records: Sequence["ImageRecord"], f: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, largest in (("random", False), ("largest_norm", True)):
        cells = [(record, reach) for record in records for reach in record.reaches if reach.largest == largest]
        moved = [(record, reach, share) for record, reach in cells if (share := reach.share_within(4 * f)) is not None]
        worst = min(moved, key=lambda cell: cell[2], default=None)
        curves = [np.cumsum(reach.energy) / reach.energy.sum() for _, reach, _ in moved]
        found[kind] = {
            "n_cells": len(cells),
            "share_within": {
                str(distance): _mean([reach.share_within(distance) for _, reach in cells])
                for distance in (f, 2 * f, 4 * f)
            },
            "reach_px": max((reach.reach_px for _, reach in cells), default=None),
            "visible_px": max((reach.visible_px for _, reach in cells), default=None),
            "worst": worst
            and {"image": worst[0].row["image"], "row": worst[1].row, "column": worst[1].column, "share": worst[2]},
            "curve": np.mean(curves, axis=0).tolist() if curves else [],
        }
    return found


def _drift(records: Sequence["ImageRecord"]) -> dict[str, Any]:
    rows = [record.row["drift"] for record in records]
    return {key: np.mean([row[key] for row in rows], axis=0).tolist() for key in rows[0]}


def _grid(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sound = [row for row in rows if "failed" not in row]
    found: dict[str, Any] = {"colours": list(rows), "n_failed": len(rows) - len(sound)}
    if not sound:
        return found
    energy = np.array([row["ripple_rms"] for row in sound]) ** 2
    total = max(float(energy.sum()), 1e-30)
    periods = {
        period: float(sum(e * row["energy"][period] for e, row in zip(energy, sound, strict=True)) / total)
        for period in sound[0]["energy"]
    }
    rms = {key: float(np.sqrt(np.mean([row[key] ** 2 for row in sound]))) for key in ("border_rms", "centre_rms")}
    return found | {
        **rms,
        "border_ratio": rms["border_rms"] / rms["centre_rms"] if rms["centre_rms"] > 0 else None,
        "colour_shift": float(np.mean([np.abs(row["mean"]).max() for row in sound])),
        "ripple_rms": float(np.sqrt(energy.mean())),
        "grid_rms": float(np.sqrt(np.mean([row["grid_rms"] ** 2 for row in sound]))),
        "grid_rms_worst": max(row["grid_rms"] for row in sound),
        "periods": periods,
        "grid_share": sum(periods.values()),
    }
