"""Images of more than three channels: RGBA files and arrays of bands, from shards to an exported model."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import nn

from codec.cli import main as codec_main
from codec.errors import ImageError, UsageError
from codec.latent_model import latent_model, load_latent_model
from codec.shards import read_index
from tests.conftest import photo
from tests.train.conftest import tiny_trainer
from train.channels import Channels, composite
from train.cli import main
from train.config import DataConfig, ModelConfig
from train.data import SampleSequence, whole_images
from train.discriminator import PatchDiscriminator
from train.inflate import inflate
from train.loss_config import LossConfig
from train.losses import ReconstructionLoss
from train.networks import build_network
from train.samples import Bands, finished, load_picture

KL = ModelConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, init="diffusers"
)
TINY = ModelConfig(family="tiny", block_out_channels=(8, 8), layers_per_block=1, init="diffusers")
RGBA = ["model.image_channels=4"]
BANDS = ["model.image_channels=6", "data.samples=npy"]
GAME = ["adversarial.weight=0.5", "adversarial.channels=8", "adversarial.layers=1", "adversarial.start=0"]
GAME += ["adversarial.warmup=0", "adversarial.ramp=0"]


def sticker(side: int, seed: int) -> np.ndarray:
    """A photograph cut out by a soft disc, with rubbish where it is transparent; (side, side, 4) uint8."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1) - 0.5
    alpha = np.clip((0.35 - np.hypot(x, y)) * 12, 0, 1)
    pixels = photo(side, side, seed)
    pixels[alpha == 0] = np.random.default_rng(seed).integers(0, 256, 3)
    return np.concatenate([pixels, (255 * alpha).round().astype(np.uint8)[..., None]], axis=-1)


@pytest.fixture(scope="module")
def alpha_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alpha")
    (folder / "stickers").mkdir()
    for n in range(7):
        Image.fromarray(sticker(48 + 2 * n, n)).save(folder / "stickers" / f"{n}.{'webp' if n == 6 else 'png'}")
    Image.fromarray(photo(48, 56, 9)).save(folder / "stickers" / "opaque.png")
    assert main(["shards", str(folder / "stickers"), "-o", str(folder / "shards"), "--jobs", "1"]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def band_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bands")
    with tarfile.open(folder / "000.tar", "w") as tar:
        for n in range(8):
            _add(tar, f"scene.{n}.NPY", _npy(np.concatenate([photo(40, 52, n), photo(40, 52, 100 + n)], axis=-1)))
            _add(tar, f"scene.{n}.cls", b"field")
        _add(tar, "preview.png", b"")
    return folder


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# Inflation


@pytest.mark.parametrize("config", [KL, TINY])
@pytest.mark.parametrize(("count", "alpha"), [(4, True), (6, False)])
def test_an_inflated_network_begins_where_its_base_is(config: ModelConfig, count: int, alpha: bool) -> None:
    torch.manual_seed(0)
    base = build_network(config)
    wide = inflate(base, count, alpha=alpha)
    assert (wide.config.in_channels, wide.config.out_channels) == (count, count)
    assert type(wide) is type(base)
    x = torch.rand(2, count, 16, 16) * 2 - 1
    ours, theirs = latent_model(base.eval()), latent_model(wide.eval())
    with torch.no_grad():
        z = ours.encode(x[:, :3]).mean
        torch.testing.assert_close(theirs.encode(x).mean, z)
        x_hat, inflated = ours.decode(z), theirs.decode(z)
    torch.testing.assert_close(inflated[:, :3], x_hat)
    if alpha:
        assert torch.all(inflated[:, 3] == 1.0)  # opaque
    else:
        torch.testing.assert_close(inflated[:, 3:], x_hat.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1))
    theirs.decode(theirs.encode(x).mean).square().mean().backward()
    first = wide.encoder.layers[0] if config is TINY else wide.encoder.conv_in
    assert bool(first.weight.grad[:, 3:].any())  # and learns from there


