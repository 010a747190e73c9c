"""Autoencoders that know their images' class: how it gets in, what it is worth, runs, export, what cannot be had."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codec import facts, images
from codec.cli import main as codec_main
from codec.conditional_kl import ConditionalKLModel
from codec.errors import ModelError, UsageError
from codec.latent_model import latent_model, load_conditional, load_latent_model
from codec.pixels import to_float, to_uint8
from codec.shards import SampleRef, read_index
from eval.cli import main as eval_main
from tests.train.conftest import tiny_trainer
from train.averaging import averaged
from train.checkpoint import Checkpoints, load
from train.cli import main
from train.config import DataConfig, ModelConfig
from train.crops import centre_cover, cover_crop
from train.cvae.classes import classes_of
from train.cvae.measure import HeldClasses, sentence
from train.data import SampleSequence, batches, split, whole_images
from train.export import load_discriminator_state
from train.module import AutoencoderModule, Draws
from train.networks import build_network
from train.recipe import load_recipe

COLOURS = {"blue": (0.2, 0.3, 0.9), "green": (0.2, 0.8, 0.3), "red": (0.9, 0.2, 0.2)}
CLASSES = tuple(COLOURS)
# Few latents under a dear KL: what the class says, they do not say once more.
CVAE = [
    "model.condition=class", "model.condition_dropout=0.1", "model.block_out_channels=[8,16,16]",
    "model.latent_channels=2", "data.crop=32", "data.whole=true", "data.validation_crop=32", "data.n_validation=6",
    "kl.weight=0.5", "loss.perceptual=none", "export.statistics_images=6",
]  # fmt: skip


def write_pictures(folder: Path, n: int = 10) -> Path:
    """Write n pictures of each class: noise of its colour, 36 x 44 pixels; their brightness is no class's."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(n):
            light = 0.6 + 0.4 * rng.random((9, 11, 1))
            small = Image.fromarray((255 * light * np.array(colour)).astype(np.uint8))
            pixels = np.asarray(small.resize((44, 36), Image.Resampling.BILINEAR))
            (folder / name / f"{number}.png").write_bytes(images.save_png(pixels))
    return folder


@pytest.fixture(scope="module")
def classed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three classes; do not change them."""
    folder = tmp_path_factory.mktemp("classed")
    assert main(["shards", str(write_pictures(folder / "pictures")), "-o", str(folder / "shards"), "--jobs", "1"]) == 0
    return folder / "shards"


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    return ["run", "tiny", f"data.shards={shards}", f"run.out={out}", *CVAE, *more]


@pytest.fixture(scope="module")
def run(classed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned what the class says, ended and exported; do not change it."""
    out = tmp_path_factory.mktemp("cvae") / "r"
    settings = ["run.n_images=640", "run.validate_every=640", "run.checkpoint_every=640", "optim.batch_size=8"]
    settings += ["optim.lr=4e-3", "optim.ema_decay=0.9", "adversarial.weight=0.05", "adversarial.channels=8"]
    assert main(arguments(classed, out, *settings, "adversarial.start=80%", "adversarial.layers=1")) == 0
    return out


def log(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def model_of(**settings: Any) -> ConditionalKLModel:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 2}
    config = ModelConfig(condition="class", init="diffusers", **shape, **settings)
    model = latent_model(build_network(config, classes=CLASSES))
    assert isinstance(model, ConditionalKLModel)
    return model


def picture(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [True, False])
def test_the_condition_reaches_every_block_of_both_parts(attention: bool) -> None:
    model = model_of(mid_block_add_attention=attention)
    network: Any = model.network
    told = model.under(["red", "blue"])
    z = told.encode(picture())
    for part, loss in ((network.encoder, z.mean.square().sum()), (network.decoder, told.decode(z.mean.detach()).sum())):
        gates = [p for name, p in part.named_parameters() if "time_emb_proj" in name]
        gradients = torch.autograd.grad(loss, [network.condition.table, *gates])
        blocks = [name for name, _ in part.named_modules() if name.endswith("conv2")]
        assert len(gates) == 2 * len(blocks) > 0  # weight and bias of each
        assert all(bool(gradient.any()) for gradient in gradients)
        assert gradients[0].any(dim=1).tolist() == [True, False, True, False]  # of the classes told, and of none


