import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from codec.errors import UsageError
from codec.latent_model import latent_model
from codec.runtime import Codec
from codec.shards import read_index
from tests.conftest import photo
from train.cli import main
from train.drift import LIMITS, REASONS, drift_lines, export_drift, failures, measure_drift
from train.recipe import load_recipe

PHOTOS = [photo(32, 48, seed) for seed in range(3)]


def network(seed: int = 0, **settings: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **{"scaling_factor": 0.5, "shift_factor": 0.25, **settings},
    ).eval()


@torch.no_grad()
def moved(module: nn.Module, by: float, *begins: str, seed: int = 5) -> nn.Module:
    """Add noise to the parameters whose names begin so, relative to their size."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.startswith(begins):
            parameter.add_(by * parameter.abs().mean() * torch.randn_like(parameter))
    return module


def drift(base: nn.Module, new: nn.Module) -> dict[str, Any]:
    return measure_drift(latent_model(base), latent_model(new), PHOTOS)


@torch.no_grad()
def test_a_shifted_and_scaled_latent_is_measured_as_such() -> None:
    """quant_conv gives (mean, logvar): its first rows make the latents, so what happens to them is known."""
    base, new = network(), network()
    model = latent_model(base)
    deviation = np.array(_deviations(model))
    new.quant_conv.weight[1] *= 1.2
    new.quant_conv.bias[1] *= 1.2
    new.quant_conv.bias[2] += 0.3 * float(deviation[2])
    figures = drift(base, new)
    rows = figures["channels"]
    assert [row["std_ratio"] for row in rows] == pytest.approx([1, 1.2, 1, 1], abs=1e-4)
    assert rows[2]["mean_shift"] == pytest.approx(0.3, abs=1e-3)
    assert rows[2]["relative_error"] == pytest.approx(0.3, abs=1e-3)
    assert rows[0] == {"channel": 0, "std_ratio": 1.0, "std_change": 0.0, "mean_shift": 0.0, "relative_error": 0.0}
    error = np.array([row["relative_error"] for row in rows]) * deviation
    assert figures["relative_error"] == pytest.approx(np.sqrt((error**2).sum() / (deviation**2).sum()), rel=1e-3)
    assert figures["posterior_std_ratio"] == pytest.approx(1.0)
    assert not figures["compatible"]
    text = "; ".join(figures["reasons"])
    worst = max(rows, key=lambda row: abs(row["mean_shift"]))
    assert f"channel {worst['channel']}: mean moved by {worst['mean_shift']:+.3g} deviations" in text
    assert "channel 1: deviation changed by +0.2 deviations" in text


def _deviations(model: Any) -> list[float]:
    from codec.pixels import to_float

    with torch.no_grad():
        z = torch.cat([model.encode(to_float(image)[None]).mean.flatten(2) for image in PHOTOS], dim=2)
    return z[0].std(dim=1, correction=0).tolist()


def test_a_rescaled_model_with_its_own_scaling_factor_gives_the_same_normalized_latents() -> None:
    base, new = network(), network(scaling_factor=0.25, shift_factor=0.5)
    with torch.no_grad():  # raw latents twice as large, decoded as before
        new.quant_conv.weight[:4] *= 2
        new.quant_conv.bias[:4] *= 2
        new.post_quant_conv.weight /= 2
    figures = drift(base, new)
    assert not figures["latents_identical"]
    assert not figures["normalisation_identical"]
    assert figures["relative_error"] == pytest.approx(0, abs=1e-5)
    assert figures["compatible"]
    assert "scaling_factor or shift_factor differ" in "\n".join(drift_lines(figures))
    new.register_to_config(scaling_factor=0.5, shift_factor=0.25)  # as if the file had the base's: twice as large
    wrong = drift(base, new)
    assert wrong["channels"][0]["std_ratio"] == pytest.approx(2, abs=1e-3)
    assert not wrong["compatible"]


def test_another_decoder_leaves_the_latents_alone_bit_for_bit() -> None:
    figures = drift(network(), moved(network(), 0.5, "decoder.", "post_quant_conv."))
    assert figures["latents_identical"]
    assert figures["encoder_identical"]
    assert figures["psnr"]["new"] != figures["psnr"]["base"]
    assert figures["psnr"]["base_decoder_moved"] is None  # equal pictures
    assert drift_lines(figures)[0] == (
        "- drop-in compatible: **yes**: latents unchanged bit for bit (encoder tensors, and latents of 3 images)"
    )
    # A tensor that no image's latents show is still seen.
    hidden = network()
    with torch.no_grad():
        hidden.encoder.conv_in.bias[0] = torch.nextafter(hidden.encoder.conv_in.bias[0], torch.tensor(9.0))
    assert not drift(network(), hidden)["encoder_identical"]


def test_another_encoder_does_not_pass() -> None:
    figures = drift(network(), network(seed=1))
    assert not figures["latents_identical"]
    assert figures["cosine"] < 0.9
    assert not figures["compatible"]
    lines = drift_lines(figures)
    assert lines[0].startswith("- drop-in compatible: **no**, on 3 images: relative error")
    assert all(any(why in line for line in lines) for why in REASONS.values())
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize("name", [*LIMITS])
def test_each_limit_decides_by_itself(name: str) -> None:
    still = {"std_change": 0.0, "mean_shift": 0.0, "relative_error": 0.0, "channel": 0, "std_ratio": 1.0}
    figures: dict[str, Any] = {
        "latents_identical": False,
        "normalisation_identical": True,
        "relative_error": 0.099,
        "channels": [still, {**still, "channel": 1, "std_change": -0.049, "mean_shift": -0.049}],
        "psnr": {"base": 25.0, "base_decoder_moved": 31.1, "new_decoder_moved": 31.1},
    }
    assert failures(figures) == []
    if name == "relative_error":
        figures[name] = 0.11
    elif name == "picture_db":
        figures["psnr"]["new_decoder_moved"] = 30.9
    else:
        figures["channels"][1][name] = -0.051
    assert len(failures(figures)) == 1


def test_a_small_step_of_all_weights_is_compatible_and_a_large_one_is_not() -> None:
    assert drift(network(), moved(network(), 1e-4, ""))["compatible"]
    assert not drift(network(), moved(network(), 0.5, ""))["compatible"]


def test_latents_of_other_shapes_are_not_compared(
    tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network().save_pretrained(tmp_path / "a")
    network(latent_channels=5).save_pretrained(tmp_path / "b")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["drift", *folders, "--images", str(photo_folder)]) == 2
    assert "f 2, 5 latent channels" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no image"):
        measure_drift(latent_model(network()), latent_model(network()), [])


def test_the_command_reports_on_a_folder_and_on_shards(
    tmp_path: Path, photo_folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tmp_path / "pipeline" / "vae", tmp_path / "tuned"
    network().save_pretrained(base)
    moved(network(), 0.2, "").save_pretrained(tuned)
    out = tmp_path / "drift.json"
    (photo_folder / "broken.png").write_bytes(b"no")
    arguments = ["drift", str(base.parent), str(tuned), "-o", str(out)]
    assert main([*arguments, "--images", str(photo_folder)]) == 1  # the broken one is listed, the others are measured
    printed = capsys.readouterr()
    assert "broken.png" in printed.err
    assert "drop-in compatible: **no**, on 3 images of photos" in printed.out
    found = json.loads(out.read_text())
    assert (found["kind"], found["n_images"], len(found["failed"])) == ("drift", 3, 1)
    assert main([*arguments, "--images", str(shards), "--limit", "2", "--side", "33"]) == 0
    found = json.loads(out.read_text())
    assert (found["n_images"], found["n_positions"]) == (2, 2 * 16 * 16)
    assert main(["drift", str(base), str(base), "--images", str(photo_folder / "a.png"), "--side", "1"]) == 2
    assert main(["drift", str(base), str(base), "--images", str(photo_folder / "a.png")]) == 0
    assert "latents unchanged bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_a_decoder_of_an_imported_model_is_compatible_and_a_full_fine_tune_without_anchor_is_not(
    shards: Path, tmp_path: Path, run_folder: Path
) -> None:
    """The base has no codec.json: a folder of diffusers, as published ones are."""
    base = tmp_path / "published" / "vae"
    base.mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(run_folder / "model" / name, base)
    verdicts = {}
    for name, more in {
        "decoder": [],
        "full": ["model.trainable=all"],
        "anchored": ["model.trainable=all", "latents.anchor_weight=300", "optim.lr=2e-4"],
    }.items():
        out = tmp_path / name
        arguments = [f"data.shards={shards}", f"run.out={out}", "run.n_images=96", "export.statistics_images=4"]
        assert main(["run", "tiny", *arguments, f"model.init_from={base.parent}", "data.crop=40", *more]) == 0
        card = (out / "model" / "README.md").read_text()
        assert "## Drift" in card
        assert f"- base: {tmp_path.name}/published\n" in card
        verdicts[name] = card.split("drop-in compatible: **")[1].splitlines()[0]
    assert verdicts["decoder"].startswith("yes**: latents unchanged bit for bit")
    assert verdicts["full"].startswith("no**, on 2 held-out images: ")
    assert verdicts["anchored"].startswith("yes**, on 2 held-out images")
    picture = photo(40, 40)
    ours, theirs = (AutoencoderKL.from_pretrained(folder) for folder in (base, tmp_path / "decoder" / "model"))
    with torch.no_grad():
        x = torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        assert torch.equal(ours.encode(x).latent_dist.mode(), theirs.encode(x).latent_dist.mode())
    assert Codec.load(tmp_path / "decoder" / "model", "cpu", dtype="float32").encode(picture, 50)


def test_a_base_that_has_gone_away_costs_no_export(
    run_folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_recipe("tiny", [f"model.init_from={tmp_path / 'gone'}", "model.trainable=all"])
    assert export_drift(config, run_folder / "model", [], read_index(shards), torch.device("cpu")) == {}
    assert "drift: not measured" in capsys.readouterr().err


@pytest.mark.slow
def test_a_students_drift_is_measured_against_its_teacher(shards: Path, tmp_path: Path, run_folder: Path) -> None:
    out = tmp_path / "student"
    tiny = [
        "model.family=tiny",
        "model.block_out_channels=[8,8]",
        "kl.weight=0",
        f"model.teacher={run_folder / 'model'}",
    ]
    arguments = [f"data.shards={shards}", f"run.out={out}", "run.n_images=16", "export.statistics_images=4", *tiny]
    assert main(["run", "tiny", *arguments]) == 0
    card = (out / "model" / "README.md").read_text()
    assert "drop-in compatible: **no**" in card
    assert "scaling_factor or shift_factor differ" in card
    assert AutoencoderTiny.from_pretrained(out / "model").config.scaling_factor == 1.0


def test_a_run_from_scratch_has_no_drift(run_folder: Path) -> None:
    assert "Drift" not in (run_folder / "model" / "README.md").read_text()
