"""Models that come with the package: found by name, the default of encode, read from float16; here tiny stand-ins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from codec import Codec, model_folder
from codec.cli import main
from codec.errors import ModelError, UsageError
from codec.latent_model import load_network
from tests.conftest import make_model, photo, said

REAL = Path(model_folder.__file__).parent / "models"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A default model in float16, and another; do not change them."""
    place = tmp_path_factory.mktemp("made")
    make_model(place / "kl-f8")
    AutoencoderKL.from_pretrained(place / "kl-f8").half().save_pretrained(place / "kl-f8")
    make_model(place / "vq-f8", seed=3)
    (place / "LICENSE").write_text("research\n")
    return place


@pytest.fixture
def shipped(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the package's models, with copies of those in it."""
    place = tmp_path / "package"
    shutil.copytree(made, place)
    monkeypatch.setattr(model_folder, "PACKAGE_MODELS", place)
    return place


def test_a_folder_is_encoded_and_decoded_without_naming_a_model(
    shipped: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", str(photo_folder), "-o", str(tmp_path / "coded"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    folder = model_folder.read(shipped / "kl-f8")
    assert (summary["model"], summary["decoder_id"]) == ("kl-f8", folder.decoder_id)
    assert main(["verify", str(tmp_path / "coded")]) == 0
    assert main(["decode", str(tmp_path / "coded"), "-o", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_the_folder_is_one_of_diffusers_and_float16_weights_compute_in_float32(shipped: Path) -> None:
    codec = Codec.load()
    assert codec.folder == Codec.load("kl-f8").folder == shipped / "kl-f8"
    vae = AutoencoderKL.from_pretrained(codec.folder)
    for network in (vae, load_network(codec.folder)):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert {p.dtype for p in AutoencoderKL.from_pretrained(codec.folder, torch_dtype=torch.float16).parameters()} == {
        torch.float16
    }
    image = photo(32, 32)
    np.testing.assert_array_equal(codec.decode(codec.encode(image)), Codec.load("kl-f8").decode(codec.encode(image)))


def test_the_variable_goes_first_and_does_not_change_the_default(
    shipped: Path, new_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = new_model("own/first", seed=7)
    monkeypatch.setenv("CODEC_MODELS", str(own.parent))
    (tmp_path / "here" / "kl-f8").mkdir(parents=True)  # a folder that happens to be called so
    monkeypatch.chdir(tmp_path / "here")
    assert model_folder.resolve("first") == own
    assert model_folder.resolve(None) == shipped / "kl-f8"
    assert model_folder.resolve("kl-f8") == Path("kl-f8")  # who names a folder gets it
    hers = new_model("own/kl-f8", seed=8)
    assert model_folder.resolve(None) == hers


def test_models_are_listed_for_a_reader_and_a_damaged_one_is_one_line(
    shipped: Path,
    new_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = json.loads((shipped / "kl-f8" / "codec.json").read_text())
    (shipped / "kl-f8" / "codec.json").write_text(json.dumps(info | {"licence": "research use only"}))
    assert main(["models"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("  ") == [
        "kl-f8",
        "f2 c4",
        "0.1 MiB",
        "licence: research use only",
        str(shipped / "kl-f8"),
        "(default)",
    ]
    assert second.split() == ["vq-f8", "f2", "c4", "0.2", "MiB", "licence:", "not", "stated", str(shipped / "vq-f8")]
    monkeypatch.setenv("CODEC_MODELS", str(new_model("mine/vq-f8", seed=9)))
    weights = shipped / "kl-f8" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(["models", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {weights}: damaged weights, ")
    assert captured.err.count("\n") == 1
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [(row["name"], row["hidden"], row["default"]) for row in rows] == [
        ("vq-f8", False, False),
        ("vq-f8", True, False),
    ]
    weights.unlink()
    assert main(["models"]) == 1
    assert f"error: {shipped / 'kl-f8'}: no weights" in said(capsys)


def test_mistakes_say_what_there_is_and_what_to_do(
    shipped: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, coded = str(photo_folder / "a.png"), tmp_path / "coded"
    assert main(["encode", image, "-o", str(coded), "-m", "kl-f9"]) == 3
    assert said(capsys) == "error: kl-f9: no such folder, and no model of that name; there are: kl-f8, vq-f8\n"
    assert main(["encode", image, "-o", str(coded)]) == 0
    weights = shipped / "kl-f8" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    capsys.readouterr()
    assert main(["encode", image, "-o", str(coded), "--overwrite"]) == 3
    assert said(capsys).startswith(f"error: {shipped / 'kl-f8'}: cannot load the weights")
    assert main(["decode", str(coded), "-o", str(tmp_path / "out")]) == 3
    assert said(capsys).count("error: ") == 1
    shutil.rmtree(shipped / "kl-f8")  # as if a later version came with other models
    assert main(["decode", str(coded), "-o", str(tmp_path / "out")]) == 3
    told = said(capsys)
    assert "made with another model: it needs stream" in told
    assert "name the folder of the model that made it with -m, or put it under $CODEC_MODELS" in told
    assert main(["encode", image, "-o", str(coded), "--overwrite"]) == 2
    assert "which model? Give -m MODEL: the default, kl-f8, is not there; there are: vq-f8" in said(capsys)
    shutil.rmtree(shipped / "vq-f8")
    with pytest.raises(ModelError, match=f"; there are no models in {shipped}"):
        model_folder.resolve("x")
    with pytest.raises(UsageError, match="which model"):
        Codec.load()


@pytest.mark.parametrize("folder", sorted(path for path in REAL.glob("*") if path.is_dir()), ids=lambda path: path.name)
def test_what_really_comes_with_the_package_is_whole(folder: Path) -> None:
    codec = Codec.load(folder)
    assert codec.name == folder.name
    assert codec.decoder_id == model_folder.read(folder).decoder_id
    assert model_folder.read(folder).info["licence"]
    assert {"LICENSE", "README.md"} <= {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    image = photo(64, 64)
    difference = codec.decode(codec.encode(image)).astype(int) - image
    assert 20 * np.log10(255 / np.sqrt(np.square(difference).mean())) > 20  # dB