def test_another_class_gives_other_latents_and_another_image_and_hiding_hides_it_in_both() -> None:
    model, x = model_of(), picture()
    module = AutoencoderModule(model.network)
    with torch.no_grad():
        z = {name: model.under(name).encode(x).mean for name in CLASSES}
        x_hat = {name: model.under(name).decode(z["red"]) for name in CLASSES}
        for found in (z, x_hat):
            assert float((found["red"] - found["blue"]).abs().max()) > 1e-3
            assert float((found["green"] - found["blue"]).abs().max()) > 1e-3
        hidden = module(x, Draws(labels=torch.tensor([-1, 2])))
        assert torch.allclose(hidden.mean[0], model.encode(x).mean[0], atol=1e-6)
        assert torch.allclose(hidden.x_hat[0], model.decode(model.encode(x).mean)[0], atol=1e-6)
        assert torch.allclose(hidden.mean[1], z["red"][1], atol=1e-6)
        assert torch.allclose(hidden.x_hat[1], x_hat["red"][1], atol=1e-6)
        mixed = model.under([None, "red"])
        assert torch.equal(mixed.encode(x).mean, hidden.mean)
        assert torch.equal(model.under(["red", 0]).encode(x).mean[1], model.under([2, "blue"]).encode(x).mean[1])


def test_draws_are_of_the_prior_and_belong_to_their_numbers() -> None:
    model = model_of()
    z = model.draw(64, seed=3)
    assert z.shape == (64, 2, 16, 16)
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.std()) - 1) < 0.02
    assert torch.equal(model.draw(2, seed=3, numbers=[5, 0])[0], z[5])
    assert not torch.equal(model.draw(2, seed=4)[0], z[0])
    assert model.draw(1, size=(8, 12)).shape == (1, 2, 4, 6)
    with pytest.raises(ValueError, match="size 9 x 8, expected multiples of f = 2"):
        model.draw(1, size=(9, 8))


def test_an_unknown_class_is_one_clear_error() -> None:
    model = model_of()
    for c in ("hat", ["red", "hat"], 3, -1):
        with pytest.raises(UsageError, match=r"no class (hat|3|-1) among blue, green, red"):
            model.under(c)
    with pytest.raises(ValueError, match="2 conditions, expected 1 or one for each of 3"):
        model.under(["red", "blue"]).encode(picture(3))


# --- classes out of shards ------------------------------------------------------------------------------------------


def test_batches_have_the_labels_of_their_samples(classed: Path) -> None:
    refs = read_index(classed)
    trainer_data = {ref.key: CLASSES.index(str(ref.label)) for ref in refs}
    sequence = SampleSequence(refs, DataConfig(crop=32, whole=True), 0, classes=CLASSES)
    batch = next(iter(batches(sequence, 12, 0)))
    assert batch["label"].tolist() == [trainer_data[key] for key in batch["key"]]
    assert len(set(batch["label"].tolist())) == 3
    means = batch["image"].mean((2, 3)).argmax(1).tolist()  # the colour is the class's: blue is the third channel
    assert means == [{0: 2, 1: 1, 2: 0}[label] for label in batch["label"].tolist()]
    plain = next(iter(batches(SampleSequence(refs, DataConfig(crop=32), 0), 2, 0)))
    assert "label" not in plain


def test_classes_have_one_order_and_missing_ones_are_one_clear_error(classed: Path) -> None:
    refs = read_index(classed)
    assert classes_of(refs[::-1], refs[:2]) == CLASSES
    bare = SampleRef(**{**vars(refs[0]), "label": None})
    with pytest.raises(UsageError, match=r"1 of 31 images have no class .*; first: .*\.png"):
        classes_of([*refs, bare], [])
    blue, others = ([ref for ref in refs if (ref.label == "blue") == wanted] for wanted in (True, False))
    with pytest.raises(UsageError, match="all images of class blue are held out"):
        classes_of(others, blue)


def test_each_held_out_image_is_given_the_class_of_another_one(classed: Path) -> None:
    _, held_out = split(read_index(classed), 8)
    found = HeldClasses.of(CLASSES, held_out, 0)
    assert all(found.other[ref.name] != ref.label for ref in held_out)
    assert found == HeldClasses.of(CLASSES, held_out, 0) != HeldClasses.of(CLASSES, held_out, 1)
    assert [ref.label for ref in held_out] == sorted(str(ref.label) for ref in held_out)
    mixed = [ref.label for ref in found.mixed(held_out)]
    assert mixed != sorted(mixed, key=str)
    same = [ref for ref in held_out if ref.label == held_out[0].label]
    assert not HeldClasses.of(CLASSES, same, 0).other
    assert "not measured" in sentence({"psnr": 20.0, "without_psnr": 19.0})


# --- runs through the command ---------------------------------------------------------------------------------------


