"""`codec-eval recon`: numbers against diffusers itself, samples, ranks, the control, bad input."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image
from torchvision.models import squeezenet1_0

from codec import images
from codec.engine import EngineConfig
from codec.errors import ModelError, UsageError
from codec.latent_model import TwoLevelModel, latent_model
from eval import autoencoder
from eval.autoencoder import load_all, names_of, noise
from eval.cli import main
from eval.recon import codebook
from eval.results import codebooks
from tests.codec.two_level_models import two_level_network
from tests.conftest import make_model, photo

FEW = ["--metrics", "psnr,ssim"]


@pytest.fixture(scope="session")
def vq_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vq"
    torch.manual_seed(5)
    network = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=32,
        mid_block_add_attention=False,
    )
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "fast"
    torch.manual_seed(6)
    widths: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder)
    return folder


def run(*arguments: str | Path) -> int:
    return main(["recon", *map(str, arguments)])


def read(folder: Path, name: str = "recon.json") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / name).read_text())
    return result


def centre(path: Path, side: int) -> np.ndarray:
    """Prepare a photograph as folder-<side>, by hand."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    factor = side / min(picture.size)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture)[top : top + side, left : left + side]


def floats(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(2, 0, 1)[None].astype(np.float32)) / 127.5 - 1


def pixels(x_hat: torch.Tensor) -> np.ndarray:
    return np.rint(np.clip((x_hat[0].numpy().transpose(1, 2, 0) + 1) * 127.5, 0, 255))


def decibels(x: np.ndarray, x_hat: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((x.astype(float) - x_hat) ** 2))


@torch.no_grad()
def test_numbers_are_those_of_diffusers_itself(
    model_dir: Path, vq_dir: Path, tiny_dir: Path, new_model: Callable[..., Path], photo_folder: Path, tmp_path: Path
) -> None:
    wide = new_model("wide", seed=3, channels=16)
    out = tmp_path / "out"
    models = [model_dir, wide, vq_dir, tiny_dir]
    assert run(*models, "--data", photo_folder, "--protocol", "folder-48", *FEW, "-o", out) == 0
    result = read(out)
    assert result["dataset"]["names"] == ["a.png", "sub/b.png", "sub/c.png"]
    assert [model["name"] for model in result["models"]] == ["tiny", "wide", "vq", "fast"]
    described = [model["description"] for model in result["models"]]
    assert [about["family"] for about in described] == ["kl", "kl", "vq", "tiny"]
    assert [about["latent_channels"] for about in described] == [4, 16, 3, 4]

    networks: list[Any] = [AutoencoderKL.from_pretrained(folder).eval() for folder in models[:2]]
    networks += [VQModel.from_pretrained(vq_dir).eval(), AutoencoderTiny.from_pretrained(tiny_dir).eval()]
    counts = np.zeros(32, int)
    for name in result["dataset"]["names"]:
        x = centre(photo_folder / name, 48)
        for network, model in zip(networks, result["models"], strict=True):
            found = network.encode(floats(x))
            z = found.latent_dist.mean if isinstance(network, AutoencoderKL) else found.latents
            expected = decibels(x, pixels(network.decode(z).sample))
            row = next(row for row in model["rows"] if row["image"] == name)
            assert (row["height"], row["width"]) == (48, 48)
            assert row["psnr"] == pytest.approx(expected, abs=2e-3), model["name"]
            if isinstance(network, VQModel):
                distances = torch.cdist(z[0].flatten(1).T, network.quantize.embedding.weight)
                counts += np.bincount(distances.argmin(1).numpy(), minlength=32)
    book = result["models"][2]["codebook"]
    assert [model["codebook"] is None for model in result["models"]] == [True, True, False, True]
    assert (book["size"], book["n_indices"], book["n_used"]) == (32, 3 * 24 * 24, np.count_nonzero(counts))
    p = counts[counts > 0] / counts.sum()
    assert book["perplexity"] == pytest.approx(math.exp(-sum(p * np.log(p))))
    assert 1 < book["perplexity"] < book["n_used"] <= 32


