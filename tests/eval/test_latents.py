"""`codec-eval latents` from end to end: models trained to differ are told apart, bad input, ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from codec import images
from codec.engine import Engine, EngineConfig
from codec.files import find
from codec.images import EXTENSIONS
from codec.launch import Launch
from codec.pixels import to_float
from eval.cli import main
from eval.latent_measure import LatentsConfig
from eval.latents import run_latents
from tests.conftest import photo
from train.networks import initialize_linear

SIZE = 16


def new_network(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train(folder: Path, kl_weight: float, noise: float = 0.0) -> Path:
    """Train a tiny autoencoder on synthetic crops; its latents get noise of up to `noise` of their deviation."""
    network = new_network()
    initialize_linear(network)
    if kl_weight < 1:  # start with little noise, so that a hundred steps suffice
        with torch.no_grad():
            network.quant_conv.weight[4:] = 0
            network.quant_conv.bias[4:] = -6
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    data = torch.stack([to_float(photo(SIZE, SIZE, seed=n)) for n in range(48)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        x = data[torch.randint(len(data), (8,), generator=generator)]
        posterior = network.encode(x).latent_dist
        mean, std = posterior.mean, posterior.std
        z = mean + std * torch.randn(std.shape, generator=generator)
        strength = noise * torch.rand(len(x), 1, 1, 1, generator=generator) * mean.detach().std()
        x_hat = network.decode(z + strength * torch.randn(z.shape, generator=generator)).sample
        kl = 0.5 * (mean**2 + std**2 - 1 - posterior.logvar).mean()
        loss = (x_hat - x).abs().mean() + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        std = float(network.encode(data).latent_dist.mean.std())
    network.register_to_config(scaling_factor=1 / std)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of mixed sizes, none smaller than SIZE."""
    folder = tmp_path_factory.mktemp("photos")
    for n, size in enumerate([(16, 16), (24, 17), (32, 24), (17, 25)]):
        (folder / f"{n}.png").write_bytes(images.save_png(photo(*size, seed=100 + n)))
    return folder


def latents(model: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    command = ["latents", str(model), "--data", str(data), "-o", str(out), "--size", str(SIZE), "--device", "cpu"]
    assert main([*command, *more]) == 0
    result: dict[str, Any] = json.loads((out / "latents.json").read_text())
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, dict[str, Any]]:
    base = tmp_path_factory.mktemp("trained")
    found = {}
    for name, how in {"collapsed": (50.0, 0.0), "healthy": (1e-4, 0.0), "noisy": (1e-4, 1.0)}.items():
        found[name] = latents(train(base / name, *how), folder, base / f"{name}-out", "--no-plots")
    return found


def test_it_tells_trained_models_apart(trained: dict[str, dict[str, Any]]) -> None:
    verdicts = {name: result["posterior"]["verdict"] for name, result in trained.items()}
    assert (verdicts["collapsed"], verdicts["healthy"]) == ("collapsed", "healthy")
    assert trained["collapsed"]["posterior"]["active_units"] == 0
    assert trained["healthy"]["posterior"]["active_units"] == 4
    assert trained["collapsed"]["posterior"]["kl_nats_per_position"] < 0.05
    assert trained["healthy"]["posterior"]["kl_nats_per_position"] > 2
    for name, result in trained.items():
        information = result["posterior"]["mutual_information"]
        assert -0.01 <= information["lower_nats"] <= information["upper_nats"] + 0.01, name
    assert trained["collapsed"]["posterior"]["mutual_information"]["upper_nats"] < 0.05
    assert trained["healthy"]["posterior"]["mutual_information"]["lower_nats"] > 1
    drops = {name: {row["sigma"]: row["drop_db"] for row in result["noise"]} for name, result in trained.items()}
    assert drops["healthy"][0.8] > 1  # measured 1.76 and 0.50 at 0.8, 0.56 and 0.17 at 0.4
    for sigma in (0.4, 0.8):
        assert drops["noisy"][sigma] < 0.6 * drops["healthy"][sigma]


def test_every_number_says_what_it_means(trained: dict[str, dict[str, Any]]) -> None:
    result = trained["healthy"]
    lines = result["summary"]
    assert len({line["section"] for line in lines}) == 10
    assert all(line["meaning"] and "\n" not in line["meaning"] for line in lines)
    values = {(line["section"], line["label"]): line["value"] for line in lines}
    assert values["posterior", "KL per position"] == pytest.approx(sum(row["kl_nats"] for row in result["channels"]))
    assert values["posterior", "KL per image"] == pytest.approx(np.mean([row["kl_nats"] for row in result["rows"]]))
    bits = values["posterior", "KL per image"] / np.log(2)
    assert values["posterior", "KL rate"] == pytest.approx(bits / SIZE**2)
    noise = np.mean([row["noise_db"] for row in result["rows"]], axis=0)
    assert [row["psnr_db"] for row in result["noise"]] == pytest.approx(noise)
    assert values["aggregate", "normalized std"] == pytest.approx(1, abs=0.3)
    assert result["dataset"]["names"] == ["0.png", "1.png", "2.png", "3.png"]