def test_a_run_says_what_the_class_is_worth_and_it_is_worth_something(run: Path, classed: Path) -> None:
    validation = log(run, "validation")[-1]
    gain = validation["psnr"] - validation["other_psnr"]
    assert gain > 1
    assert validation["without_psnr"] < validation["psnr"]
    shown = np.asarray(Image.open(sorted((run / "validation").glob("*.png"))[-1]))
    assert shown.shape == (32 * (2 + 3), (32 + 4) * (6 + 4), 3)
    drawn = shown[64:, 6 * 36 :].reshape(3, 32, 4, 36, 3)[:, :, :, :32].mean((1, 2, 3))  # of the prior, by class
    assert drawn.argmax(axis=0).tolist() == [2, 1, 0]  # red, green and blue are most where they are the class's


def test_the_folder_loads_again_and_gives_what_was_trained(run: Path, classed: Path) -> None:
    _, state = Checkpoints(run / "checkpoints", 1).newest()
    model = load_conditional(run)
    assert model.classes == CLASSES
    trained = averaged(AutoencoderModule(load_conditional(run / "model").network), 0.9)
    trained.load_state_dict(state["ema"])
    ours = latent_model(trained.module.network)
    assert isinstance(ours, ConditionalKLModel)
    _, held_out = split(read_index(classed), 6)
    x = torch.stack([to_float(image) for _, image in whole_images(held_out, 32, 4)])
    c = [ref.label for ref in held_out]
    with torch.inference_mode():
        z = model.under(c).encode(x).mean
        assert torch.equal(z, ours.under(c).encode(x).mean)
        assert torch.equal(model.under(c).decode(z), ours.under(c).decode(z))
        edited = to_uint8(model.under("green").decode(model.under("red").encode(x[:1]).mean)[0])
    assert edited.mean((0, 1)).argmax() == 1
    known, card = facts.read(run / "model"), (run / "model" / "README.md").read_text()
    assert json.loads((run / "model" / "config.json").read_text())["classes"] == list(CLASSES)
    assert known["classes"] == list(CLASSES)
    assert 0.5 < known["statistics"]["sampled_std"] < 1.5
    assert "classes, in the order of their labels: blue, green, red" in card
    assert "condition used: +" in card
    assert "| diffusers; ComfyUI; AUTOMATIC1111, Forge | no |" in card
    assert load_discriminator_state(run / "model") is not None


RESUMED = ["run.n_images=16", "run.checkpoint_every=8", "run.keep_last=9", "data.n_validation=2"]


