"""A tiny shard set and tiny runs, shared by the tests of training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from codec import images
from tests.conftest import photo
from train.cli import main
from train.recipe import load_recipe
from train.run import prepare
from train.trainer import Trainer


@pytest.fixture(autouse=True)
def _leave_no_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its precision for the life of a process; each test is a run of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic photographs of 72 to 100 pixels in shards; do not change it."""
    folder = tmp_path_factory.mktemp("data")
    for n in range(12):
        (folder / "photos").mkdir(exist_ok=True)
        (folder / "photos" / f"{n}.png").write_bytes(images.save_png(photo(72 + 2 * n, 100 - n, seed=n)))
    assert main(["shards", str(folder / "photos"), "-o", str(folder / "shards"), "--jobs", "1"]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def run_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the `tiny` recipe, trained through the command; do not change it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    overrides = [f"data.shards={shards}", f"run.out={out}", "run.validate_every=32", "export.statistics_images=10"]
    assert main(["run", "tiny", *overrides]) == 0
    return out


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of a SqueezeNet with random weights: perceptual features without a download."""
    from torchvision.models import squeezenet1_0

    path = tmp_path_factory.mktemp("features") / "squeezenet1_0-random.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(squeezenet1_0(weights=None).state_dict(), path)
    return path


def tiny_trainer(shards: Path, out: Path, *overrides: str) -> Trainer:
    """A trainer of the `tiny` recipe as the command builds it, ready for single steps."""
    return prepare(load_recipe("tiny", [f"data.shards={shards}", f"run.out={out}", *overrides]))


def log(run: Path, event: str = "step") -> list[dict[str, Any]]:
    """The lines of one kind in a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]
