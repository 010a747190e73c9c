import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from codec import model_folder, tables
from codec.errors import ModelError
from codec.latent_model import decoder_id


def digest(folder: Path) -> str:
    return decoder_id(AutoencoderKL.from_pretrained(folder))


def test_the_decoder_id_is_the_same_in_float32_and_float16(model_dir: Path, tmp_path: Path) -> None:
    AutoencoderKL.from_pretrained(model_dir).half().save_pretrained(tmp_path / "half")
    assert digest(tmp_path / "half") == digest(model_dir) == model_folder.read(model_dir).decoder_id


def test_the_decoder_id_changes_with_the_decoder_alone(model_dir: Path, tmp_path: Path) -> None:
    network = AutoencoderKL.from_pretrained(model_dir)
    with torch.no_grad():
        network.encoder.conv_in.weight.mul_(1.5)
        network.register_to_config(scaling_factor=3.0)
    network.save_pretrained(tmp_path / "encoder")
    assert digest(tmp_path / "encoder") == digest(model_dir)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(0.5)
    network.save_pretrained(tmp_path / "decoder")
    assert digest(tmp_path / "decoder") != digest(model_dir)


def test_damage_is_a_model_error_that_names_the_folder(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_dir, folder)
    info = json.loads((folder / "codec.json").read_text())
    cases: dict[str, Callable[[], object]] = {
        "no codec.json": (folder / "codec.json").unlink,
        "folder version 9": lambda: (folder / "codec.json").write_text(json.dumps(info | {"folder_version": 9})),
        "folder version 0, .*: export the model again": lambda: (folder / "codec.json").write_text(
            json.dumps(info | {"folder_version": 0})
        ),
        "stream id": lambda: (folder / "codec.json").write_text(json.dumps(info | {"stream_ids": ["0" * 16]})),
        "no entropy tables": lambda: (folder / "codec.json").write_text(json.dumps(info | {"stream_ids": []})),
        "KeyError": lambda: (folder / "codec.json").write_text(json.dumps({"folder_version": 1})),
        "damaged model folder": lambda: (folder / "codec.json").write_text("{"),
    }
    for message, damage in cases.items():
        damage()
        with pytest.raises(ModelError, match=message) as caught:
            model_folder.read(folder)
        assert str(folder) in str(caught.value)
    (folder / "codec.json").write_text(json.dumps(info))
    (folder / "codec.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="damaged model folder"):
        model_folder.read(folder)


def test_a_refit_adds_a_table_set_and_the_old_stream_stays_known(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_dir, folder)
    before = model_folder.read(folder)
    old = before.table_sets[before.stream_id]
    refitted = type(old)(old.static, old.context, old.points + np.int8(1))
    after = model_folder.add_tables(folder, refitted)
    assert list(after.table_sets) == [before.stream_id, refitted.digest(before.mean, before.step)]
    assert after.stream_id != before.stream_id
    assert after.info["decoder_id"] == before.info["decoder_id"]
    with pytest.raises(ValueError, match="already"):
        model_folder.add_tables(folder, refitted)
    of_one = tables.fit([np.zeros((1, 2, 2), np.float32)], np.zeros(1, np.float32), np.ones(1, np.float32))
    with pytest.raises(ModelError, match="4 channels, the tables have 1"):
        model_folder.add_tables(folder, of_one)


def test_models_are_found_by_name_in_the_folders_of_the_variable(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEC_MODELS", str(model_dir.parent))
    assert model_folder.resolve("tiny") == model_dir
    named = model_dir.parent / "first" / "model"  # as a run exports it: what is printed is the name in codec.json
    shutil.copytree(model_dir, named)
    info = json.loads((named / "codec.json").read_text())
    (named / "codec.json").write_text(json.dumps(info | {"name": "first"}))
    monkeypatch.setenv("CODEC_MODELS", os.pathsep.join([str(model_dir.parent), str(named)]))
    assert model_folder.resolve("first") == named
    assert model_dir in model_folder.available()
    with pytest.raises(ModelError, match="no model of that name"):
        model_folder.resolve("tinny")