def test_tables_plots_and_determinism(
    tmp_path: Path, folder: Path, new_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = new_model("wide", channels=16)
    first = latents(model, folder, tmp_path / "a", "--limit", "2")
    shown = capsys.readouterr().out
    for line in first["summary"]:
        assert line["label"] in shown
        assert line["text"] in shown
    names = ("channels", "pca", "correlation", "spectrum", "noise", "equivariance", "locality", "drift", "grid", "fp16")
    for name in (*names, "example"):
        picture = images.load(tmp_path / "a" / f"latents_{name}.png")
        assert picture.std() > 5, name
    assert np.shape(first["correlation"]["matrix"]) == (16, 16)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "latents_pca.png").touch()
    again = latents(model, folder, tmp_path / "b", "--limit", "2", "--no-plots")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["latents.json"]  # no older plots beside it
    other = latents(model, folder, tmp_path / "c", "--limit", "2", "--seed", "1", "--no-plots")
    parts = ("posterior", "channels", "aggregate", "noise", "locality", "grid", "fp16", "rows", "protocol_hash")
    assert [first[part] for part in parts] == [again[part] for part in parts]
    assert first["channels"] == other["channels"]
    assert first["noise"][0] == other["noise"][0]
    assert first["noise"][3] != other["noise"][3]


def test_a_network_without_variance(tmp_path: Path, folder: Path) -> None:
    torch.manual_seed(0)
    how = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "upsampling_scaling_factor": 2}
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=1, **how
    )
    network.save_pretrained(tmp_path / "tiny")
    result = latents(tmp_path / "tiny", folder, tmp_path / "out", "--limit", "1", "--no-plots")
    assert result["posterior"]["verdict"] == "no posterior"
    assert result["posterior"]["kl_nats_per_position"] is None
    assert result["correlation"]["largest"] is None
    assert result["locality"]["random"]["reach_px"] <= 13  # 1 + 3 cells, then 1 + 3 + 1 pixels


def test_float16_is_refused_where_weights_make_it_overflow(tmp_path: Path, folder: Path) -> None:
    network = new_network()
    network.save_pretrained(tmp_path / "safe")
    with torch.no_grad():
        network.decoder.conv_in.weight *= 1e6
    network.save_pretrained(tmp_path / "hot")
    safe, hot = (
        latents(tmp_path / name, folder, tmp_path / f"{name}-out", "--limit", "1", "--no-plots")
        for name in ("safe", "hot")
    )
    assert safe["fp16"]["verdict"] == "safe"
    assert hot["fp16"]["verdict"] == "overflows"
    overflowing = [block["block"] for block in hot["fp16"]["blocks"] if block["share"] >= 1]
    assert "decoder.conv_in" in overflowing
    assert all(block.startswith("decoder.") for block in overflowing)
    assert hot["fp16"]["largest_share"] > 1 > safe["fp16"]["largest_share"] > 0


def test_bad_images_are_listed_and_the_rest_is_measured(
    tmp_path: Path, model_dir: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "b.png").write_bytes((folder / "2.png").read_bytes())
    (data / "a.png").write_bytes(images.save_png(photo(15, 64)))
    (data / "c.png").write_bytes(b"not an image")
    options = ["-o", str(tmp_path / "out"), "--size", str(SIZE), "--no-plots"]
    assert main(["latents", str(model_dir), "--data", str(data), *options]) == 1
    result = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert result["dataset"]["names"] == ["b.png"]
    assert [failure["image"] for failure in result["failed"]] == ["a.png", "c.png"]
    printed = capfd.readouterr().err
    assert f"error: {data / 'a.png'}: 64 x 15 pixels, smaller than --size 16" in printed
    assert "2 of 3 images failed" in printed
    assert main(["latents", str(model_dir), "--data", str(data / "a.png"), "-o", str(tmp_path / "none")]) == 1
    assert not list((tmp_path / "none").iterdir())
    assert "nothing was measured" in capfd.readouterr().err


def test_another_normalisation_is_said_not_to_be_used(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = new_network()
    network.register_to_config(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    network.save_pretrained(tmp_path / "model")
    latents(tmp_path / "model", folder, tmp_path / "out", "--limit", "1", "--no-plots")
    assert "latents_mean and latents_std are not used" in capfd.readouterr().err


def test_usage_errors(tmp_path: Path, model_dir: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, data = ["-o", str(tmp_path / "out")], ["--data", str(folder)]
    (tmp_path / "empty").mkdir()
    assert main(["latents", str(model_dir), "--data", str(tmp_path / "empty"), *out]) == 2
    assert "no images found" in capfd.readouterr().err
    for size in ("33", "14"):
        assert main(["latents", str(model_dir), *data, *out, "--size", size]) == 2
        assert "expected a multiple of 2, the model's f, of at least 16" in capfd.readouterr().err
    assert main(["latents", str(tmp_path / "no-model"), *data, *out]) == 3
    VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=4).save_pretrained(tmp_path / "vq")
    capfd.readouterr()
    assert main(["latents", str(tmp_path / "vq"), *data, *out]) == 3
    assert capfd.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'vq'}: a VQModel has no posterior to measure; codec-eval recon reports its codebook"
    ]


class _Second(Launch):
    """The second of two ranks, given what the first had to say."""

    def __init__(self, first: Any) -> None:
        super().__init__(1, 2)
        object.__setattr__(self, "first", first)

    def gather(self, value: Any) -> list[Any]:
        return [self.first, value]  # type: ignore[attr-defined]


class _First(Launch):
    said: Any = None

    def gather(self, value: Any) -> list[Any]:
        _First.said = value
        return [value]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-9)
    else:
        assert a == b


def test_two_ranks_find_what_one_finds(model_dir: Path, folder: Path) -> None:
    sources = find([folder], EXTENSIONS)[:3]  # an uneven split

    def run(launch: Launch) -> dict[str, Any]:
        engine = Engine.load(model_dir, EngineConfig(device="cpu", dtype="float32"))
        result, _ = run_latents(engine, model_dir, sources, LatentsConfig(size=SIZE), launch)
        return {key: value for key, value in result.items() if key != "time_s"}

    alone = run(Launch())
    run(_First(0, 2))
    assert alone["dataset"]["n_images"] == 3
    assert_same(alone, run(_Second(_First.said)))
