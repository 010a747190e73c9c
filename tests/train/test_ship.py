"""`codec-train ship`: from a run's model folder to the one that comes with the package."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import load_file

from codec import Codec, model_folder
from codec.engine import EngineConfig
from codec.latent_model import load_network
from eval.autoencoder import load_all
from eval.cli import main as evaluate
from tests.conftest import photo, said
from train import ship as shipping
from train.cli import main
from train.config import ModelConfig
from train.networks import build_network, load_reference

LICENCE = "Research only.\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place of the package's models, with their licence."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "LICENSE").write_text(LICENCE)
    monkeypatch.setattr(model_folder, "PACKAGE_MODELS", folder)
    return folder


def test_the_folder_holds_float16_weights_once_and_decodes_what_its_source_made(
    model_dir: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ship", str(model_dir), "--licence", "research use only"]
    assert main([*command, "-o", str(place / "kl-f8")]) == 0
    found = json.loads(capsys.readouterr().out)
    folder = place / "kl-f8"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "README.md",
        "codec.json",
        "codec.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert (folder / "LICENSE").read_text() == LICENCE
    card = (folder / "README.md").read_text()
    assert card.startswith("# kl-f8\n")
    assert "- Weights: research use only." in card
    assert "fp16" not in card
    source, shipped = (Codec.load(name, dtype="float32") for name in (model_dir, "kl-f8"))
    assert (shipped.name, shipped.stream_id) == ("kl-f8", source.stream_id)
    assert shipped.decoder_id == source.decoder_id == found["decoder_id"]
    image = photo(48, 64)
    difference = shipped.decode(source.encode(image)).astype(int) - source.decode(source.encode(image))
    assert abs(difference).max() <= 2
    assert main([*command, "-o", str(place / "twice" / "kl-f8"), "--licence-file", str(place / "LICENSE")]) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (place / "twice" / "kl-f8" / path.name).read_bytes()
    capsys.readouterr()
    evaluate(["lint", "kl-f8"])
    told = said(capsys)
    assert "weights-half" not in told  # it is what was meant
    assert "decoder-id" not in told
    assert "card" not in told


def test_what_cannot_be_shipped_is_refused_and_leaves_nothing(
    model_dir: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ship", str(model_dir), "-o", str(place / "kl-f8")]
    assert main(command) == 2
    assert "states no licence of the weights" in said(capsys)
    command += ["--licence", "research"]
    assert main([*command, "--licence-file", str(tmp_path / "no")]) == 2
    assert "no: no such file" in said(capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shipping, "LARGEST_BYTES", 10_000)
        assert main(command) == 3
    assert "0.0 MiB in float16, at most " in said(capsys)
    assert [path.name for path in place.iterdir()] == ["LICENSE"]
    network = AutoencoderKL.from_pretrained(model_dir)
    changed = tmp_path / "changed"
    for name in ("codec.json", "codec.safetensors"):
        changed.mkdir(exist_ok=True)
        (changed / name).write_bytes((model_dir / name).read_bytes())
    with torch.no_grad():
        network.encoder.conv_in.bias[0] = 1e6
    network.save_pretrained(changed)
    command[1] = str(changed)
    assert main(command) == 3
    assert "weights that float16 cannot hold: encoder.conv_in.bias" in said(capsys)
    with torch.no_grad():
        network.decoder.conv_in.bias[0] += 1
    network.save_pretrained(changed)
    assert main(command) == 3
    assert "export it again" in said(capsys)
    (place / "kl-f8").mkdir()
    (place / "kl-f8" / "x").write_text("")
    assert main(["ship", str(model_dir), "-o", str(place / "kl-f8"), "--licence", "x"]) == 2
    assert "exists and is not empty" in said(capsys)


def test_every_command_takes_a_shipped_model_by_its_name(
    model_dir: Path, photo_folder: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "kl-f8"
    assert main(["ship", str(model_dir), "-o", str(folder), "--licence", "research"]) == 0
    config = EngineConfig(device="cpu", dtype="float32")
    (model,) = load_all([Path("kl-f8")], config)  # recon, generated and race
    assert (model.name, model.folder) == ("kl-f8", folder)
    assert main(["drift", "kl-f8", str(model_dir), "--images", str(photo_folder), "--limit", "1"]) == 0
    out = ["--data", str(photo_folder / "a.png"), "-o", str(tmp_path / "latents"), "--size=48", "--no-plots"]
    assert evaluate(["latents", "kl-f8", *out]) == 0
    assert json.loads((tmp_path / "latents" / "latents.json").read_text())["model"]["name"] == "kl-f8"
    capsys.readouterr()
    assert main(["export", "kl-f8", "--preview", str(photo_folder)]) == 2
    assert "a model that is installed stays as it is; name another folder with -o" in said(capsys)
    assert main(["export", "kl-f8", "-o", str(tmp_path / "copy")]) == 0
    assert {p.dtype for p in load_network(tmp_path / "copy").parameters()} == {torch.float32}
    started = build_network(ModelConfig(init_from="kl-f8"))
    for name, tensor in load_network(folder).state_dict().items():
        assert torch.equal(tensor, started.state_dict()[name])
    assert load_reference("kl-f8", "latents.anchor") is not None


@pytest.mark.slow
def test_the_model_of_a_run_is_shipped_with_its_card_and_is_clean(
    run_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ship", str(run_folder / "model"), "-o", str(place / "kl-f8"), "--licence", "research use only"]) == 0
    card = (place / "kl-f8" / "README.md").read_text()
    assert "license: other" in card
    assert "codec encode photos -o coded -m kl-f8 -q 50" in card
    assert "## Training" in card
    assert not (place / "kl-f8" / "discriminator").exists()
    capsys.readouterr()
    evaluate(["lint", "--json", str(run_folder / "model"), "kl-f8"])  # a tiny model is not a good one
    before, now = json.loads(capsys.readouterr().out)["models"]
    assert [each["code"] for each in now["findings"]] == [each["code"] for each in before["findings"]]
