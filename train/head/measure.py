"""What a head is worth on held-out latents: how well it predicts them, which units speak, what the condition does.

    latents -> ConditionalHead -> error, KL              -> loss, bits (a bound of -log2 p(z|c)), KL, unit reports
    latents -> units -> decode, right and other condition -> dB that the condition is worth, pixels, a picture

What is random belongs to a sample's key. Entry: `measure`. Imports torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.engine import Engine
from codec.head.network import ConditionalHead, Drawing, Noise
from codec.pixels import to_float
from codec.rectified_flow import bound_times, density_bound, training_times
from eval.draws import generator
from train.denoiser_feed import LatentSet
from train.draws import differing
from train.head.config import HeadConfig
from train.head.latents import HeadData
from train.head.objectives import unit_report

RECONSTRUCTED = 48
"""Held-out samples that are reconstructed; the first ones."""
STEPS = 8
"""Of a flow-matching decoder, in validation."""
_TIMES = 2  # at which a flow-matching decoder is looked at, of training and of the bound each
_BATCH = 64
_SHOWN = 8  # columns of the picture
_SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Held:
    """Held-out samples, as a head sees them.

    Attributes:
        latents: normalized.
        z: (N, D, h, w) normalized samples of their posteriors.
        data: what they are of.
        other: for each the number of another one, whose condition differs; its own where all are alike.
        seed: of what is drawn.
    """

    latents: LatentSet
    z: Tensor
    data: HeadData
    other: Sequence[int]
    seed: int

    @classmethod
    def of(cls, data: HeadData, seed: int) -> "Held":
        """Return the held-out part of a head's data."""
        held = data.held_out
        z = torch.stack([held.one(n, seed) for n in range(len(held))])
        labels = held.labels.numpy()
        other = [differing(labels, n, generator(seed, key, "other")) for n, key in enumerate(held.keys)]
        return cls(latents=held, z=z, data=data, other=other, seed=seed)

    def conditions(self, chosen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what the network is told of some samples, and which conditions are hidden."""
        labels = self.latents.labels[list(chosen)].to(device)
        return self.data.told(labels)

    def normal(self, chosen: Sequence[int], shape: tuple[int, ...], purpose: str, device: torch.device) -> Tensor:
        """Return standard normal noise of some samples, (len(chosen), *shape)."""
        rngs = [generator(self.seed, self.latents.keys[n], purpose) for n in chosen]
        drawn = [rng.standard_normal(shape, dtype=np.float32) for rng in rngs]
        return torch.from_numpy(np.stack(drawn)).to(device)

    def uniform(self, chosen: Sequence[int], purpose: str) -> Tensor:
        """Return a number in [0, 1) of each of some samples."""
        return torch.tensor([generator(self.seed, self.latents.keys[n], purpose).random() for n in chosen])


@dataclass
class UnitTally:
    """The units of one level, of some samples; see `train.task.Tally`."""

    means: np.ndarray
    kl: np.ndarray
    least_nats: float
    suffix: str

    def __add__(self, other: "UnitTally") -> "UnitTally":
        means, kl = np.concatenate([self.means, other.means]), np.concatenate([self.kl, other.kl])
        return UnitTally(means, kl, self.least_nats, self.suffix)

    def figures(self) -> dict[str, float]:
        """Return how many units say something, of how many, and their KL in nats."""
        means, kl = torch.from_numpy(self.means), torch.from_numpy(self.kl)
        if len(means) < 2:
            return {}
        report = unit_report(means, kl.expand_as(means), self.least_nats)
        found = {"units": float(report.kl.numel()), "active_units": float((~report.collapsed).sum())}
        if kl.shape == means.shape:
            found |= {"unit_kl_most": float(report.kl.max()), "unit_kl_median": float(report.kl.median())}
        return {f"{name}{self.suffix}": value for name, value in found.items()}


@dataclass
class ConditionTally:
    """Squared errors of reconstructions with the right condition and with another one; see `train.task.Tally`."""

    right: float
    other: float
    power: float
    prefix: str
    has_other: bool

    def __add__(self, more: "ConditionTally") -> "ConditionTally":
        right, other, power = self.right + more.right, self.other + more.other, self.power + more.power
        return ConditionTally(right, other, power, self.prefix, self.has_other)

    def figures(self) -> dict[str, float]:
        """Return the ratio of power to error in dB, and by how many dB the right condition is better."""
        found = {f"{self.prefix}recon_db": _db(self.power / max(self.right, _SMALLEST))}
        if self.has_other:
            ratio = max(self.other, _SMALLEST) / max(self.right, _SMALLEST)
            found[f"{self.prefix}condition_db"] = _db(ratio)
        return found


def _db(ratio: float) -> float:
    return 10 * math.log10(max(ratio, _SMALLEST))


@torch.inference_mode()
def measure(
    network: ConditionalHead,
    held: Held,
    chosen: Sequence[int],
    config: HeadConfig,
    device: torch.device,
    engine: Engine | None,
    *,
    draw: bool,
) -> tuple[list[dict[str, Any]], np.ndarray | None]:
    """Measure a head on held-out samples, in float32.

    Args:
        network: on `device`.
        held: all held-out samples.
        chosen: which of them.
        config: the recipe.
        device: where it is computed.
        engine: the autoencoder, to look at pixels; None = latents alone.
        draw: reconstruct the first ones, and draw some.

    Returns:
        A row for each: "loss" (error + beta KL / (D h w), no free bits, no total correlation), "error"; "bits", an
        upper bound of -log2 p(z|c) in bits per number of a normalized latent, "marginal_bits" of Gaussians with the
        training's moments by channel, "gain_bits" of the former over the latter; "kl" in nats, of a second level
        "kl_1" and "kl_2" apart, "kl_other" of the first level to the prior under another condition, where that is
        Gaussian; units (see `UnitTally`); of the reconstructed ones dB of latents and pixels (see `ConditionTally`).
        And a picture, (H, W, 3) uint8, or None.
    """
    rows: list[dict[str, Any]] = []
    for start in range(0, len(chosen), _BATCH):
        rows += _predicted(network, held, list(chosen[start : start + _BATCH]), config, device)
    if not draw:
        return rows, None
    some = [n for n in chosen if n < RECONSTRUCTED]
    if not some:
        return rows, None
    tallies, picture = _reconstructed(network, held, some, device, engine)
    for row, more in zip(rows, tallies, strict=False):  # the first of `chosen`: both go up
        row |= more
    return rows, picture


def _predicted(
    network: ConditionalHead, held: Held, chosen: list[int], config: HeadConfig, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rows of some samples, all but reconstructions."""
    z, n, volume = held.z[chosen].to(device), network.space.n, network.log_volume()
    c, hidden = held.conditions(chosen, device)
    c_other, _ = held.conditions([held.other[k] for k in chosen], device)
    found: dict[str, list[Tensor]] = {}
    for kind, noise in _noises(network, held, chosen, device):
        out = network(z, c, hidden, noise)
        each = [part.flatten(1).sum(1) for part in out.kl]
        values = {"kl": torch.stack(each).sum(0), "kl_1": each[0]}
        if kind != "bound":
            values["error"] = out.error
        if kind != "error":
            values["nats"] = out.error if noise.time is None else density_bound(out.error, noise.time)
        if out.prior is not None and network.config.has_plain_units and held.data.has_conditions:
            prior = network.gaussian_prior(network.condition(c_other, hidden))
            values["kl_other"] = out.posteriors[0].kl(prior).sum(1)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    columns = {name: torch.stack(parts).double().mean(0) for name, parts in found.items()}
    squared = network.standardised(z).double().square().mean((1, 2, 3))
    columns["loss"] = columns["error"] + config.objective.beta * columns["kl"] / n
    columns["bits"] = (columns.pop("nats") + volume + columns["kl"] / n) / math.log(2)
    columns["marginal_bits"] = (0.5 * (squared + math.log(2 * math.pi)) + volume) / math.log(2)
    columns["gain_bits"] = columns["marginal_bits"] - columns["bits"]
    first = columns.pop("kl_1")
    if len(out.kl) == 2:
        columns |= {"kl_1": first, "kl_2": columns["kl"] - first}
    table = {name: values.tolist() for name, values in columns.items()}
    rows: list[dict[str, Any]] = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    for level, (posterior, kl) in enumerate(zip(out.posteriors, out.kl, strict=True)):
        suffix = f"_{level + 1}" if level else ""
        both = (part.flatten(1).double().cpu().numpy() for part in (posterior.mean, kl))
        for row, mean, nats in zip(rows, *both, strict=True):
            row[f"units{suffix}"] = UnitTally(mean[None], nats[None], config.objective.active_nats, suffix)
    return rows


def _noises(
    network: ConditionalHead, held: Held, chosen: list[int], device: torch.device
) -> Iterator[tuple[str, Noise]]:
    """Yield what samples are looked at with, and what for: the "error" of training, the "bound", or "both".

    A flow-matching decoder is looked at where it was trained and where the bound is taken, at times evenly spread.
    """
    gaussian = network.config.decoder == "gaussian"
    for kind in ["both"] if gaussian else ["error", "bound"]:
        for number in range(1 if gaussian else _TIMES):
            tag = f"{kind} {number}"
            units = tuple(held.normal(chosen, unit, f"units {unit} {tag}", device) for unit in network.unit_shapes)
            if gaussian:
                yield kind, Noise(units=units)
                continue
            even = (number + held.uniform(chosen, f"time {tag}")) / _TIMES
            quantiles = torch.special.ndtri(even.clamp(1e-6, 1 - 1e-6))
            time = bound_times(even) if kind == "bound" else training_times(quantiles)
            latents = held.normal(chosen, network.space.shape, f"noise {tag}", device)
            yield kind, Noise(units=units, time=time.to(device), latents=latents)


def _reconstructed(
    network: ConditionalHead, held: Held, some: list[int], device: torch.device, engine: Engine | None
) -> tuple[list[dict[str, Any]], np.ndarray | None]:
    """Return tallies of some samples and a picture: rows of latents, reconstructions, under other conditions, draws."""
    z = held.z[some].to(device)
    c, hidden = held.conditions(some, device)
    other, _ = held.conditions([held.other[n] for n in some], device)
    units, _ = network.encode(z, c, hidden)
    drawing = Drawing(noise=held.normal(some, network.space.shape, "drawing", device), steps=STEPS)
    right, wrong = (network.decode(units, each, hidden, drawing) for each in (c, other))
    centred = z - network.shift[:, None, None]
    differ = held.data.has_conditions and any(held.other[n] != n for n in some)  # of all, or of none
    sums = [part.square().sum((1, 2, 3)).tolist() for part in (right - z, wrong - z, centred)]
    tallies: list[dict[str, Any]] = [
        {"reconstruction": ConditionTally(good, bad, power, "", differ)} for good, bad, power in zip(*sums, strict=True)
    ]
    if engine is None:
        return tallies, None
    shown = slice(0, _SHOWN)
    noise = tuple(held.normal(some[shown], shape, f"draw {shape}", device) for shape in network.unit_shapes)
    units = network.draw_units(c[shown], hidden[shown], noise, held.uniform(some[shown], "choice").to(device))
    drawn = network.decode(units, c[shown], hidden[shown], replace(drawing, noise=drawing.noise[shown]))
    images = [[_decoded(engine, held, one) for one in part] for part in (z, right, wrong, drawn)]
    for tally, real, good, bad in zip(tallies, *images[:3], strict=True):
        x = to_float(real)
        errors = [float((to_float(each) - x).square().mean()) for each in (good, bad)]
        tally["pixels"] = ConditionTally(errors[0], errors[1], 4.0, "pixel_", differ)  # the peak's power: PSNR
    return tallies, np.concatenate([np.concatenate(row[shown], axis=1) for row in images], axis=0)


def _decoded(engine: Engine, held: Held, z: Tensor) -> np.ndarray:
    """Return the image of one normalized latent, (D, h, w): (H, W, 3) uint8."""
    origin, f = held.data.origin, held.data.origin.f
    raw = origin.normalisation.denormalize(z[None]).cpu().numpy()[0]
    return engine.decode(raw, raw.shape[1] * f, raw.shape[2] * f)


def sentences(metrics: Mapping[str, float], config: HeadConfig) -> list[str]:
    """Return what a validation found, a line each, for the user."""
    active, units = metrics["active_units"], metrics["units"]
    lines = [
        f"held out: loss {metrics['loss']:.4f}; at most {metrics['bits']:.3f} bits a latent number "
        f"({metrics['gain_bits']:+.3f} gained over channel-wise Gaussians); KL {metrics['kl']:.1f} nats; "
        f"{active:.0f} of {units:.0f} units say something"
        + (f", {metrics['active_units_2']:.0f} of {metrics['units_2']:.0f} below" if "units_2" in metrics else "")
    ]
    if "condition_db" in metrics:
        text = f"condition used: {metrics['condition_db']:+.2f} dB over shuffled conditions in latents"
        if "pixel_condition_db" in metrics:
            text += f", {metrics['pixel_condition_db']:+.2f} dB in pixels (PSNR {metrics['pixel_recon_db']:.2f} dB)"
        if "kl_other" in metrics:
            first = metrics.get("kl_1", metrics["kl"])
            text += f"; by the prior: {metrics['kl_other'] - first:+.1f} nats"
        lines.append(text)
    for suffix, where in (("", "units"), ("_2", "units of the second level")):
        if f"units{suffix}" in metrics and metrics[f"active_units{suffix}"] == 0:
            lines.append(
                f"WARNING: posterior collapse: none of {metrics[f'units{suffix}']:.0f} {where} says anything: the "
                f"decoder does without. Lower objective.beta ({config.objective.beta:g}), raise objective.free_bits "
                f"({config.objective.free_bits:g}), or lengthen objective.ramp ({config.objective.ramp})"
            )
    return lines
