"""What is installed from a wheel, outside the checkout, works with the models that came in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from codec import images
from tests.conftest import make_model, photo
from train.cli import main as train

ROOT = Path(__file__).parents[1]


def run(folder: Path, *command: str, **environment: str) -> str:
    """Run Python in a folder; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CODEC_MODELS")}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_carries_its_models_and_compresses_with_them_where_it_is_installed(tmp_path: Path) -> None:
    tree, away = tmp_path / "tree", tmp_path / "away"
    for name in ("codec", "eval", "train"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.rmtree(tree / "codec" / "models" / "kl-f8", ignore_errors=True)  # a stand-in takes its place
    source = make_model(tmp_path / "source")
    assert train(["ship", str(source), "-o", str(tree / "codec" / "models" / "kl-f8"), "--licence", "research"]) == 0
    run(tree, "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("codec/models/") for name in names if name.startswith("codec/models/")}
    assert {"LICENSE", *(f"kl-f8/{path.name}" for path in (tree / "codec/models/kl-f8").iterdir())} <= inside
    licences = {name.partition("dist-info/licenses/")[2] for name in names} - {""}
    assert {"LICENSE", "codec/models/LICENSE"} <= licences
    run(tmp_path, "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(tmp_path / "site"), str(wheel))
    away.mkdir()
    (away / "photo.png").write_bytes(images.save_png(photo(40, 50)))
    here = {"PYTHONPATH": str(tmp_path / "site")}
    assert str(tmp_path / "site" / "codec" / "models" / "kl-f8") in run(away, "codec", "models", **here)
    run(away, "codec", "encode", "photo.png", "-o", "coded", **here)
    run(away, "codec", "decode", "coded", "-o", "decoded", **here)
    assert images.load(away / "decoded" / "photo.png.png").shape == (40, 50, 3)
