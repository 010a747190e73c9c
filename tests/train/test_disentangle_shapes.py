"""Heads of shapes with known factors: beta-TCVAE's units stand for single factors more than those of beta = 1."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codec import images
from codec.head import Head
from eval.disentanglement import disentanglement
from train.cli import main as codec_train

PATH = Path(__file__).parents[2] / "scripts" / "disentangle_shapes.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("disentangle_shapes", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rectangle_has_its_size_place_and_colour(script: Any) -> None:
    picture = script.render(5.25, 9.5, 3.0, 4.5, 0.0).astype(float)
    mass = picture[..., 0] / 255
    at = np.arange(16) + 0.5
    assert mass.sum() == pytest.approx(3 * 4.5, abs=0.05)
    assert (mass.sum(0) @ at, mass.sum(1) @ at) == pytest.approx((5.25 * 13.5, 9.5 * 13.5), rel=5e-3)
    assert picture.max((0, 1)).tolist() == [255, 60, 20]


def test_heads_are_trained_encoded_and_scored_by_the_commands(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--every", "16", "--codec-images", "640", "--images", "1280", "--seeds", "1")
    command = [str(tmp_path), "--objectives", "tcvae", "beta = 1", *short]
    assert script.main(command) == 0
    rows = {row["objective"]: row for row in json.loads((tmp_path / "scores.json").read_text())["runs"]}
    assert list(rows) == ["tcvae", "beta = 1"]
    assert all(row["seed"] == 1 and row["recon_db"] > 1 for row in rows.values())
    # the same by another way: pictures, through the codec
    more = ["-m", str(tmp_path / "codec/model"), "-o", str(tmp_path / "u.npz"), "--device", "cpu"]
    assert codec_train(["head", "features", str(tmp_path / "tcvae-1"), str(tmp_path / "pictures"), *more]) == 0
    with np.load(tmp_path / "u.npz") as found:
        names, units = found["names"], found["units"]
    factors = np.array([[int(number) for number in Path(name).stem.split("-")] for name in names])
    assert len(factors) == 4096 // 16
    scores = disentanglement(units, factors)
    assert rows["tcvae"]["mig"] == pytest.approx(scores["mig"]["score"], abs=0.02)
    assert rows["tcvae"]["informativeness"] > scores["dci"]["chance"] + 0.1  # the factors are those of the images
    head = Head.load(tmp_path / "tcvae-1", "cpu")
    assert head.stored.about["objective"]["kind"] == "tcvae"
    assert head.stored.about["condition"] == "none"
    capsys.readouterr()
    assert script.main(command) == 0  # nothing is trained again
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(f"| tcvae | {rows['tcvae']['mig']:.3f} |")
    assert images.load(tmp_path / "pictures" / f"{Path(names[0]).stem}.png").shape == (16, 16, 3)


@pytest.mark.slow
def test_tcvae_beats_beta_1_in_mig_over_three_seeds(script: Any, tmp_path: Path) -> None:
    assert script.main([str(tmp_path), "--objectives", "beta = 1", "tcvae"]) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["runs"]
    found = {kind: [row for row in rows if row["objective"] == kind] for kind in ("beta = 1", "tcvae")}
    mean = {kind: float(np.mean([row["mig"] for row in some])) for kind, some in found.items()}
    print({kind: [row["mig"] for row in some] for kind, some in found.items()})
    assert len(found["tcvae"]) == len(found["beta = 1"]) == 3
    assert mean["tcvae"] > mean["beta = 1"] + 0.1
    assert all(row["recon_db"] > 8 for row in rows)  # neither has given up reconstruction
    assert all(row["active_units"] >= 3 for row in rows)