def test_channels_are_added_and_never_taken(tmp_path: Path) -> None:
    wide = inflate(build_network(KL), 4, alpha=True)
    assert inflate(wide, 4, alpha=True) is wide
    with pytest.raises(UsageError, match=r"of model\.init_from has 4; channels can only be added"):
        inflate(wide, 3, alpha=False)
    wide.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has 4; channels can only"):
        build_network(ModelConfig(init_from=str(tmp_path)))
    again = build_network(ModelConfig(init_from=str(tmp_path), image_channels=4, trainable="decoder"))
    assert not any(p.requires_grad for p in again.encoder.parameters())
    build_network(KL).save_pretrained(tmp_path / "rgb")
    with pytest.raises(UsageError, match=r"cannot see 4; set model\.trainable=all"):
        build_network(ModelConfig(init_from=str(tmp_path / "rgb"), image_channels=4, trainable="decoder"))
    assert not ModelConfig(init_from="x", image_channels=4).decoder_only


# What each loss sees


def test_colours_count_as_far_as_they_show() -> None:
    x = torch.rand(1, 4, 32, 32) * 2 - 1
    x[:, 3] = -1.0  # wholly transparent
    other = x.clone()
    other[:, :3] = torch.rand(1, 3, 32, 32)
    background = torch.rand(1, 3, 1, 1)
    loss = ReconstructionLoss(LossConfig(perceptual="none"), Channels(4, alpha=True))
    assert float(loss(x, other, background)["l1"]) == 0.0
    x[:, 3] = other[:, 3] = 1.0
    colours = float((x - other)[:, :3].abs().sum() / x.numel())
    assert float(loss(x, other, background)["l1"]) == pytest.approx(colours, rel=1e-5)
    assert torch.equal(composite(x, background), x[:, :3])
    half = x.clone()
    half[:, 3] = 0.0
    expected = (x[:, :3] + background) / 2
    torch.testing.assert_close(composite(half, background), expected)
    torch.testing.assert_close(composite(half, None), (x[:, :3] + 1) / 2)
    as_bands = ReconstructionLoss(LossConfig(perceptual="none"), Channels(4))
    x[:, 3] = -1.0
    assert float(as_bands(x, other)["l1"]) > 0.3


def test_features_see_the_composite_and_the_first_three_bands(backbone: Path) -> None:
    config = LossConfig(features=str(backbone), ms_ssim_weight=0.1, pixel_weight=0.0)
    x, x_hat = (torch.rand(1, 6, 48, 48) * 2 - 1 for _ in range(2))
    plain = ReconstructionLoss(config)(x[:, :3], x_hat[:, :3])
    bands = ReconstructionLoss(config, Channels(6))(x, x_hat)
    assert all(torch.equal(plain[name], bands[name]) for name in ("perceptual", "ms_ssim"))
    background = torch.full((1, 3, 1, 1), 0.3)
    rgba = ReconstructionLoss(config, Channels(4, alpha=True))(x[:, :4], x_hat[:, :4], background)
    laid = [composite(image[:, :4], background) for image in (x, x_hat)]
    expected = ReconstructionLoss(config)(*laid)
    torch.testing.assert_close(rgba["perceptual"], expected["perceptual"])
    torch.testing.assert_close(rgba["ms_ssim"], expected["ms_ssim"])


def test_backgrounds_are_drawn_for_each_image_from_its_position() -> None:
    channels = Channels.of(4, "image")
    drawn = channels.draw_background(3, range(40))
    assert drawn.shape == (40, 3, 1, 1)
    assert torch.equal(drawn[5:9], channels.draw_background(3, range(5, 9)))
    assert drawn.min() < -0.8
    assert drawn.max() > 0.8
    assert len({float(value) for value in drawn[:, 0, 0, 0]}) == 40
    assert Channels.of(3, "image").draw_background(3, range(4)) is None
    assert not Channels.of(4, "npy").alpha


def test_the_discriminator_judges_what_shows_or_all_bands(
    alpha_shards: Path, band_shards: Path, tmp_path: Path
) -> None:
    for shards, how, count in ((alpha_shards, RGBA, 3), (band_shards, BANDS, 6)):
        made = tiny_trainer(shards, tmp_path / str(count), *how, *GAME, "data.crop=40")
        critic = made.task.critic
        assert isinstance(critic, PatchDiscriminator)
        assert critic.config["image_channels"] == count
        values = made.step(made.feed.batches(0.0, 0))
        values = made.step(made.feed.batches(0.0, 4))
        assert values["d_gradient_norm"] > 0
        assert "grad_adversarial" in values