def test_the_codebook_of_each_index_map_is_counted_and_shown(
    model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    two_level_network().save_pretrained(tmp_path / "two")
    models = [model_dir, tmp_path / "two"]
    assert run(*models, "--data", photo_folder, "--protocol", "folder-48", *FEW, "-o", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    first, second = read(tmp_path / "out")["models"]
    assert (codebooks(first), second["codebook"]) == ([], None)
    coarse, fine = codebooks(second)
    assert [(book["size"], book["n_indices"]) for book in (coarse, fine)] == [(20, 3 * 12 * 12), (32, 3 * 24 * 24)]
    x = [floats(centre(photo_folder / name, 48)) for name in ("a.png", "sub/b.png", "sub/c.png")]
    model = latent_model(two_level_network())
    assert isinstance(model, TwoLevelModel)
    with torch.no_grad():
        planes = torch.cat([model.indices(each) for each in x])
    assert coarse["n_used"] == planes[:, 0].unique().numel()
    assert fine["n_used"] == planes[:, 1:].unique().numel()
    assert f"{coarse['n_used']} of 20" in shown
    assert f"{fine['n_used']} of 32" in shown


def test_means_spread_and_the_two_ways_to_average_psnr(model_dir: Path, photo_folder: Path, tmp_path: Path) -> None:
    assert run(model_dir, "--data", photo_folder, "--protocol", "folder", *FEW, "-o", tmp_path) == 0
    result = read(tmp_path)
    (model,) = result["models"]
    rows = model["rows"]
    assert [(row["height"], row["width"]) for row in rows] == [(96, 80), (50, 70), (64, 64)]  # mixed sizes, whole
    values = [row["psnr"] for row in rows]
    assert model["means"]["psnr"] == pytest.approx(np.mean(values))
    assert model["psnr"]["std"] == pytest.approx(np.std(values))
    low, high = model["intervals"]["psnr"]
    assert min(values) <= low < model["means"]["psnr"] < high <= max(values)
    assert model["n_values"] == {"psnr": 3, "ssim": 3}
    squares = sum(255**2 / 10 ** (row["psnr"] / 10) * row["height"] * row["width"] for row in rows)
    mean_mse = squares / sum(row["height"] * row["width"] for row in rows)
    assert model["psnr"]["of_mean_mse"] == pytest.approx(10 * math.log10(255**2 / mean_mse))


def test_table_and_picture(model_dir: Path, vq_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert run(model_dir, vq_dir, "--data", photo_folder, "--protocol", "folder-48", *FEW, "-o", out) == 0
    shown = capsys.readouterr().out
    assert "identity control, PNG round trip of 3 images: psnr infinite, ssim 1" in shown
    result = read(out)
    mean, (low, high) = (result["models"][0][key]["psnr"] for key in ("means", "intervals"))
    assert f"{mean:.2f} ({low:.2f} .. {high:.2f})" in shown
    assert f"{result['models'][1]['codebook']['n_used']} of 32" in shown
    assert result["protocol_hash"] in shown
    assert {str(out / "recon.json"), str(out / "recon.png")} <= set(shown.splitlines())
    assert "note:" not in shown  # every mean is of every image
    with Image.open(out / "recon.png") as file:
        picture = np.asarray(file)
    assert picture.shape == (44 + 3 * (256 + 44), 8 + 5 * (256 + 8), 3)  # original, and 2 models with differences
    x = centre(photo_folder / "sub/c.png", 48)
    top = 44 + 2 * 300
    np.testing.assert_array_equal(picture[top : top + 48, 8 : 8 + 48], x)
    x_hat = picture[top : top + 48, 8 + 264 : 8 + 264 + 48]
    assert decibels(x, x_hat) == pytest.approx(result["models"][0]["rows"][2]["psnr"])


@torch.no_grad()
def test_a_sample_is_mean_plus_the_posteriors_own_noise(model_dir: Path, photo_folder: Path, tmp_path: Path) -> None:
    options = ["--protocol", "folder-48", "--posterior", "sample", "--seed", "7", *FEW, "-o", tmp_path]
    assert run(model_dir, "--data", photo_folder, *options) == 0
    network = AutoencoderKL.from_pretrained(model_dir).eval()
    for row in read(tmp_path)["models"][0]["rows"]:
        x = centre(photo_folder / row["image"], 48)
        posterior = network.encode(floats(x)).latent_dist
        z = posterior.mean + posterior.std * torch.from_numpy(noise(7, row["image"], posterior.mean[0].shape))
        assert row["psnr"] == pytest.approx(decibels(x, pixels(network.decode(z).sample)), abs=2e-3)


def test_noise_depends_on_seed_and_key_only(model_dir: Path, photo_folder: Path, tmp_path: Path) -> None:
    def psnr(*options: str) -> dict[str, float]:
        common = ["--protocol", "folder-48", *FEW, "-o", tmp_path]
        assert run(model_dir, "--posterior", "sample", *options, *common) == 0
        return {row["image"]: row["psnr"] for row in read(tmp_path)["models"][0]["rows"]}

    parts = [photo_folder / "a.png", photo_folder / "sub/c.png"]
    forwards = psnr("--data", str(parts[0]), "--data", str(parts[1]))
    assert psnr("--data", str(parts[1]), "--data", str(parts[0])) == forwards
    assert psnr("--data", str(parts[1])) == {"c.png": forwards["c.png"]}
    other = psnr("--data", str(parts[1]), "--seed", "1")
    assert other["c.png"] != forwards["c.png"]

    drawn = noise(0, "a.png", (4, 64, 64))
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 1) < 0.03
    assert np.abs(drawn - noise(0, "b.png", (4, 64, 64))).min() > 0
    # The first values of all time: a result of today can be made again tomorrow.
    np.testing.assert_allclose(noise(0, "a.png", (3,)), FIRST_NOISE, atol=1e-6)


FIRST_NOISE = [0.814016, -0.203566, 0.958571]


def test_posterior_is_part_of_the_protocol(model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any) -> None:
    def protocol_hash(name: str, *options: str) -> str:
        common = ["--data", photo_folder, "--protocol", "folder-48", *FEW, "-o", tmp_path / name]
        assert run(model_dir, *options, *common) == 0
        return str(read(tmp_path / name)["protocol_hash"])

    mode = protocol_hash("mode")
    assert protocol_hash("other seed", "--seed", "5") == mode  # it decides nothing there
    first = protocol_hash("sample", "--posterior", "sample")
    second = protocol_hash("sample 5", "--posterior", "sample", "--seed", "5")
    assert len({mode, first, second}) == 3
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "mode/recon.json"), str(tmp_path / "sample/recon.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "protocol.posterior: 'mode (the mean)' against 'sample: mean + std * noise" in line
    assert main(["compare", str(tmp_path / "mode/recon.json"), str(tmp_path / "other seed/recon.json")]) == 0


def test_several_sizes_give_a_result_each(model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recon-400.png").write_text("of an earlier run")
    code = run(model_dir, "--data", photo_folder, "--size", "32,60,400", *FEW, "-o", tmp_path / "out")
    assert code == 1
    small, middle = (read(tmp_path / "out", f"recon-{side}.json") for side in (32, 60))
    assert (small["protocol"]["name"], small["dataset"]["n_images"]) == ("folder-32", 3)
    assert {(row["height"], row["width"]) for row in small["models"][0]["rows"]} == {(32, 32)}
    assert middle["dataset"]["names"] == ["a.png", "sub/c.png"]
    assert [failure["image"] for failure in middle["failed"]] == ["sub/b.png"]
    assert small["protocol_hash"] != middle["protocol_hash"]
    assert not list((tmp_path / "out").glob("recon-400*"))
    lines = capsys.readouterr().err.splitlines()
    b_png = photo_folder / "sub/b.png"
    assert lines[0] == f"error: {b_png}: 70 x 50 pixels, smaller than the 60 of protocol folder-60"
    assert lines[1] == "error: 1 of 3 images failed under folder-60"
    assert lines[-1] == "error: 3 of 3 images failed under folder-400"
    assert len(lines) == 6


def test_a_failing_image_counts_for_no_model(model_dir: Path, vq_dir: Path, photo_folder: Path, tmp_path: Path) -> None:
    (photo_folder / "broken.png").write_bytes(b"no image")
    assert run(model_dir, vq_dir, "--data", photo_folder, "--size", "48", *FEW, "-o", tmp_path) == 1
    result = read(tmp_path)
    assert result["dataset"]["n_images"] == 3
    assert [failure["image"] for failure in result["failed"]] == ["broken.png"]
    assert result["models"][1]["codebook"]["n_indices"] == 3 * 24 * 24


def test_the_control_is_recorded_and_stops_what_cannot_be_trusted(
    model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [model_dir, "--data", photo_folder, "--size", "48", *FEW, "-o", tmp_path]
    assert run(*arguments) == 0
    control = read(tmp_path)["control"]
    assert (control["passed"], control["n_images"]) == (True, 3)
    assert control["measured"] == {"psnr": "infinite", "ssim": 1.0}

    (tmp_path / "recon.json").unlink()
    real = images.save_png

    def off_by_one(image: np.ndarray, **how: Any) -> bytes:
        return real(image ^ (np.arange(image.size).reshape(image.shape) == 100), **how)

    monkeypatch.setattr(autoencoder.images, "save_png", off_by_one)
    capsys.readouterr()
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the identity control failed, nothing was measured: a PNG round trip gave psnr" in line
    assert not (tmp_path / "recon.json").exists()


def test_a_model_that_gives_no_numbers_fails_image_by_image(photo_folder: Path, tmp_path: Path, capsys: Any) -> None:
    folder = make_model(tmp_path / "nan")
    network = AutoencoderKL.from_pretrained(folder)
    network.decoder.conv_out.bias.data.fill_(math.nan)
    network.save_pretrained(folder)
    assert run(folder, "--data", photo_folder, "--size", "48", *FEW, "-o", tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: 3 of 3 images failed under folder-48"
    assert "a.png: nan: " in lines[0]
    assert "not finite" in lines[0]


def test_bad_input(model_dir: Path, vq_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = ["-o", tmp_path / "out"]
    data = ["--data", photo_folder]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    def refused(code: int, message: str, *arguments: str | Path) -> None:
        assert run(*arguments) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
        assert not (tmp_path / "out/recon.json").exists()

    refused(2, "no images found", model_dir, "--data", tmp_path / "empty", *out)
    refused(2, "no such file or folder", model_dir, "--data", tmp_path / "none", *out)
    refused(2, "protocol kodak is 24 images (the Kodak suite", model_dir, *data, "--protocol", "kodak", *out)
    refused(2, "did you mean folder-256?", model_dir, *data, "--protocol", "folder256", *out)
    refused(2, "--size is short for --protocol", model_dir, *data, "--protocol", "folder", "--size", "48", *out)
    for sizes in ("", "48,x", "0", "-4", "48.5"):
        refused(2, "--size: expected sides in pixels", model_dir, *data, f"--size={sizes}", *out)
    refused(2, "--posterior: 'median', expected mode or sample", model_dir, *data, "--posterior", "median", *out)
    refused(2, "a vq model has no variance: --posterior mode only", vq_dir, *data, "--posterior", "sample", *out)
    refused(2, "unknown metric 'pnsr'", model_dir, *data, "--metrics", "pnsr", *out)
    refused(2, "backbone weights alexnet-*.pth", model_dir, *data, "--metrics", "psnr,lpips_alex", *out)
    refused(2, "not found in", model_dir, *data, "--backbones", tmp_path / "empty", *out)
    refused(2, "the same model twice", model_dir, model_dir, *data, *out)
    refused(2, "dtype float8", model_dir, *data, "--dtype", "float8", *out)
    refused(2, "cannot write here", model_dir, *data, "-o", tmp_path / "file" / "out")
    refused(3, "no such folder", tmp_path / "none", *data, *out)
    refused(3, "not a diffusers model folder", tmp_path / "empty", *data, *out)


def test_weights_that_are_not_here_are_said_once(
    model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run(model_dir, "--data", photo_folder / "a.png", "--size", "48", "-o", tmp_path) == 0
    shown, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("left out, their weights are not here")
    assert "lpips_alex" in line
    result = read(tmp_path)
    assert "lpips_alex" in result["absent"]
    assert "lpips_alex" not in result["models"][0]["means"]
    assert result["models"][0]["means"]["ms_ssim"] is None  # 48 pixels are too few for its scales
    assert "note: MS-SSIM of tiny is of 0 of 1 images: the others have a side below 161 pixels" in shown
    assert result["models"][0]["intervals"]["psnr"] is None  # of one image


def test_an_image_too_large_for_a_model_without_tiles_fails_alone(tmp_path: Path) -> None:
    VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),  # looks at the whole image
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(tmp_path / "vq")
    (model,) = load_all([tmp_path / "vq"], EngineConfig(device="cpu", dtype="float32", memory_bytes=1))
    with pytest.raises(ValueError, match=r"vq: .*cannot be run in stripes") as caught:
        model("a.png", photo(48, 48))
    assert not isinstance(caught.value, ModelError)  # that would end the run


def test_names_are_as_much_of_the_path_as_tells_models_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "runs/l1/model", tmp_path / "runs/perceptual/model", tmp_path / "other"]
    assert names_of(paths[:1]) == ["model"]
    assert names_of(paths[:2]) == ["l1/model", "perceptual/model"]
    assert names_of(paths[::2]) == ["model", "other"]
    paths[0].mkdir(parents=True)
    (paths[0] / "codec.json").write_text('{"name": "l1"}')
    assert names_of(paths) == ["l1", "model", "other"]
    with pytest.raises(UsageError, match="the same model twice"):
        names_of([paths[0], tmp_path / "runs" / ".." / "runs/l1/model"])


def test_codebook_of_known_counts() -> None:
    found = codebook(np.array([0, 6, 6, 0]))
    assert found == {"size": 4, "n_used": 2, "usage": 0.5, "perplexity": pytest.approx(2), "n_indices": 12}
    assert codebook(np.array([5, 0]))["perplexity"] == pytest.approx(1)
    assert codebook(np.full(7, 3))["perplexity"] == pytest.approx(7)


def test_compare_takes_what_recon_writes(
    model_dir: Path, new_model: Callable[..., Path], photo_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    other = new_model("other", seed=9)
    for folder in (model_dir, other):
        assert run(folder, "--data", photo_folder, "--size", "48", *FEW, "-o", tmp_path / folder.name) == 0
    results = [str(tmp_path / name / "recon.json") for name in ("tiny", "other")]
    capsys.readouterr()
    assert main(["compare", *results, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"][0]["rows"]
    assert [(row["a_name"], row["b_name"], row["metric"]) for row in found] == [
        ("tiny", "other", "psnr"),
        ("tiny", "other", "ssim"),
    ]
    means = [read(tmp_path / name)["models"][0]["means"]["psnr"] for name in ("tiny", "other")]
    assert found[0]["difference"] == pytest.approx(means[1] - means[0])

    assert run(other, "--data", photo_folder, "--size", "48", "--limit", "2", *FEW, "-o", tmp_path / "other") == 0
    capsys.readouterr()
    assert main(["compare", *results]) == 2
    assert "3 images against 2, 2 of the same name; only in the first: sub/c.png" in capsys.readouterr().err


def squeezenet(path: Path, seed: int) -> Path:
    """Write random weights in the place of the real ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(squeezenet1_0().state_dict(), path)
    return path


def test_metrics_of_sets_and_their_weights(model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: Any) -> None:
    files = [squeezenet(tmp_path / str(seed) / "squeezenet1_0.pth", seed) for seed in (1, 2)]
    for file in files:
        options = ["--metrics", "lpips_sqz10", "--backbones", file.parent, "--fid-network", "squeezenet1_0"]
        assert run(model_dir, "--data", photo_folder, "--size", "48", *options, "-o", file.parent) == 0
    shown = capsys.readouterr().out
    result = read(files[0].parent)
    sha256 = hashlib.sha256(files[0].read_bytes()).hexdigest()
    zero = pytest.approx(0, abs=1e-6)
    assert result["control"]["measured"] == {"lpips_sqz10": 0, "rfid": zero, "kid": zero}
    assert result["weights"] == {"lpips_sqz10": {"name": "squeezenet1_0", "sha256": sha256}}
    assert result["feature_network"]["sha256"] == sha256
    assert sha256 in result["protocol"]["metrics"]["rfid"]
    found = result["models"][0]["distribution"]
    assert found["rfid"] > 0
    assert found["patch_fid"] is None  # a patch is 256 pixels
    counts = result["models"][0]["distribution_counts"]
    assert counts == {"n_images": 3, "n_kept": 3, "n_patches": 0, "n_patches_kept": 0, "n_too_small": 0}
    assert f"{found['rfid']:.3f}" in next(line for line in shown.splitlines() if "rFID (squeezenet1_0)" in line)
    assert "rfid: 3 images cannot span 512 features" in shown

    assert main(["compare", *(str(file.parent / "recon.json") for file in files)]) == 2
    lines = capsys.readouterr().err
    assert "protocol.metrics.rfid: " in lines
    assert f"weights.lpips_sqz10.sha256: '{sha256}' against" in lines


@pytest.fixture
def twenty_three(tmp_path: Path) -> Path:
    """23 images, of which one cannot be read."""
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(22):
        (folder / f"{index:02}.png").write_bytes(images.save_png(photo(40 + index, 44, seed=index)))
    (folder / "10b.png").write_bytes(b"no image")
    return folder


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten a result to its leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {leaf: found for key, item in items for leaf, found in numbers(item, f"{path}/{key}").items()}


@pytest.mark.slow
def test_two_processes_measure_what_one_does(model_dir: Path, vq_dir: Path, twenty_three: Path, tmp_path: Path) -> None:
    features = squeezenet(tmp_path / "squeezenet1_0.pth", seed=0)

    def arguments(out: str, *models: Path) -> list[str]:
        options = ["--size", "40", "--metrics", "psnr,ssim,lpips_sqz10", "--backbones", str(features)]
        options += ["--fid-network", "squeezenet1_0", "-o", str(tmp_path / out)]
        return ["recon", *map(str, models), "--data", str(twenty_three), *options]

    both = arguments("two", model_dir, vq_dir)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.Popen(
        [*launcher, "-m", "eval", *both], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert main(arguments("one", model_dir, vq_dir)) == 1
    out, err = done.communicate(timeout=240)
    assert done.returncode == 1, err
    assert out.count("identity control") == 1  # one rank prints
    assert err.count("1 of 23 images failed") == 1
    one, two = (read(tmp_path / name) for name in ("one", "two"))
    assert one["dataset"]["n_images"] == 22
    assert one["models"][0]["distribution"]["rfid"] > 0
    for result in (one, two):
        for key in ("command", "hardware"):
            del result[key]
    a, b = numbers(one), numbers(two)
    assert a.keys() == b.keys()
    for leaf, value in a.items():
        if isinstance(value, float):
            assert b[leaf] == pytest.approx(value, abs=1e-6), leaf
        else:
            assert b[leaf] == value, leaf
    assert a["/models/1/codebook/n_indices"] == 22 * 20 * 20
