"""The example in docs/diffusion.md, run as it stands there, with smaller numbers."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from train.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "diffusion.md"
SMALLER = "STEPS, BATCH, WIDTH, DEPTH, PATCH = 150, 12, 32, 1, 2"


def test_the_documented_example_trains_on_a_cache_and_draws_images(
    shards: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "runs" / "first" / "model")
    command = ["cache", str(shards), "-m", "runs/first/model", "-o", "latents", "--size", "16", "--dtype", "float32"]
    assert main(command) == 0
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    small, n_changed = re.subn(r"^STEPS, BATCH, .*$", SMALLER, block, flags=re.MULTILINE)
    assert n_changed == 1
    small = small.replace('"cuda" if torch.cuda.is_available() else ', "")
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    exec(compile(small, str(PAGE), "exec"), found)
    losses = found["losses"]
    assert len(losses) >= 150
    assert np.mean(losses[-30:]) < 0.97 * np.mean(losses[:30])
    network = DiTTransformer2DModel.from_pretrained(tmp_path / "dit")
    assert network.config.sample_size == 8
    pictures = [np.asarray(Image.open(tmp_path / f"drawn-{n}.png")) for n in range(8)]
    assert {picture.shape for picture in pictures} == {(16, 16, 3)}
    assert not np.array_equal(pictures[0], pictures[1])
    normalized = found["data"][0]["latents"][None]
    raw = found["data"].denormalize(normalized)
    config = found["vae"].config
    torch.testing.assert_close(raw, normalized / config.scaling_factor + config.shift_factor)