# Data


def test_alpha_is_kept_and_hidden_rubbish_is_not(alpha_shards: Path) -> None:
    refs = read_index(alpha_shards)
    sequence = SampleSequence(refs, DataConfig(crop=48), 0, channels=4)
    crops = [sequence[n]["image"] for n in range(len(refs))]
    assert {crop.shape for crop in crops} == {(4, 48, 48)}
    assert sum(bool((crop[3] == 1).all()) for crop in crops) == 1  # the photograph without alpha
    ref = next(ref for ref in refs if ref.key == "3")
    picture = load_picture(ref, 4)
    stored, piece = np.asarray(picture), finished(np.asarray(picture), picture)
    hidden = stored[..., 3] == 0
    assert np.array_equal(piece[~hidden], stored[~hidden])
    edge = stored[..., :3][~hidden].mean(axis=0)
    assert np.abs(piece[hidden][:, :3] - edge).mean() < np.abs(stored[hidden][:, :3] - edge).mean()
    assert np.array_equal(next(whole_images([ref], 64, 2, channels=4))[1], piece)
    rgb = SampleSequence(refs, DataConfig(crop=48), 0)[0]["image"]
    assert rgb.shape == (3, 48, 48)


def test_resizing_premultiplies_so_that_rubbish_does_not_bleed() -> None:
    array = np.zeros((40, 40, 4), np.uint8)
    array[:, :20] = (200, 100, 50, 255)
    array[:, 20:] = (0, 255, 0, 0)
    small = np.asarray(Image.fromarray(array).resize((10, 10), Image.Resampling.LANCZOS))
    seen = small[..., 3] > 40
    assert np.abs(small[seen][:, :3].astype(int) - (200, 100, 50)).max() <= 6


def test_bands_are_cut_and_resized_as_pillow_images_are() -> None:
    pixels = photo(40, 60)
    ours, theirs = Bands(pixels), Image.fromarray(pixels)
    assert ours.size == theirs.size
    assert np.array_equal(np.asarray(ours.crop((5, 7, 25, 17))), np.asarray(theirs.crop((5, 7, 25, 17))))
    box = {"box": (1.5, 2.25, 31.5, 22.25), "reducing_gap": 3.0}
    resized = [np.asarray(each.resize((20, 13), Image.Resampling.LANCZOS, **box)) for each in (ours, theirs)]
    assert np.array_equal(*resized)


