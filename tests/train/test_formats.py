"""Formats of other programs: each file is loaded by the program it is for, and has to give what the trainer gave."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from safetensors import safe_open
from safetensors.torch import load_file

from codec import images, model_folder, preview
from codec.cli import main as codec_main
from codec.errors import ModelError
from codec.latent_model import latent_model
from codec.original_layout import comfy_detects, original_limits, to_original
from codec.shards import read_index, read_sample
from eval.cli import main as eval_main
from tests.conftest import photo
from train import formats
from train.card_sections import with_section
from train.cli import main
from train.half_precision import measure_half

FP16 = "diffusion_pytorch_model.fp16.safetensors"


def small_kl(seed: int = 0, **how: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "scaling_factor": 0.7,
            "shift_factor": 0.1,
            "force_upcast": False,
            **how,
        }
    ).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published diffusers folder, with attention in the middle and both quant convolutions."""
    small_kl().save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def exported(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["export", *map(str, arguments), "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="session")
def export_of_a_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All but ONNX of the tiny run, in a place of its own; do not change it."""
    out = tmp_path_factory.mktemp("exports") / "first"
    assert main(["export", str(run_folder), "-o", str(out), "--fp16", "--licence", "Apache-2.0"]) == 0
    return out


def test_folder_single_file_and_trainer_agree_in_a_fresh_process(export_of_a_run: Path) -> None:
    (single,) = export_of_a_run.glob("*_ldm.safetensors")
    script = (
        "import sys, torch; from diffusers import AutoencoderKL; from safetensors.torch import load_file\n"
        "folder, single, fixture = sys.argv[1:]; f = load_file(fixture)\n"
        "for vae in (AutoencoderKL.from_pretrained(folder), AutoencoderKL.from_single_file(single, config=folder),\n"
        "            AutoencoderKL.from_pretrained(folder, variant='fp16', torch_dtype=torch.float32)):\n"
        "    with torch.no_grad():\n"
        "        z = vae.eval().encode(f['x']).latent_dist.mode(); x_hat = vae.decode(f['z']).sample\n"
        "    print(float((z - f['z']).abs().max()), float((x_hat - f['x_hat']).abs().max()))\n"
    )
    command = [sys.executable, "-c", script, export_of_a_run, single, export_of_a_run / "fixture.safetensors"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    folder, single_file, variant = ([float(value) for value in line.split()] for line in done.stdout.splitlines())
    assert max(folder) <= 1e-5
    assert max(single_file) <= 1e-5
    assert 1e-6 < max(variant) < 0.1  # the same network, rounded to float16
    assert load_file(export_of_a_run / "fixture.safetensors")["x_hat"].std() > 1e-3


def test_an_export_elsewhere_is_the_runs_own_model(export_of_a_run: Path, run_folder: Path) -> None:
    ours, theirs = (model_folder.read(path) for path in (export_of_a_run, run_folder / "model"))
    assert (ours.stream_id, ours.decoder_id) == (theirs.stream_id, theirs.decoder_id)
    assert (run_folder / "model" / f"{run_folder.name}_ldm.safetensors").exists()  # a run's end writes one too
    assert not (run_folder / "model" / FP16).exists()
    assert not list(export_of_a_run.glob(".*"))
    assert len({path.stat().st_mode for path in export_of_a_run.iterdir()}) == 1
    narrow = export_of_a_run / f"{run_folder.name}_ldm.fp16.safetensors"
    assert {tensor.dtype for tensor in load_file(narrow).values()} == {torch.float16}
    with safe_open(str(narrow), "pt") as file:
        stated = file.metadata()
    assert stated["decoder_id"] == ours.decoder_id
    assert float(stated["scaling_factor"]) == ours.info["scaling_factor"]


def test_the_card_says_where_it_loads_and_states_a_licence(
    export_of_a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (export_of_a_run / "README.md").read_text()
    table = card.split("## Where it loads")[1].split("##")[0]
    rows = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in table.splitlines() if row.startswith("| ")}
    assert rows == {
        "where": "loads", "diffusers": "yes", "diffusers, single file": "yes", "ComfyUI": "no",
        "AUTOMATIC1111, Forge": "no", "in float16": "yes", "float16 files": "yes", "ONNX": "no",
        "other diffusion models": "no", "latent-codec": "yes",
    }  # fmt: skip
    assert "widths 128, 256, 512, 512" in table  # why ComfyUI does not
    assert card.index("## Where it loads") < card.index("## Training")
    digest = re.search(rf"\| {FP16} \| (\d+) \| ([0-9a-f]{{64}}) \|", card)
    assert digest is not None
    assert int(digest[1]) == (export_of_a_run / FP16).stat().st_size
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: apache-2.0\n---\n")
    assert "- Weights: Apache-2.0." in card
    capsys.readouterr()
    eval_main(["lint", str(export_of_a_run)])
    said = capsys.readouterr().out
    for code in ("card-licence", "card-missing", "decoder-id", "codec-fields", "fp16", "upcast"):
        assert code not in said
    bare = shutil.copytree(export_of_a_run, tmp_path / "bare")
    (bare / "README.md").write_text("# nothing\n")
    eval_main(["lint", str(bare)])
    assert "card-licence" in capsys.readouterr().out  # so the silence above means something


def test_the_preview_of_a_run_looks_like_the_image(export_of_a_run: Path, shards: Path) -> None:
    found = preview.read(export_of_a_run)
    assert found is not None
    assert found.r2.max() > 0.5
    vae = AutoencoderKL.from_pretrained(export_of_a_run).eval()
    seen, wanted = [], []
    for sample in read_index(shards):
        image = images.load(read_sample(sample))[:64, :64]
        x = torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()[0]
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        small = found.apply(z.numpy())
        seen.append(small.reshape(-1, 3).astype(float))
        wanted.append(image.reshape(32, 2, 32, 2, 3).mean((1, 3)).reshape(-1, 3))
    x_hat, average = np.concatenate(seen), np.concatenate(wanted)
    explained = 1 - ((x_hat - average) ** 2).mean(0) / average.var(0)
    np.testing.assert_allclose(explained, found.r2, atol=0.15)  # on crops, held-out images too, clamped
    snippet = (export_of_a_run / "README.md").read_text().split("## Preview")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"json": json, "torch": torch, "z": z, "open": lambda name: (export_of_a_run / name).open()}
    exec(snippet, names)
    assert np.abs(names["image"].astype(int) - small.astype(int)).max() <= 1


def test_formats_are_added_to_anybodys_folder_in_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = exported(capsys, folder)
    assert found["files"] == ["published_ldm.safetensors"]
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    again = AutoencoderKL.from_single_file(str(folder / "published_ldm.safetensors"), config=str(folder))
    wanted = AutoencoderKL.from_pretrained(folder).state_dict()
    assert set(wanted) == set(again.state_dict())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    names = load_file(folder / "published_ldm.safetensors").keys()
    assert {"encoder.down.0.block.0.conv1.weight", "decoder.mid.attn_1.q.weight", "quant_conv.weight"} <= set(names)

    found = exported(capsys, folder, "--fp16", "--no-single-file")
    assert found["files"] == [FP16]
    assert found["float16"]["verdict"] == "safe"
    card = (folder / "README.md").read_text()
    assert "| diffusers, single file | yes |" in card  # what an earlier export found is still said
    assert '`variant="fp16"`' in card
    assert card.count("## Where it loads") == card.count("## Files") == 1
    assert "license" not in card.lower()  # it is not ours to say


def test_a_folder_is_copied_with_all_that_belongs_to_it(
    new_model: Callable[..., Path], tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = new_model("ours"), tmp_path / "out"
    found = exported(capsys, source, "-o", out, "--fp16", "--preview", photo_folder)
    assert sorted(found["files"]) == [FP16, "ours_ldm.fp16.safetensors", "ours_ldm.safetensors"]
    assert found["float16"]["n_images"] == 3
    assert "preview" not in model_folder.read(source).info
    assert preview.read(out) is not None
    assert model_folder.read(out).stream_id == model_folder.read(source).stream_id
    assert codec_main(["encode", str(photo_folder / "a.png"), "-o", str(tmp_path / "a.lcx"), "-m", str(out)]) == 0
    assert main(["export", str(source), "-o", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err

    (photo_folder / "broken.png").write_bytes(b"no image")
    assert main(["export", str(source), "--preview", str(photo_folder), "--device", "cpu"]) == 1
    streams = capsys.readouterr()
    assert "broken.png" in streams.err
    assert len(json.loads(streams.out)["preview_r2"]) == 3


def overflowing(network: AutoencoderKL) -> AutoencoderKL:
    """Scale two weights against each other: float32 gives what it gave, float16 cannot hold what lies in between."""
    block = network.decoder.mid_block.resnets[0]
    with torch.no_grad():
        block.conv1.weight.mul_(1e6)  # norm2 takes the scale out again
        block.conv1.bias.mul_(1e6)
    return network


def test_an_overflow_of_float16_is_found_refused_and_decides_force_upcast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "loud"
    network = overflowing(small_kl())
    network.save_pretrained(folder)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.isfinite(network.decode(z).sample).all()
        assert not torch.isfinite(network.half().decode(z.half()).sample).all()  # torch's own float16
    before = sorted(path.name for path in folder.iterdir())
    assert main(["export", str(folder), "--fp16", "--device", "cpu"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: float16 overflows: no float16 files (largest activation ")
    assert "at decoder.mid_block.resnets.0.conv1); use bfloat16, or --force" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing is left, the single file neither

    assert main(["export", str(folder), "-o", str(tmp_path / "new"), "--fp16", "--device", "cpu"]) == 3
    assert not (tmp_path / "new").exists()

    found = exported(capsys, folder, "--fp16", "--force")
    assert FP16 in found["files"]
    assert found["float16"]["verdict"] == "overflows"
    assert json.loads((folder / "config.json").read_text())["force_upcast"] is True
    card = (folder / "README.md").read_text()
    assert "| in float16 | no | overflows: largest activation" in card
    assert "OVERFLOWS where it is computed in float16" in card


def test_emulated_float16_is_what_torch_computes_in_float16() -> None:
    network = small_kl(block_out_channels=(8, 8), layers_per_block=1)
    half = measure_half(network, [photo(16, 24)])
    assert (half.finite, half.verdict, half.how, half.n_images) == (True, "safe", "emulated", 1)
    x = torch.from_numpy(photo(16, 24) / 127.5 - 1).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        wide = network.decode(network.encode(x).latent_dist.mode()).sample
        network.half()
        small = network.decode(network.encode(x.half()).latent_dist.mode()).sample.float()
    real = 10 * np.log10(4 / float((wide.clamp(-1, 1) - small.clamp(-1, 1)).square().mean()))
    assert half.psnr_db == pytest.approx(real, abs=3)
    assert half.psnr_db is not None
    assert half.worst_psnr_db is not None
    assert half.worst_psnr_db <= half.psnr_db
    assert all(parameter.dtype == torch.float16 for parameter in network.parameters())  # left as it was found


def test_weights_that_float16_cannot_hold_are_an_overflow() -> None:
    network = small_kl()
    with torch.no_grad():
        network.decoder.conv_out.bias[0] = 1e5
    assert measure_half(network).verdict == "overflows"


def test_near_its_end_float16_is_a_risk() -> None:
    network = small_kl()
    with torch.no_grad():
        network.decoder.mid_block.resnets[0].conv1.weight.mul_(2e4)
    half = measure_half(network, [photo(32, 32)])
    assert half.finite
    assert 65504 / 4 < half.largest_on_images < 65504
    assert (half.verdict, half.force_upcast) == ("at risk", True)
    assert half.largest_at == "decoder.mid_block.resnets.0.conv1"


def test_a_file_that_gives_something_else_fails_the_export_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folder.iterdir())

    def wrong(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = to_original(state, config)
        name = "decoder.conv_out.bias"
        return {**found, name: found[name] + 1e-3}

    monkeypatch.setattr(formats, "to_original", wrong)
    assert main(["export", str(folder)]) == 3
    assert "published_ldm.safetensors: loaded again, its image differ by 0.001" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before

    monkeypatch.setattr(
        formats, "to_original", lambda state, config: dict(list(to_original(state, config).items())[1:])
    )
    assert main(["export", str(folder)]) == 3
    assert "diffusers cannot load it again" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_the_layout_cannot_hold_is_left_out_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attends = small_kl(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    codebook = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16)
    reasons = {
        "attends": (attends, "from_single_file does not map attention inside levels"),
        "tiny": (tiny, "a AutoencoderTiny; the original layout"),
        "codebook": (codebook, "a VQModel; the original layout"),
    }
    for name, (network, reason) in reasons.items():
        network.save_pretrained(tmp_path / name)
        assert exported(capsys, tmp_path / name)["files"] == []
        assert reason in (tmp_path / name / "README.md").read_text()
        assert main(["export", str(tmp_path / name), "--single-file"]) == 3
        error = capsys.readouterr().err
        assert error.startswith("error: no single file: ")
        assert reason in error
    assert exported(capsys, tmp_path / "tiny", "--fp16")["files"] == [FP16]
    again = AutoencoderTiny.from_pretrained(tmp_path / "tiny", variant="fp16").state_dict()
    assert all(torch.equal(again[name].float(), tensor.half().float()) for name, tensor in tiny.state_dict().items())


def test_formats_of_other_weights_do_not_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(capsys, folder, "--fp16")
    small_kl(seed=1).save_pretrained(folder)
    exported(capsys, folder, "--no-single-file")
    assert not list(folder.glob("*ldm*"))
    assert not (folder / FP16).exists()
    assert "not measured" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "taken_for"),
    [
        ({}, "AutoencoderKL, f8, 4 latent channels"),
        ({"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, "f8, 16 latent channels"),
        ({"block_out_channels": (128, 256, 512)}, "AutoencoderKL, f4, 4 latent channels"),
        ({"block_out_channels": (128, 256, 512, 512, 512)}, None),
        ({"block_out_channels": (64, 128, 256, 256)}, None),
    ],
)
def test_the_single_file_of_an_sd_width_model_passes_comfyuis_detection(
    changes: dict[str, Any], taken_for: str | None
) -> None:
    widths = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, **changes}
    n = len(widths["block_out_channels"])
    with torch.device("meta"):
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            layers_per_block=2,
            **widths,
        )
    config = formats.config_of(network)
    found = comfy_detects(
        {name: tuple(tensor.shape) for name, tensor in to_original(network.state_dict(), config).items()}
    )
    if taken_for is None:
        assert found is None
        assert any("ComfyUI" in limit for limit in original_limits(config))
    else:
        assert found is not None
        assert found.endswith(taken_for)
    assert formats.no_single_file(network) == ""


def test_bad_sources_are_one_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    (tmp_path / "in-use").mkdir()
    (tmp_path / "in-use" / "file").touch()
    cases: list[tuple[list[str | Path], int, str]] = [
        ([tmp_path / "nowhere"], 2, "no checkpoint here"),
        ([tmp_path / "x.safetensors"], 2, "codec-train import"),
        ([folder, "-o", tmp_path / "in-use"], 2, "exists and is not empty"),
        ([folder, "--preview", tmp_path / "nowhere"], 2, "no such file or folder"),
        ([tmp_path / "in-use" / "file"], 2, "checkpoint"),
    ]
    for arguments, code, said in cases:
        assert main(["export", *map(str, arguments)]) == code
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_sections_are_replaced_where_they_stand() -> None:
    text = "# m\n\nintro\n\n## Training\n\nwords\n\n## Ids\n\nids\n"
    once = with_section(text, "Where it loads", ["first"])
    assert once.index("first") < once.index("## Training")
    twice = with_section(with_section(once, "Files", ["f"]), "Where it loads", ["second"])
    assert "first" not in twice
    assert [line for line in twice.splitlines() if line.startswith("## ")] == [
        "## Where it loads", "## Training", "## Ids", "## Files",
    ]  # fmt: skip
    assert with_section(twice, "Files", ["f"]) == twice


def test_a_reloaded_network_is_compared_by_what_it_gives(folder: Path) -> None:
    network = small_kl()
    formats.check_folder(network, folder)
    with torch.no_grad():
        network.encoder.conv_in.bias += 1e-3
    with pytest.raises(ModelError, match="loaded again, its latents differ"):
        formats.check_folder(network, folder)
    z, x_hat = formats.outputs(network)
    assert x_hat.shape == (1, 3, 64, 64)
    assert z.shape[2] == 64 // latent_model(network).f
    assert images.save_png(formats.fixture_picture(2))
