"""`codec-eval lint`: what is wrong with an autoencoder's folder, ours or anybody's, and how to mend it.

    config.json -> fields -> weights: files, names, shapes -> network -> pictures -> latents, images, float16
                                                                 each step goes on as far as the one before lets it

Entry: `lint`. What can be found is listed in `eval.lint_findings.CODES`.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.errors import ModelError
from codec.latent_model import decoder_id, latent_model
from eval import lint_config, lint_network, lint_pictures, lint_scaling, lint_weights
from eval.lint_findings import Findings
from eval.lint_network import Measured


@dataclass(frozen=True)
class Report:
    """What lint says about one folder.

    Attributes:
        folder: as it was given.
        findings: what is wrong.
        measured: what the network did; None where it could not be run.
        rough: whether it was run on the built-in pictures.
        time_s: how long it took.
    """

    folder: Path
    findings: Findings
    measured: Measured | None
    rough: bool
    time_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "folder": str(self.folder),
            "findings": self.findings.to_json(),
            "measured": None if self.measured is None else self.measured.to_json(),
            "built_in_pictures": self.rough,
            "time_s": self.time_s,
        }


@dataclass(frozen=True)
class _Run:
    """What networks are run on: pictures, whether they are the built-in ones, where, and what to call after each."""

    pictures: Sequence[np.ndarray]
    rough: bool
    device: torch.device
    step: Callable[[], None]


def lint(
    folder: Path,
    pictures: Sequence[np.ndarray] = (),
    *,
    ignore: Collection[str] = (),
    device: str | torch.device = "cpu",
    step: Callable[[], None] = lambda: None,
) -> Report:
    """Look for everything that is wrong with a folder.

    Args:
        folder: of an autoencoder, or of a pipeline with one in `vae/`.
        pictures: (H, W, 3) uint8 photographs to measure on; none = built-in ones, with loose tolerances.
        ignore: codes to leave out.
        device: where the network runs.
        step: called after each picture.

    Raises:
        ModelError: there is no such folder, or no config.json in it.
    """
    start = time.perf_counter()
    root = _root(folder)
    findings, measured = Findings(ignore), None
    run = _Run(pictures or lint_pictures.built_in(), not pictures, torch.device(device), step)
    config = lint_config.read_config(root, findings)
    if config is not None:
        kind = lint_config.network_class(config, findings)
        if kind is not None:
            measured = _check_network(root, config, kind, run, findings)
        else:
            tensors = lint_weights.read_tensors(root, findings)
            lint_weights.check_values(tensors or {}, findings)
    lint_config.check_card(root, findings)
    return Report(folder, findings, measured, run.rough, time.perf_counter() - start)


def _root(folder: Path) -> Path:
    """Return the autoencoder's own folder; raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder (expected a diffusers autoencoder)")
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file():
            return place
    raise ModelError(f"{folder}: no config.json, neither in it nor in vae/: not a diffusers model folder")


def _check_network(root: Path, config: dict[str, Any], kind: Any, run: _Run, findings: Findings) -> Measured | None:
    lint_config.check_fields(config, kind, findings)
    network, faithful = _load(root, config, kind, findings)
    measured = None
    if network is not None and not findings.has("image-channels", "factor", "weights-nonfinite"):
        measured = lint_network.measure(network.to(run.device), run.pictures, findings, run.step)
    latents = None
    if measured is not None:
        lint_network.check_measured(measured, network, run.rough, findings)
        lint_network.check_float16(measured, config, kind.__name__, run.rough, findings)
        if not findings.has("collapsed"):
            latents = lint_scaling.Latents(measured.summary, run.rough)
    lint_scaling.check_scaling(config, kind, latents, findings)
    if kind.__name__ == "AutoencoderKL":
        lint_network.check_tiles(network, config, None if measured is None else run.pictures[0], findings)
    model = None if network is None or findings.has("factor") else latent_model(network)
    its_id = decoder_id(network) if network is not None and faithful else None
    lint_config.check_codec(root, config, model, its_id, findings)
    return measured


def _load(root: Path, config: dict[str, Any], kind: Any, findings: Findings) -> tuple[torch.nn.Module | None, bool]:
    """Return the network, as far as it can be had, and whether it is what config.json and the weights say."""
    tensors = lint_weights.read_tensors(root, findings)
    if tensors is None:
        return None, False
    tensors_now = lint_weights.renamed(tensors, findings)
    if tensors_now is None or findings.has("field-type"):
        lint_weights.check_values(tensors, findings)
        return None, False
    lint_weights.check_values(tensors_now, findings)
    stated = lint_config.arguments(config, kind)
    right = lint_weights.corrected(stated, kind, tensors_now, findings)
    network = lint_weights.build(kind, right, tensors_now, findings)
    return network, right == stated
