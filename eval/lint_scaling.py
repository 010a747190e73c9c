"""`codec-eval lint`, the normalisation: what a diffusion model's pipelines make of the latents.

normalized = (z - shift_factor) * scaling_factor                      AutoencoderKL, AutoencoderTiny, VQModel (no shift)
normalized = (z - latents_mean) * scaling_factor / latents_std        where config.json has the last two
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from codec.statistics import LatentSummary
from eval.lint_config import is_number, parameters
from eval.lint_findings import Findings

# Latents of other images than the model was measured on differ this much without anything being wrong: ratios of
# standard deviations, and distances of means in standard deviations.
_RATIO_ERROR, _RATIO_WARNING, _DISTANCE = 1.6, 1.25, 0.5
_ROUGH_RATIO, _ROUGH_DISTANCE = 3.0, 1.5
_DEVIATIONS = (
    1.0,
    0.5,
)  # scaling_factor beside latents_std: of unit deviation, or EDM's 0.5 (arXiv:2206.00364 table 1)


@dataclass(frozen=True)
class Latents:
    """What the latents of some pictures are like.

    Attributes:
        summary: their moments.
        rough: whether the pictures were the built-in ones, which are no photographs.
    """

    summary: LatentSummary
    rough: bool

    @property
    def where(self) -> str:
        """What was measured on, for a message."""
        kind = "built-in pictures, so roughly" if self.rough else "images"
        return f"on {self.summary.n_images} {kind}"


def check_scaling(config: Mapping[str, Any], kind: Any, latents: Latents | None, findings: Findings) -> None:
    """Check scaling_factor, shift_factor, latents_mean and latents_std against each other and the latents.

    Args:
        config: config.json.
        kind: diffusers' class.
        latents: None where the network could not be run: then only what is there and of which form.
        findings: takes what is wrong.
    """
    lists = {name: config[name] for name in ("latents_mean", "latents_std") if config.get(name) is not None}
    if lists:
        _check_lists(config, kind, lists, latents, findings)
        return
    _check_factor(config, kind, latents, findings)
    if "shift_factor" in parameters(kind):
        _check_shift(config, latents, findings)


def _check_factor(config: Mapping[str, Any], kind: Any, latents: Latents | None, findings: Findings) -> None:
    default = parameters(kind)["scaling_factor"]
    factor = config.get("scaling_factor", default)
    measured = None if latents is None else 1 / latents.summary.global_std
    mend = "write 1 / the standard deviation of the latents, measured on training images"
    if measured is not None:
        mend = f"write {measured:.5g}" if latents and not latents.rough else f"{mend} (with --data)"
    if "scaling_factor" not in config:
        what = f"missing: diffusers takes its default, {default}"
        what += "" if measured is None or latents is None else f" (measured {measured:.4g} {latents.where})"
        findings.add("scaling-missing", "scaling_factor", what, mend)
        return
    if not is_number(factor) or factor <= 0:
        findings.add("scaling-missing", "scaling_factor", f"{factor!r}, expected a number above 0", mend)
        return
    if latents is None:
        return
    # The first stands in codec.json, the second is what trainers that draw samples see.
    stds = [factor * std for std in (latents.summary.global_std, latents.summary.sampled_std)]
    std = min(stds, key=lambda value: abs(math.log(value)))
    off = max(std, 1 / std)
    if off > (_ROUGH_RATIO if latents.rough else _RATIO_WARNING):
        stale = ", diffusers' default for another model," if factor == default and default != 1 else ""
        what = (
            f"{factor:.5g}{stale} gives normalized latents a standard deviation of {std:.3g} (measured {latents.where})"
        )
        findings.add("scaling", "scaling_factor", what, mend, level="error" if off > _RATIO_ERROR else "warning")


def _check_shift(config: Mapping[str, Any], latents: Latents | None, findings: Findings) -> None:
    shift = config.get("shift_factor")
    if shift is not None and not is_number(shift):
        mend = "write a number, 0 for none"
        findings.add("shift", "shift_factor", f"{shift!r}, expected a number or null", mend)
        return
    if latents is None:
        return
    mean, std = latents.summary.global_mean, latents.summary.global_std
    distance = abs(mean - (shift or 0.0)) / std
    if distance > (_ROUGH_DISTANCE if latents.rough else _DISTANCE):
        stated = "missing" if shift is None else f"{shift:.5g}"
        what = (
            f"{stated}, {distance:.2g} standard deviations from the latents' mean (measured {mean:.4g} {latents.where})"
        )
        mend = f"write {mean:.5g}" if not latents.rough else "write the mean of the latents, measured with --data"
        findings.add("shift", "shift_factor", what, mend)


def _check_lists(
    config: Mapping[str, Any], kind: Any, lists: Mapping[str, Any], latents: Latents | None, findings: Findings
) -> None:
    channels = config.get("latent_channels", parameters(kind)["latent_channels"])
    if len(lists) == 1:
        (name,) = lists
        (other,) = {"latents_mean", "latents_std"} - {name}
        what = f"missing, though {name} is there: pipelines then use neither"
        findings.add("latents-pair", other, what, f"write both, {channels} numbers each, or neither")
        return
    for name, values in lists.items():
        numbers = isinstance(values, list) and all(is_number(value) for value in values)
        if not numbers or len(values) != channels:
            got = f"{len(values)} numbers" if numbers else repr(values)[:60]
            what = f"{got}, expected one for each of {channels} latent channels"
            findings.add("latents-length", name, what, "write the statistics of these latents, channel by channel")
    if findings.has("latents-length"):
        return
    mean, std = (np.array(lists[name], dtype=float) for name in ("latents_mean", "latents_std"))
    if not (std > 0).all():
        findings.add("latents-value", "latents_std", f"{std.min():.4g} in it, expected numbers above 0", "measure anew")
    elif latents is not None and len(mean) == len(latents.summary.mean):
        _compare_lists(mean, std, latents, findings)
    factor = config.get("scaling_factor", parameters(kind)["scaling_factor"])
    if factor not in _DEVIATIONS:
        what = f"{factor!r} beside latents_mean and latents_std: pipelines apply both, and normalized latents get a "
        what += f"standard deviation of {factor if is_number(factor) else 'nothing that is known'}"
        findings.add("stale-scaling", "scaling_factor", what, "write 1.0 (0.5 for a model trained as in EDM)")
    if config.get("shift_factor"):
        what = f"{config['shift_factor']!r} beside latents_mean: some pipelines subtract one, some the other"
        findings.add("stale-scaling", "shift_factor", what, "write 0.0")


def _compare_lists(mean: np.ndarray, std: np.ndarray, latents: Latents, findings: Findings) -> None:
    summary = latents.summary
    mend = "measure both on training images, channel by channel"
    distances = np.abs(mean - summary.mean) / np.maximum(summary.std, 1e-12)
    worst = int(distances.argmax())
    if distances[worst] > (_ROUGH_DISTANCE if latents.rough else _DISTANCE):
        what = f"{mean[worst]:.4g} in channel {worst} (measured {summary.mean[worst]:.4g} {latents.where})"
        findings.add("latents-value", "latents_mean", what, mend)
    ratios = np.maximum(summary.std, 1e-12) / std
    worst = int(np.abs(np.log(ratios)).argmax())
    if max(ratios[worst], 1 / ratios[worst]) > (_ROUGH_RATIO if latents.rough else _RATIO_ERROR):
        what = f"{std[worst]:.4g} in channel {worst} (measured {summary.std[worst]:.4g} {latents.where})"
        findings.add("latents-value", "latents_std", what, mend)
