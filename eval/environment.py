"""What a result must say about where it was made: versions, hardware, commit. Does not import torch by itself."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from codec import __version__

PACKAGES = (
    *("torch", "torchvision", "diffusers", "numpy", "Pillow", "imagecodecs", "pytorch-msssim", "ssimulacra2", "scipy"),
    *("accelerate", "safetensors", "webdataset", "lpips", "matplotlib", "torchmetrics", "torch-fidelity"),
    *("DISTS-pytorch", "flip-evaluator", "bjontegaard", "transformers"),
)


def versions() -> dict[str, str | None]:
    """Return the versions of this project, Python and what results depend on; None for what is not installed."""
    found: dict[str, str | None] = {"latent-codec": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Return CPU, cores, torch's threads and the GPU (None where there is none)."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    torch = sys.modules.get("torch")  # not imported for baselines alone
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads() if torch else None, "gpu": gpu}


def commit() -> str | None:
    """Return the git commit of this code, "-dirty" appended if it was changed; None outside a checkout of it."""
    if not (Path(__file__).parents[1] / ".git").exists():  # installed, perhaps inside some other repository
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