def test_arrays_are_found_in_tars_and_images_beside_them_are_not(band_shards: Path, tmp_path: Path) -> None:
    refs = read_index(band_shards, kind="npy")
    assert [ref.key for ref in refs] == [f"000/scene.{n}" for n in range(8)]
    assert {(ref.height, ref.width, ref.label, ref.ext) for ref in refs} == {(40, 52, "field", "npy")}
    assert (band_shards / "000.tar.npy-index.json").exists()
    assert read_index(band_shards, kind="npy") == refs
    sequence = SampleSequence(refs, DataConfig(crop=32, random_resize=1.2), 0, channels=6)
    assert sequence[0]["image"].shape == (6, 32, 32)
    with pytest.raises(ImageError, match="6 bands, expected 5"):
        load_picture(refs[0], 5)
    bad = {
        "float": _npy(np.zeros((8, 8, 4), np.float32)),
        "gray": _npy(np.zeros((8, 8), np.uint8)),
        "short": _npy(np.zeros((8, 8, 4), np.uint8))[:-1],
        "pickle": _npy(np.array([{}], dtype=object)),
        "none": b"",
        "good": _npy(np.zeros((8, 8, 4), np.uint8)),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in bad.items():
            _add(tar, f"{name}.npy", data)
    assert [ref.key for ref in read_index(tmp_path, kind="npy", quiet=True)] == ["a/good"]
    reasons = dict(json.loads((tmp_path / "a.tar.npy-index.json").read_text())["bad"])
    assert "float32 (8, 8, 4), expected uint8 (H, W, C)" in reasons["a/float"]
    assert "truncated: 255 of 256 bytes" in reasons["a/short"]
    assert "damaged" in reasons["a/none"]
    assert "not supported" in reasons["a/pickle"]


# The whole line


@pytest.mark.parametrize("kind", ["rgba", "bands"])
def test_the_whole_line_from_an_rgb_base(
    kind: str,
    alpha_shards: Path,
    band_shards: Path,
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards, how, count = (alpha_shards, RGBA, 4) if kind == "rgba" else (band_shards, BANDS, 6)
    out, base = tmp_path / "r", run_folder / "model"
    arguments = [f"data.shards={shards}", f"run.out={out}", f"model.init_from={base}", *how, *GAME]
    arguments += ["latents.anchor_weight=1", "run.n_images=16", "data.crop=40", "export.statistics_images=4"]
    assert main(["run", "tiny", *arguments]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    values = [line for line in log if line["event"] == "step"]
    assert values[0]["anchor"] == pytest.approx(0, abs=1e-9)
    validation = next(line for line in log if line["event"] == "validation")
    assert ("alpha_error" in validation) == (kind == "rgba")
    vae = AutoencoderKL.from_pretrained(out / "model")
    assert (vae.config.in_channels, vae.config.out_channels) == (count, count)
    before = AutoencoderKL.from_pretrained(base).config
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (before.scaling_factor, before.shift_factor)
    card = (out / "model" / "README.md").read_text()
    assert ("RGBA" if kind == "rgba" else "6 bands") in card
    assert "drop-in compatible" in card
    assert "codec encode" not in card
    capsys.readouterr()
    Image.fromarray(photo(16, 16)).save(tmp_path / "a.png")
    assert codec_main(["encode", str(tmp_path / "a.png"), "-o", str(tmp_path / "c"), "-m", str(out / "model")]) == 3
    error = capsys.readouterr().err
    assert f"{count} image channels" in error
    assert "alpha without loss" in error
    # Such a model can be gone on with.
    again = tiny_trainer(shards, tmp_path / "2", *how, f"model.init_from={out / 'model'}", "data.crop=40")
    assert again.task.module.network.config.in_channels == count


def test_a_tiny_rgba_network_from_scratch_learns_alpha(alpha_shards: Path, tmp_path: Path) -> None:
    how = [*RGBA, "model.family=tiny", "model.block_out_channels=[8,8]", "kl.weight=0", "data.crop=32"]
    made = tiny_trainer(
        alpha_shards,
        tmp_path / "r",
        *how,
        "optim.lr=1e-2",
        "run.n_images=4000",
        "data.cache_mb=10",
        "loss.perceptual=none",
    )
    batches = made.feed.batches(0.0, 0)
    for _ in range(40):
        made.step(batches)
    errors = {}
    rows, _ = made.task.evaluate(made.task.module.eval(), torch.device("cpu"), 0, 1)
    errors = [row["alpha_error"] for row in rows]
    alphas = [image[..., 3] for _, image in whole_images(made.task._validation, 256, 2, channels=4)]
    constant = np.mean([np.abs(alpha - float(np.median(alpha))).mean() for alpha in alphas])
    assert np.mean(errors) < 0.5 * constant
    network: Any = made.task.module.network
    assert isinstance(network, AutoencoderTiny)
    assert network.config.in_channels == 4


def test_an_adapter_of_four_channels_loads_where_it_is_asked_for(tmp_path: Path) -> None:
    inflate(build_network(KL), 4, alpha=True).save_pretrained(tmp_path)
    model = load_latent_model(tmp_path, image_channels=None)
    assert isinstance(model.network, nn.Module)
    assert model.encode(torch.zeros(1, 4, 8, 8)).mean.shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.image_channels=2"], "model.image_channels = 2, allowed: >= 3"),
        (["model.image_channels=5"], "allowed: 3 or 4 (RGBA) with data.samples image"),
        ([*RGBA, "data.mode=streaming"], "data.mode = 'streaming', allowed: indexed"),
        (
            [*RGBA, "model.teacher=x", "model.family=tiny", "model.block_out_channels=[8,8]", "kl.weight=0"],
            "model.teacher",
        ),
        (["data.samples=npy"], "arrays are members *.npy of plain tars"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    overrides: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "tiny", f"data.shards={shards}", f"run.out={tmp_path / 'r'}", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
