"""A race of autoencoders: the same small denoiser, seed, data, order, noise and compute on the latents of each.

    OUT/settings.json          what all entrants share; another race in the same folder is refused
    OUT/<name>/model.json      hashes of the autoencoder's files
    OUT/<name>/run/            the denoiser's run folder: log, checkpoints, model
    OUT/<name>/samples.png     drawn images, the same classes and seeds in the same cells for all entrants
    OUT/<name>/result.json     written when an entrant has finished; it then does not run again

Entry: `Race`.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from codec.console import progress, stderr
from codec.errors import ModelError, UsageError
from codec.files import write_atomic
from codec.rectified_flow import mix
from eval.autoencoder import Autoencoder, file_hashes
from eval.protocol import differences
from eval.results import finite, read_json
from train.denoiser import CONVENTION, DenoiserConfig, DenoiserModule, build_network
from train.precision import autocast
from train.race.data import Pictures
from train.race.entrant import Entrant, RaceConfig
from train.race.numbers import curve, losses
from train.race.score import Judge
from train.race.sheet import sheet
from train.ranks import Ranks

SETTINGS_JSON, MODEL_JSON = "settings.json", "model.json"
RESULT_JSON, SAMPLES_PNG = "result.json", "samples.png"
LEAST_STEPS = 50  # of --minutes: fewer say nothing
_WARM, _TIMED = 3, 10  # steps of a calibration


def stride_of(models: Sequence[Autoencoder], size: int, asked: int | None) -> int:
    """Return the pixels along a token's side that suit all autoencoders: what was asked for, or the largest f.

    Raises:
        UsageError: some f does not divide it, or it does not divide the size.
    """
    fs = {model.name: model.engine.model.f for model in models}
    stride = asked or max(fs.values())
    for name, f in fs.items():
        if stride % f:
            raise UsageError(f"{name}: f {f} does not divide the tokens' stride of {stride} pixels; set --stride")
    if size % stride:
        raise UsageError(f"--size {size}: expected a multiple of the tokens' stride, {stride} pixels")
    return stride


def images_in(
    minutes: float, config: RaceConfig, shape: tuple[int, int, int], n_classes: int, accelerator: Accelerator
) -> int:
    """Return how many images a denoiser sees in some minutes here, timed on random latents; the same on all ranks.

    Args:
        minutes: of training, for each entrant.
        config: of the race; its n_images is not looked at.
        shape: (D, h, w) of some entrant's latents; the others cost the same but for the projections.
        n_classes: of the data.
        accelerator: its ranks share each step.
    """
    device, ranks = accelerator.device, Ranks(accelerator)
    patch = shape[1] * config.stride // config.size
    denoiser = DenoiserConfig(width=config.width, depth=config.depth, patch=patch)
    module = DenoiserModule(build_network(denoiser, shape, n_classes, config.seed)).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, fused=True)
    size = config.batch_size // ranks.count
    labels, t = torch.zeros(size, dtype=torch.int64, device=device), torch.full((size,), 0.5, device=device)
    lend, start = autocast(config.precision, device), 0.0
    for step in range(_WARM + _TIMED):
        if step == _WARM:
            start = time.perf_counter()
        z, noise = torch.randn(2, size, *shape, device=device)
        z_t, velocity = mix(z, noise, t)
        with lend():
            predicted = module(z_t, t, labels)
        (predicted - velocity).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        float(predicted.detach()[0, 0, 0, 0])  # waits for a GPU
    step_s = (time.perf_counter() - start) / _TIMED
    n_steps = max(LEAST_STEPS, round(60 * minutes / step_s))
    return int(ranks.gather([n_steps])[0]) * config.batch_size


class Race:
    """Runs one autoencoder after the other; what is finished is kept and not run again.

    Attributes:
        settings: all that decides the numbers, besides the autoencoders, as plain JSON values.
        control: see `train.race.score.Judge`.
    """

    def __init__(
        self,
        pictures: Pictures,
        config: RaceConfig,
        judge: Judge,
        out: Path,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        """Check that the folder holds this race or none, and note what it is.

        Raises:
            UsageError: it holds another one.
        """
        self._pictures, self._config, self._judge = pictures, config, judge
        self._out, self._accelerator, self._say = out, accelerator, say
        self._ranks = Ranks(accelerator)
        self.control = judge.control
        self.settings = self._settings()
        check_settings(out, self.settings)
        if self._ranks.main:
            write_atomic(out / SETTINGS_JSON, (json.dumps(self.settings, indent=1) + "\n").encode())

    def _settings(self) -> dict[str, Any]:
        """Return all that decides the numbers, besides the autoencoders."""
        pictures, network = self._pictures, self._judge.network
        return {
            **asdict(self._config),
            "n_tokens": self._config.n_tokens,
            "data": {
                "digest": pictures.digest(),
                "n_training": len(pictures.training),
                "n_held_out": len(pictures.held_out),
                "classes": list(pictures.classes),
            },
            "features": None if network is None else network.about(),
        }

    def run(self, model: Autoencoder) -> dict[str, Any]:
        """Race one autoencoder, or return its result if it has finished before.

        Raises:
            UsageError: its folder holds the result of another model.
            ModelError: latents or samples are not finite.
        """
        folder = self._out / folder_name(model.name)
        weights = self._claim(folder, model)
        if (done := finished(folder)) is not None:
            self._say(f"{model.name}: finished before, see {folder / RESULT_JSON}")
            return done
        times: dict[str, float] = {}
        entrant = Entrant(model, self._pictures, self._config, folder, self._accelerator)
        pictures, ranks = self._pictures, self._ranks
        with progress(disable=not (ranks.main and stderr.is_terminal)) as bar:
            n_own = -(-(len(pictures.training) + len(pictures.held_out)) // ranks.count)
            task = bar.add_task(f"{model.name}: encoding", total=n_own)
            times["encode"] = _timed(lambda: entrant.encode(lambda n: bar.advance(task, n)))
        times["train"] = entrant.train()
        labels = pictures.asked(self._config.n_samples)
        with progress(disable=not (ranks.main and stderr.is_terminal)) as bar:
            task = bar.add_task(f"{model.name}: drawing", total=-(-len(labels) // ranks.count))
            start = time.perf_counter()
            drawn = entrant.draw(labels, lambda n: bar.advance(task, n))
            times["draw"] = time.perf_counter() - start
        rows = entrant.measure()
        own = entrant.reconstruct(pictures.held_out)
        ceiling = entrant.reconstruct([pictures.training[n] for n in pictures.control(len(labels))])
        result: dict[str, Any] = {}
        if ranks.main:
            result = {
                "name": model.name,
                "settings": digest(self.settings),
                "model": {**model.description(), "weights": weights},
                "latents": _latents(entrant),
                "denoiser": self._network(entrant),
                "loss": losses(rows),
                "curve": curve(folder / "run" / "log.jsonl"),
                "scores": self._judge.scores(drawn, ceiling, own),
                "times_s": times,
            }
            write_atomic(folder / SAMPLES_PNG, sheet(pictures, own, labels, drawn))
            text = json.dumps(finite(result), indent=1, allow_nan=False)
            write_atomic(folder / RESULT_JSON, (text + "\n").encode())
        ranks.wait()
        return result

    def _claim(self, folder: Path, model: Autoencoder) -> dict[str, str]:
        """Note whose folder this is, before anything is kept in it; return the hashes of the model's files.

        Raises:
            UsageError: it is another model's.
        """
        weights = file_hashes(model.folder)
        path = folder / MODEL_JSON
        if path.is_file() and read_json(path) != weights:
            raise UsageError(f"{folder}: of another {model.name}, see {path}; remove it, or name another folder")
        if self._ranks.main:
            write_atomic(path, (json.dumps(weights, indent=1) + "\n").encode())
        return weights

    def _network(self, entrant: Entrant) -> dict[str, Any]:
        """Return what a result says about the denoiser: the same for all but for the projections."""
        network = entrant.network().network
        ends = ("pos_embed.proj.", "proj_out_2.")
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        projections = sum(n for name, n in sizes.items() if name.startswith(ends))
        return {
            "class": type(network).__name__,
            "folder": str(entrant.folder / "run" / "model"),
            "convention": CONVENTION,
            "patch": int(network.config.patch_size),
            "n_parameters": sum(sizes.values()),
            "n_parameters_of_projections": projections,
        }


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _latents(entrant: Entrant) -> dict[str, Any]:
    mean, std = entrant.moments
    return {"of": "normalized by the model's config", "mean": mean.tolist(), "std": std.tolist()}


def folder_name(name: str) -> str:
    """Return a file name for a model's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip(".") or "model"


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the result of an entrant; None where it has not finished."""
    return read_json(folder / RESULT_JSON) if (folder / RESULT_JSON).is_file() else None


def results(out: Path, settings: Mapping[str, Any], first: Sequence[str]) -> list[dict[str, Any]]:
    """Return the results in a folder, those of the names in `first` first."""
    found = [finished(path.parent) for path in sorted(out.glob(f"*/{RESULT_JSON}"))]
    sound = [result for result in found if result is not None and result["settings"] == digest(settings)]
    order = {name: n for n, name in enumerate(first)}
    return sorted(sound, key=lambda result: order.get(result["name"], len(order)))


def stored_settings(out: Path) -> dict[str, Any] | None:
    """Return the settings of the race in a folder; None where there is none."""
    return read_json(out / SETTINGS_JSON) if (out / SETTINGS_JSON).is_file() else None


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise UsageError where a folder holds a race with other settings."""
    before = stored_settings(out)
    plain = json.loads(json.dumps(settings))
    if before is not None and before != plain:
        raise UsageError(f"{out}: holds another race ({'; '.join(differences(before, plain))}); name another folder")


def digest(settings: Mapping[str, Any]) -> str:
    """Return the hash of a race's settings, 16 hex digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_models(models: Sequence[Autoencoder]) -> None:
    """Check that the models can race each other.

    Raises:
        ModelError: one has no scaling factor that latents could be normalized by.
        UsageError: two would share a folder.
    """
    for model in models:
        factor = model.engine.model.scaling_factor
        if not 0 < factor < math.inf:
            raise ModelError(f"{model.folder}: scaling_factor {factor}, expected a positive number")
    names = [folder_name(model.name) for model in models]
    if len(set(names)) < len(names):
        raise UsageError(f"two models of one name among {', '.join(names)}: rename a folder")
