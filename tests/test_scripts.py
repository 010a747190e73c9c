"""The thin entry points in scripts/ are the commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("name", ["encode", "decode", "make_shards"])
def test_the_entry_point_runs_its_command(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), str(tmp_path / "nowhere"), "-o", str(tmp_path), "-m", "x"]
    command = command[:5] if name == "make_shards" else command
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.fixture
def quickstart(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """Run quickstart.sh with commands that only note how they were called: quickstart(TRAIN="1") -> output, calls."""
    root, venv = SCRIPTS.parent, tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    calls = tmp_path / "calls"
    commands = {name: f'echo {name} "$@" >> {calls}' for name in ("codec", "codec-eval", "codec-train")}
    commands["python"] = f'case "$1" in -m) ;; *) exec {sys.executable} "$@" ;; esac'
    for name, line in commands.items():
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (venv / "bin" / name).chmod(0o755)
    sums = subprocess.run(["cksum"], input=(root / "pyproject.toml").read_bytes(), capture_output=True, check=True)
    (venv / ".installed").write_text(f"train,eval {sums.stdout.decode().strip()}\n")

    def run(**environment: str) -> tuple[str, list[str]]:
        calls.unlink(missing_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in ("TRAIN", "MINUTES", "PHOTOS")}
        here = {"VENV": str(venv), "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
        command = ["bash", str(SCRIPTS / "quickstart.sh")]
        done = subprocess.run(command, env=kept | here | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, calls.read_text().replace(str(tmp_path / "out"), "OUT").splitlines()

    return run


def test_the_quickstart_begins_with_the_shipped_model_and_trains_only_if_asked(
    quickstart: Callable[..., tuple[str, list[str]]], tmp_path: Path
) -> None:
    told, calls = quickstart()
    assert calls == [
        "codec models",
        "codec encode OUT/photos/test -o OUT/coded",
        "codec info OUT/coded/astronaut.png.lcx",
        "codec decode OUT/coded -o OUT/decoded",
        "codec-eval rd OUT/photos/test -m kl-f8 -o OUT/rd",
    ]
    assert "Nothing was trained. TRAIN=1 bash scripts/quickstart.sh makes a model" in told
    assert (tmp_path / "out" / "photos" / "test" / "astronaut.png").exists()
    for asked in ({"TRAIN": "1"}, {"MINUTES": "4"}, {"PHOTOS": "mine"}):
        told, calls = quickstart(**asked)
        photos = asked.get("PHOTOS", "OUT/photos/train")
        assert calls[5:] == [
            f"codec-train shards {photos} -o OUT/shards",
            "codec-train run quickstart data.shards=OUT/shards run.out=OUT/run run.time_limit_min=4",
            "codec-eval rd OUT/photos/test -m OUT/run/model -o OUT/rd-run",
        ]
        assert "Nothing was trained" not in told
