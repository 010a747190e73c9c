"""`codec-eval weights`: what is there, what is not, and how to get it."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from eval.cli import main

NAMES = ["squeezenet1_0", "squeezenet1_1", "alexnet", "vgg16", "inception", "transformers"]


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, dict[str, Any]]:
    assert main(["weights", "--json", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["backbones"]
    assert [row["name"] for row in rows] == NAMES
    return {row["name"]: row for row in rows}


def test_every_backbone_with_its_users_and_the_command_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    rows = listed(capsys)
    assert not any(row["found"] for row in rows.values())
    for row in rows.values():
        assert row["looked_in"] == [str(tmp_path / "home" / "hub" / "checkpoints")]
        assert row["path"] is row["sha256"] is None
    assert rows["vgg16"]["metrics"] == ["lpips_vgg", "dists"]
    assert rows["squeezenet1_0"]["metrics"] == ["lpips_sqz10"]
    assert rows["alexnet"]["losses"] == ["loss.perceptual = lpips-alex"]
    assert "rfid" in rows["inception"]["set_metrics"]
    assert "torchvision.models.vgg16(weights='DEFAULT')" in rows["vgg16"]["command"]
    assert "URL_INCEPTION_V3" in rows["inception"]["command"]
    assert "hf download" in rows["transformers"]["command"]


def test_a_file_that_is_there_is_named_and_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = hashlib.sha256(b"good").hexdigest()
    (tmp_path / f"vgg16-{good[:8]}.pth").write_bytes(b"good")
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"half a download")
    (tmp_path / "squeezenet1_0.safetensors").write_bytes(b"no hash in its name")
    folder = tmp_path / "dinov2"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    monkeypatch.setenv("LATENT_CODEC_FEATURES", str(tmp_path))
    rows = listed(capsys)
    assert (rows["vgg16"]["path"], rows["vgg16"]["sha256"]) == (str(tmp_path / f"vgg16-{good[:8]}.pth"), good)
    assert [rows[name]["intact"] for name in ("vgg16", "alexnet", "squeezenet1_0")] == [True, False, None]
    assert rows["transformers"]["path"] == str(folder)
    assert not rows["inception"]["found"]
    assert main(["weights"]) == 0
    text = capsys.readouterr().out
    assert good in text
    assert "DAMAGED" in next(line for line in text.splitlines() if "alexnet-owt" in line)
    assert "fetch    python -c" in text
    only = tmp_path / "squeezenet1_0.safetensors"
    rows = listed(capsys, "--features", str(only))
    assert [name for name in NAMES if rows[name]["found"]] == ["squeezenet1_0"]
    assert rows["vgg16"]["looked_in"] == [str(only)]


def test_the_losses_are_options_of_a_recipe() -> None:
    from eval.weights_cli import LOSSES
    from train.config import Config

    sections = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    for option in (option for options in LOSSES.values() for option in options):
        section, key = option.split(" ")[0].split(".")
        assert key in {field.name for field in dataclasses.fields(sections[section])}, option  # type: ignore[arg-type]
