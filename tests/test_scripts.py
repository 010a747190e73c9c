"""The thin entry points in scripts/ are the commands."""

import subprocess
import sys
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


def test_the_entry_point_of_a_go_runs_its_command(tmp_path: Path) -> None:
    more = ["--photos", str(tmp_path), "-o", str(tmp_path / "out"), "--state", str(tmp_path / "nowhere")]
    command = [sys.executable, str(SCRIPTS / "train_shipped.py"), "tiny", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such state; leave --state out in the first go\n"
