"""`codec-train import`: published autoencoders, in every form they come in, become model folders."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

import codec.cli
import eval.cli
from codec import fsq, images, model_folder
from codec.original_layout import to_original
from codec.runtime import Codec
from tests.codec.vq_models import vq_network
from tests.conftest import photo
from train.cli import main
from train.importing.files import _HARMLESS

WIDTHS = (32, 64)
WEIGHTS = "diffusion_pytorch_model.safetensors"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "pictures"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(images.save_png(photo(40 + 2 * n, 44, seed=n)))
    return folder


@pytest.fixture(scope="module")
def network() -> AutoencoderKL:
    """As SD's, in small; every tensor different from every other."""
    torch.manual_seed(0)
    made = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.5,
        sample_size=64,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.half().float()  # so that files in float16 hold the same values


@pytest.fixture
def original(network: AutoencoderKL) -> State:
    return original_of(network)


def original_of(network: Any) -> State:
    return to_original(network.state_dict(), {**network.config, "_class_name": type(network).__name__})


@pytest.fixture
def run(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, Path]]:
    """Import something, with images: exit code, all that was printed, the folder."""

    def command(
        source: Path, *arguments: str, out: str = "imported", with_images: bool = True
    ) -> tuple[int, str, Path]:
        shown = ["--images", str(pictures)] * with_images
        status = main(["import", str(source), "-o", str(tmp_path / out), *shown, "--device", "cpu", *arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, tmp_path / out

    return command


@pytest.fixture(autouse=True)
def _as_quiet_as_before() -> Iterator[None]:
    before = diffusers_logging.get_verbosity()
    yield
    assert diffusers_logging.get_verbosity() == before


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_weights(folder: Path, network: torch.nn.Module) -> None:
    found, expected = load_file(folder / WEIGHTS), network.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_a_folder_and_a_whole_checkpoint_become_the_same_model(
    network: AutoencoderKL,
    original: State,
    tmp_path: Path,
    pictures: Path,
    run: Callable[..., tuple[int, str, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    network.save_pretrained(tmp_path / "pipeline" / "vae")
    checkpoint = {
        "state_dict": {
            **{f"first_stage_model.{name}": tensor.half() for name, tensor in original.items()},
            "first_stage_model.loss.logvar": torch.zeros(()),
            "model.diffusion_model.out.2.weight": torch.zeros(3),
            "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(3),
        },
        "global_step": 7,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }
    torch.save(checkpoint, tmp_path / "sd.ckpt")

    status, said, folder = run(tmp_path / "pipeline", out="a")
    assert status == 0, said
    assert "scaling_factor 0.5, shift_factor 0: from config.json" in said
    config = tmp_path / "pipeline" / "vae" / "config.json"
    status, said, file = run(tmp_path / "sd.ckpt", "--config", str(config), "--name", "mine", out="b")
    assert status == 0, said
    assert "left out: 1 of first_stage_model.loss, 1 of model.diffusion_model, 1 of cond_stage_model" in said
    assert "scaling_factor 0.5, shift_factor 0: from --config" in said
    for imported in (folder, file):
        assert_weights(imported, network)
    ours, theirs = model_folder.read(folder), model_folder.read(file)
    assert (ours.decoder_id, ours.stream_id) == (theirs.decoder_id, theirs.stream_id)
    assert (ours.name, theirs.name) == ("a", "mine")
    assert settings(folder) == settings(file)
    assert (settings(file)["shift_factor"], settings(file)["sample_size"]) == (0.0, 64)
    card = (file / "README.md").read_text()
    assert "- sd.ckpt, the original (LDM) layout" in card
    assert theirs.info["imported"]["sha256"]["sd.ckpt"] in card
    assert "model.diffusion_model" in card
    assert not any(str(tmp_path) in path.read_text() for path in (file / "README.md", file / "codec.json"))
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left

    coded, decoded = tmp_path / "coded", tmp_path / "decoded"
    assert codec.cli.main(["encode", str(pictures), "-o", str(coded), "-m", str(folder), "--device", "cpu"]) == 0
    assert codec.cli.main(["decode", str(coded), "-o", str(decoded), "-m", str(file), "--device", "cpu"]) == 0
    assert len(list(decoded.glob("*.png"))) == 3
    both = ["-m", str(folder), "-m", str(file), "--baselines", "", "-q", "50", "--metrics", "psnr"]
    assert eval.cli.main(["rd", str(pictures), *both, "--report-images", "1", "-o", str(tmp_path / "rd")]) == 0
    capsys.readouterr()
    assert (tmp_path / "rd" / "rd.json").is_file()


def test_diffusers_own_importer_reads_the_same_weights_out_of_our_file(
    network: AutoencoderKL, original: State, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "folder")
    save_file(original, tmp_path / "vae.safetensors")
    theirs = AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert len(theirs.state_dict()) == len(original)


def as_bin(network: AutoencoderKL, folder: Path) -> Path:
    network.save_pretrained(folder, safe_serialization=False)
    return folder


def as_float16_variant(network: AutoencoderKL, folder: Path) -> Path:
    AutoencoderKL.from_config(network.config).half().save_pretrained(folder)  # makes config.json
    (folder / WEIGHTS).unlink()
    state = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.fp16.safetensors")
    return folder


def as_parts(network: AutoencoderKL, folder: Path) -> Path:
    network.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def as_old_names(network: AutoencoderKL, folder: Path) -> Path:
    network.save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f"0.{new}.", f"0.{old}."): tensor for name, tensor in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
    for name, tensor in state.items():  # as convolutions, in some
        state[name] = tensor[:, :, None, None] if ".attentions.0." in name and tensor.ndim == 2 else tensor
    save_file(state, folder / WEIGHTS)
    return folder


def as_bare_file_of_diffusers(network: AutoencoderKL, folder: Path) -> Path:
    folder.mkdir()
    save_file({f"vae.{name}": tensor for name, tensor in network.state_dict().items()}, folder / "one.safetensors")
    return folder / "one.safetensors"


def as_lightning(network: AutoencoderKL, folder: Path) -> Path:
    folder.mkdir()
    names = {f"module.model.{name}": tensor.bfloat16().float() for name, tensor in original_of(network).items()}
    flat = {f"module.model.model_ema.{name.replace('.', '')}": t for name, t in original_of(network).items()}
    torch.save({"state_dict": names | flat}, folder / "last.pt", _use_new_zipfile_serialization=False)
    return folder  # the one file in it


@pytest.mark.parametrize(
    "form",
    [as_bin, as_float16_variant, as_parts, as_old_names, as_bare_file_of_diffusers, as_lightning],
    ids=lambda form: form.__name__[3:],
)
def test_every_form_gives_the_same_weights(
    form: Callable[[AutoencoderKL, Path], Path],
    network: AutoencoderKL,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, Path]],
) -> None:
    status, said, folder = run(form(network, tmp_path / "source"), "--limit", "1")
    assert status == 0, said
    assert_weights(folder, network)
    assert f"averaged (EMA) weights: {len(network.state_dict())}" in said or form is not as_lightning
    assert model_folder.read(folder).info["tables"]["n_images"] == 1


def test_averaged_weights_or_the_last_ones(
    network: AutoencoderKL, original: State, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    last = {f"model.{name}": torch.full_like(tensor, 0.01) for name, tensor in original.items()}
    torch.save({**last, "ema": {f"model.{name}": tensor for name, tensor in original.items()}}, tmp_path / "x.pth")
    torch.save(last, tmp_path / "plain.pth")
    for flag in ([], ["--ema"]):
        status, _, folder = run(tmp_path / "x.pth", *flag, out=f"averaged{len(flag)}")
        assert status == 0
        assert_weights(folder, network)
    status, said, _ = run(tmp_path / "plain.pth", "--ema")
    assert (status, "no averaged (EMA) weights" in said) == (3, True)
    status, _, folder = run(tmp_path / "x.pth", "--no-ema", out="last")
    assert status == 0
    assert all(bool((tensor == torch.tensor(0.01)).all()) for tensor in load_file(folder / WEIGHTS).values())


def test_the_scaling_factor_is_kept_given_or_measured(
    original: State, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    save_file(original, tmp_path / "bare.safetensors")
    inside = {f"first_stage_model.{name}": tensor for name, tensor in original.items()}
    save_file({**inside, "scale_factor": torch.tensor(0.25)}, tmp_path / "ldm.safetensors")
    given = {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 4}
    (tmp_path / "config.json").write_text(json.dumps(given))

    _, said, folder = run(tmp_path / "bare.safetensors", out="measured")
    statistics = model_folder.read(folder).info["statistics"]
    assert settings(folder)["scaling_factor"] == pytest.approx(1 / statistics["global_std"])
    assert settings(folder)["shift_factor"] == 0  # pipelines of networks with quant convolutions ignore it
    assert settings(folder)["sample_size"] == 512
    assert "measured, nothing stated it" in said
    assert "import again with its config" in (folder / "README.md").read_text()
    for name, arguments, factors in (
        ("ldm", [], (0.25, 0.0)),
        ("ldm", ["--config", str(tmp_path / "config.json")], (0.3611, 0.1159)),
    ):
        _, said, folder = run(tmp_path / f"{name}.safetensors", *arguments, out=f"{name}{len(arguments)}")
        assert (settings(folder)["scaling_factor"], settings(folder)["shift_factor"]) == factors
        info = model_folder.read(folder).info
        assert (info["scaling_factor"], info["shift_factor"]) == factors
        assert ("from --config" if arguments else "from the checkpoint") in said


def test_a_config_of_another_network_is_refused(
    original: State, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    save_file(original, tmp_path / "bare.safetensors")
    for changes, message in (
        ({"latent_channels": 16}, "--config says latent_channels 16, the weights say 4"),
        ({"block_out_channels": [32, 32]}, "--config says block_out_channels [32, 32], the weights say [32, 64]"),
        ({"_class_name": "VQModel"}, "--config says _class_name VQModel"),
        ({"_class_name": "UNet2DModel"}, "a model of class UNet2DModel; expected"),
        ({"norm_num_groups": 24}, "norms of 24 groups do not go together"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | changes))
        status, said, folder = run(tmp_path / "bare.safetensors", "--config", str(tmp_path / "config.json"))
        assert (status, message in said) == (3, True), said
        assert not folder.exists()


def test_a_vqgan_becomes_a_folder_of_diffusers(tmp_path: Path, run: Callable[..., tuple[int, str, Path]]) -> None:
    torch.manual_seed(0)
    vq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=8,
        vq_embed_dim=5,
        num_vq_embeddings=12,
    )
    taming = {**original_of(vq), "loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"state_dict": taming}, tmp_path / "last.ckpt")
    status, said, folder = run(tmp_path / "last.ckpt", with_images=False)
    assert status == 0, said
    assert "give --images to encode with it" in said
    assert not model_folder.is_model_folder(folder)
    loaded = VQModel.from_pretrained(folder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in vq.state_dict().items())
    assert tuple(loaded.config.up_block_types) == vq.config.up_block_types
    assert "1 of loss" in (folder / "README.md").read_text()


def test_a_vq_model_with_images_encodes_at_once(tmp_path: Path, run: Callable[..., tuple[int, str, Path]]) -> None:
    network = vq_network(k=24)
    network.register_to_config(fsq_levels=[3, 2, 2, 2])
    with torch.no_grad():
        network.quantize.embedding.weight.copy_(fsq.codebook([3, 2, 2, 2]))
    network.save_pretrained(tmp_path / "vq")
    status, text, folder = run(tmp_path / "vq")
    assert status == 0, text
    assert " 24 codes (used " in text
    info = model_folder.read(folder).info
    assert settings(folder)["fsq_levels"] == [3, 2, 2, 2]  # unknown to diffusers, but they decide what latents become
    assert (info["codebook_size"], info["codebook"]["size"]) == (24, 24)
    card = (folder / "README.md").read_text()
    assert f"codebook of 24: {info['codebook']['n_used']} used" in card
    assert "-m THIS_FOLDER -q" not in card
    codec = Codec.load(folder, "cpu", dtype="float32")
    picture = photo(40, 30)
    np.testing.assert_array_equal(codec.decode(codec.encode(picture)), codec.reconstruct(picture))


def test_a_folder_of_another_class_is_taken_as_it_is(tmp_path: Path, run: Callable[..., tuple[int, str, Path]]) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    status, said, folder = run(tmp_path / "tiny")
    assert status == 0, said
    assert_weights(folder, tiny)
    assert Codec.load(folder, "cpu").description()["family"] == "tiny"


def test_the_two_files_of_taesd_become_an_autoencoder_tiny(
    tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=5,
    )
    (tmp_path / "taesd").mkdir()
    state = tiny.state_dict()
    encoder = {name.removeprefix("encoder.layers."): t for name, t in state.items() if name.startswith("encoder.")}
    decoder = {}  # there a clamp is the first layer
    for name, tensor in state.items():
        if name.startswith("decoder."):
            layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
            decoder[f"{int(layer) + 1}.{rest}"] = tensor
    torch.save(encoder, tmp_path / "taesd" / "taesd_encoder.pth")
    torch.save(decoder, tmp_path / "taesd" / "taesd_decoder.pth")
    status, said, folder = run(tmp_path / "taesd")
    assert status == 0, said
    assert_weights(folder, tiny)
    written = settings(folder)
    assert (written["num_encoder_blocks"], written["num_decoder_blocks"]) == ([1, 2, 3], [3, 2, 1])
    assert (written["latent_channels"], written["scaling_factor"], written["shift_factor"]) == (5, 1.0, 0.0)
    assert len(model_folder.read(folder).info["imported"]["sha256"]) == 2
    status, said, _ = run(tmp_path / "taesd" / "taesd_encoder.pth", out="half")
    assert (status, "one half of TAESD" in said) == (3, True)


class Evil:
    """A pickle that runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Callback:
    """Stands for what Lightning leaves in its checkpoints."""

    def __init__(self) -> None:
        self.best = 0.5


def test_a_pickle_with_code_is_refused_and_not_run(
    original: State, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    for new in (True, False):
        holds = {"state_dict": original, "extra": Evil(f"touch {tmp_path / 'ran'}")}
        torch.save(holds, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=new)
        status, said, folder = run(tmp_path / "evil.ckpt")
        assert status == 3
        assert "refused: the pickle asks for posix.system, which is code, not weights" in said
        assert "safetensors.torch.save_file" in said
        assert said.count("\n") == 1
        assert not folder.exists()
    torch.save({"state_dict": original, "callback": Callback()}, tmp_path / "own.ckpt")
    status, said, _ = run(tmp_path / "own.ckpt")
    assert (status, "Callback, which is code" in said) == (3, True)
    assert not (tmp_path / "ran").exists()


def test_what_lightning_leaves_behind_is_not_run_either(
    network: AutoencoderKL,
    original: State,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = type(sys)("pytorch_lightning.callbacks")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", type(sys)("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", module)
    monkeypatch.setattr(Callback, "__module__", module.__name__)
    module.Callback = Callback
    holds = {
        "state_dict": original,
        "callbacks": {Callback: {"best": Callback()}},
        "score": original["quant_conv.bias"].numpy().mean(),
        "lr": original["quant_conv.bias"].numpy(),
        "where": Path("x"),
    }
    torch.save(holds, tmp_path / "lightning.ckpt")
    monkeypatch.setattr(Callback, "__setstate__", lambda *_: pytest.fail("code of the file ran"), raising=False)
    status, said, folder = run(tmp_path / "lightning.ckpt")
    assert status == 0, said
    assert_weights(folder, network)


@pytest.mark.parametrize("name", ["os.system", "posix.system", "builtins.eval", "builtins.getattr", "numpy.load"])
def test_code_is_not_among_what_is_harmless(name: str) -> None:
    assert not _HARMLESS.fullmatch(name)


def test_damaged_files_are_said_to_be(
    original: State, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    save_file(original, tmp_path / "whole.safetensors")
    torch.save(original, tmp_path / "whole.ckpt")
    for name in ("whole.safetensors", "whole.ckpt"):
        data = (tmp_path / name).read_bytes()
        for share in (0.5, 0.001):
            (tmp_path / f"cut-{name}").write_bytes(data[: int(share * len(data))])
            status, said, folder = run(tmp_path / f"cut-{name}")
            assert (status, "damaged" in said) == (3, True), said
            assert said.count("\n") == 1
            assert not folder.exists()
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    assert "git lfs pull" in run(tmp_path / "lfs.safetensors")[1]
    assert "neither safetensors nor a checkpoint of torch" in run(tmp_path / "page.ckpt")[1]


def test_weights_that_do_not_fit_are_named(
    original: State, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    cases: dict[str, tuple[State, str]] = {
        "missing": (
            {name: tensor for name, tensor in original.items() if ".mid.block_2." not in name},
            "missing decoder.mid_block.resnets.1.conv1.bias, decoder.mid_block.resnets.1.conv1.weight,",
        ),
        "extra": (original | {"encoder.style.weight": torch.zeros(3)}, "not of this network encoder.style.weight"),
        "shape": (
            original | {"encoder.norm_out.bias": torch.zeros(3)},
            "encoder.conv_norm_out.bias is (3,), expected (64,)",
        ),
        "nan": (original | {"encoder.norm_out.bias": torch.full((64,), torch.nan)}, "not finite"),
        "whole numbers": (
            original | {"encoder.norm_out.bias": torch.zeros(64, dtype=torch.int8)},
            "not floating point: quantised weights",
        ),
    }
    for name, (state, message) in cases.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        status, said, folder = run(tmp_path / f"{name}.safetensors")
        assert (status, message in said) == (3, True), said
        assert not folder.exists()
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_autoencoder_is_called_by_its_name(
    tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    save_file({"lora_unet_mid.lora_up.weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    status, said, _ = run(tmp_path / "lora.safetensors")
    assert (status, "it looks like a LoRA" in said) == (3, True)
    (tmp_path / "unet").mkdir()
    for name in ("UNet2DModel", "TwoLevelVQModel"):  # the second: this project's own, complete as it is exported
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": name}))
        status, said, _ = run(tmp_path / "unet")
        assert (status, f"a model of class {name}; expected" in said) == (3, True)


def test_what_is_wrong_with_the_request_is_said_first(
    network: AutoencoderKL,
    tmp_path: Path,
    model_dir: Path,
    run: Callable[..., tuple[int, str, Path]],
) -> None:
    network.save_pretrained(tmp_path / "vae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for (status, said, _), reason in (
        (run(tmp_path / "vae", out="full"), "full: not empty; name another folder"),
        (run(tmp_path / "vae", with_images=False), "give a folder of some with --images"),
        (run(tmp_path / "vae", "--images", str(tmp_path / "empty"), with_images=False), "no images found"),
        (run(tmp_path / "nowhere"), "nowhere: no such file or folder"),
        (run(tmp_path / "empty"), "not one single file of weights in it"),
        (run(model_dir), "a model folder of the codec already"),
        (run(tmp_path / "vae", "--config", str(tmp_path / "nowhere.json")), "nowhere.json: cannot be read"),
    ):
        assert (status, reason in said) == (2, True), said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["photo.png"]


def test_an_image_that_cannot_be_read_is_listed(
    network: AutoencoderKL, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    network.save_pretrained(tmp_path / "vae")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "good.png").write_bytes(images.save_png(photo(32, 32)))
    (tmp_path / "mixed" / "bad.png").write_bytes(b"no image")
    status, said, folder = run(tmp_path / "vae", "--images", str(tmp_path / "mixed"), with_images=False)
    assert (status, "bad.png: " in said, "left out of the statistics" in said) == (1, True, True)
    assert model_folder.read(folder).info["tables"]["n_images"] == 1
    (tmp_path / "mixed" / "good.png").unlink()
    status, said, folder = run(tmp_path / "vae", "--images", str(tmp_path / "mixed"), out="x", with_images=False)
    assert (status, "none of 1 images can be read" in said) == (2, True)
    assert not folder.exists()
    assert not list(tmp_path.glob(".*"))  # nor a half-written one


def test_shards_serve_as_images(
    network: AutoencoderKL, shards: Path, tmp_path: Path, run: Callable[..., tuple[int, str, Path]]
) -> None:
    network.save_pretrained(tmp_path / "vae")
    status, said, folder = run(tmp_path / "vae", "--images", str(shards), "--limit", "2", with_images=False)
    assert status == 0, said
    assert model_folder.read(folder).info["tables"]["n_images"] == 2


def test_the_command_line_is_read_without_torch() -> None:
    script = (
        "import sys\nimport train.importing.cli\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
        "from train.cli import main\n"
        "assert main(['import', '--help']) == 0\n"
        "assert main(['import', 'nowhere']) == 2\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "scaling_factor" in done.stdout