@pytest.mark.slow
def test_a_resumed_run_ends_where_it_would_have_and_notices_other_classes(
    classed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.autoencoder.export_conditional", lambda *_, **__: {})  # others look at it
    assert main(arguments(classed, tmp_path / "whole", *RESUMED)) == 0
    point = tmp_path / "whole" / "checkpoints" / "images-000000008.pt"
    assert main(arguments(classed, tmp_path / "again", *RESUMED, f"run.resume={point}")) == 0
    end, again = (load(tmp_path / name / "checkpoints" / "images-000000016.pt") for name in ("whole", "again"))
    for part in ("module", "ema"):
        for name, tensor in end[part].items():
            assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(again[part][name])), f"{part} {name}"
    pictures = write_pictures(tmp_path / "pictures", n=2)
    (pictures / "red").rename(pictures / "orange")
    assert main(["shards", str(pictures), "-o", str(tmp_path / "renamed"), "--jobs", "1"]) == 0
    capsys.readouterr()
    assert main(arguments(tmp_path / "renamed", tmp_path / "other", *RESUMED, f"run.resume={point}")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "other classes than the run had: blue, green, red -> blue, green, orange; the run cannot go on" in line


def test_the_class_is_hidden_as_often_as_asked_whatever_the_batches(classed: Path, tmp_path: Path) -> None:
    told = []
    for size in (6, 12):
        trainer = tiny_trainer(classed, tmp_path / str(size), *CVAE, "model.condition_dropout=0.5")
        batch = next(iter(batches(SampleSequence(read_index(classed), DataConfig(), 0, classes=CLASSES), 12, 0)))
        labels, x, found = batch["label"], batch["image"], []
        for start in range(0, 12, size):
            where = replace(trainer._where(0), positions=range(start, start + size))
            some = slice(start, start + size)
            drawn = trainer.task._draw(x[some], labels[some], where).labels
            assert drawn is not None
            assert all(a in (-1, b) for a, b in zip(drawn.tolist(), labels[some].tolist(), strict=True))
            found += drawn.tolist()
        told.append(found)
    assert told[0] == told[1]
    assert 2 <= told[0].count(-1) <= 10


# --- what cannot be had ---------------------------------------------------------------------------------------------


def test_what_has_no_place_for_a_class_is_refused_in_one_line(
    run: Path, classed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(run / "model"), str(tmp_path / "out")
    pictures = str(write_pictures(tmp_path / "pictures", n=1))
    own = "a ConditionalAutoencoderKL: its latents mean something only under a class"
    student = ["model.family=tiny", "model.block_out_channels=[8,8,8]", "kl.weight=0", f"model.teacher={model}"]
    new = [f"data.shards={classed}", f"run.out={out}"]
    for command, given, code, words in (
        (codec_main, ["encode", pictures, "-o", out, "-m", model], 3, own),
        (main, ["cache", str(classed), "-m", model, "-o", out, "--size", "32"], 3, own),
        (main, ["run", "tiny", *new, f"model.init_from={model}"], 3, own),
        (main, ["run", "tiny", *new, *student], 3, own),
        (main, ["drift", model, model, "--images", pictures], 3, own),
        (main, ["export", model, "-o", out, "--onnx"], 3, "ONNX: a ConditionalAutoencoderKL; only AutoencoderKL and"),
        (main, ["export", model, "-o", out, "--single-file"], 3, "no single file: a ConditionalAutoencoderKL"),
        (main, ["export", model, "-o", out, "--preview", pictures], 2, "--preview: a ConditionalAutoencoderKL"),
        (main, ["bench", "tiny", *new, *CVAE], 2, "model.condition = class: the loop that it is measured beside"),
        (eval_main, ["recon", model, "--data", pictures, "-o", out], 3, own),
        (eval_main, ["latents", model, "--data", pictures, "-o", out], 3, own),
        (eval_main, ["rd", pictures, "-m", model, "-o", out], 3, own),
    ):
        capsys.readouterr()
        assert command(given) == code, given
        lines = capsys.readouterr().err.strip().splitlines()
        assert words in lines[-1], given
        assert "Traceback" not in "".join(lines)
    with pytest.raises(ModelError, match=own):
        load_latent_model(run / "model")
    assert "Traceback" not in capsys.readouterr().err


def test_an_image_without_a_class_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_pictures(tmp_path / "pictures", n=3)
    (pictures / "red" / "0.png").rename(pictures / "0.png")
    assert main(["shards", str(pictures), "-o", str(tmp_path / "shards"), "--jobs", "1"]) == 0
    capsys.readouterr()
    assert main(arguments(tmp_path / "shards", tmp_path / "r")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.condition = class: 1 of 9 images have no class" in line
    assert "0.png" in line


@pytest.mark.parametrize(
    "override",
    ["model.family=tiny", "data.mode=streaming", "rate.probability=0.5", "run.gradient_checkpointing=true",
     "model.init_from=x", "latents.anchor_weight=1", "export.formats=[\"onnx\"]", "model.condition_dropout=0"],
)  # fmt: skip
def test_what_a_recipe_cannot_have_with_a_condition_is_named(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["model.block_out_channels=[8,8]", "kl.weight=0"] if "tiny" in override else []
    whole = ["data.whole=false"] if "streaming" in override else []
    assert main([*arguments(tmp_path, tmp_path / "r", *more, *whole, override), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert override.split("=")[0] in line


def test_a_whole_image_is_resized_alike_in_training_and_validation(classed: Path) -> None:
    refs = read_index(classed)[:4]
    for _, image in whole_images(refs, 32, 4, cover=32):
        assert image.shape == (32, 32, 3)
    square = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert np.array_equal(centre_cover(square, 64), square)
    rng = np.random.default_rng(1)
    assert np.array_equal(centre_cover(square, 32), cover_crop(Image.fromarray(square), 32, 32, rng))  # nothing over
    for bad in ("data.mode=streaming", "data.aspect_buckets=3", "data.crops=[32,64]", "data.random_resize=2"):
        with pytest.raises(UsageError, match=r"data\.whole"):
            load_recipe("tiny", ["data.whole=true", bad])


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_keep_bit_equal_parameters_and_measure_each_image_once(classed: Path, tmp_path: Path) -> None:
    """`train.checkpoint` digests every tensor of each rank."""
    settings = ["run.n_images=24", "optim.batch_size=2", "run.checkpoint_every=8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "train"]
    out = tmp_path / "r"
    done = subprocess.run(
        [*launcher, *arguments(classed, out, *settings)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert all(len(set(line["parameters"])) == 1 and len(line["parameters"]) == 2 for line in log(out, "checkpoint"))
    assert log(out, "validation")[-1]["n_validated"] == 6
    assert main(arguments(classed, tmp_path / "one", *settings, "optim.batch_size=4")) == 0
    two, one = (log(folder, "validation")[-1] for folder in (out, tmp_path / "one"))
    for name in ("psnr", "other_psnr", "without_psnr"):  # each image has the same other class
        assert two[name] == pytest.approx(one[name], abs=0.05)
