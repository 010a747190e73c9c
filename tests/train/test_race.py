"""`codec-train race` through the command: equal conditions, files, what is kept, what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from codec import images
from tests.conftest import make_model, photo
from train.cli import main
from train.denoiser_feed import LatentFeed
from train.race.data import load_pictures

# 16 tokens of 8 pixels, 6 steps of 8 images: seconds for the whole race.
SMALL = ["--size", "32", "--stride", "8", "--images", "48", "--batch", "8", "--width", "32", "--depth", "1"]
SMALL += ["--steps", "2", "--n-held-out", "14", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy small photographs of two classes: one bright at the top, the other at the bottom."""
    folder = tmp_path_factory.mktemp("data") / "clothes"
    for n in range(70):
        picture = photo(36, 40, seed=n)[:: 1 if n % 2 else -1]
        path = folder / ("hat" if n % 2 else "shoe") / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(np.ascontiguousarray(picture)))
    return folder


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model, the same model under another name, and one of other weights and more channels."""
    folder = tmp_path_factory.mktemp("vaes")
    first = make_model(folder / "first")
    shutil.copytree(first, folder / "twin")
    told = json.loads((folder / "twin" / "codec.json").read_text())
    (folder / "twin" / "codec.json").write_text(json.dumps(told | {"name": "twin"}))
    return [first, folder / "twin", make_model(folder / "other", seed=1, channels=6)]


def command(vaes: list[Path], data: Path, out: Path, *more: str) -> list[str]:
    return ["race", *map(str, vaes), "--data", str(data), "-o", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def raced(clothes: Path, vaes: list[Path], backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished race of all three."""
    out = tmp_path_factory.mktemp("race") / "r"
    assert main(command(vaes, clothes, out, "--features", str(backbone))) == 0
    return out


def entrants(out: Path) -> dict[str, dict[str, Any]]:
    return {entrant["name"]: entrant for entrant in json.loads((out / "race.json").read_text())["entrants"]}


def test_the_same_autoencoder_under_two_names_gets_the_same_numbers_to_the_bit(raced: Path) -> None:
    found = entrants(raced)
    assert list(found) == ["first", "twin", "other"]
    first, twin, other = (found[name] for name in found)
    for key in ("loss", "curve", "scores", "latents"):
        assert first[key] == twin[key] != other[key], key
    assert (raced / "first" / "samples.png").read_bytes() == (raced / "twin" / "samples.png").read_bytes()


def test_all_have_equal_tokens_and_blocks_whatever_their_channels(raced: Path) -> None:
    found = entrants(raced)
    blocks = {e["denoiser"]["n_parameters"] - e["denoiser"]["n_parameters_of_projections"] for e in found.values()}
    assert len(blocks) == 1
    assert found["other"]["denoiser"]["n_parameters"] > found["first"]["denoiser"]["n_parameters"]
    assert {e["denoiser"]["patch"] for e in found.values()} == {4}
    settings = json.loads((raced / "race.json").read_text())["settings"]
    assert (settings["n_tokens"], settings["n_images"], settings["data"]["n_held_out"]) == (16, 48, 14)


def test_the_result_says_what_may_be_compared_and_how_far_numbers_reach(
    raced: Path, vaes: list[Path], clothes: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(vaes, clothes, raced, "--features", str(backbone))) == 0  # all finished: prints them again
    shown = capsys.readouterr()
    rows = [line for line in shown.out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["first", "twin", "other", "other real images"]
    assert len({row.count("|") for row in rows}) == 1
    assert shown.err.count("finished before") == 3
    assert "first minus twin: unexplained 0.0000 ± 0.0000 (within chance)" in shown.out
    assert "not over training runs" in shown.out
    assert "With 14 images of 512 features FID is biased upwards" in shown.out
    result = json.loads((raced / "race.json").read_text())
    assert {"kind", "command", "versions", "hardware", "settings_hash", "comparable", "meanings"} <= set(result)
    for score in (result["control"], entrants(raced)["other"]["scores"]["samples"]):
        assert set(score) == {"fid", "kid", "precision", "recall"}
        assert all(low <= value["value"] <= high for value in score.values() for low, high in [value["interval"]])
    bins = entrants(raced)["other"]["loss"]["bins"]
    assert [part["t"] for part in bins] == [[n / 10, (n + 1) / 10] for n in range(10)]
    with Image.open(raced / "curves.png") as picture:
        assert picture.width > 600


def test_a_later_model_joins_what_is_finished_is_not_run_again_and_scaling_does_not_decide(
    clothes: Path, vaes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scaled = tmp_path / "r", tmp_path / "scaled"
    shutil.copytree(vaes[0], scaled)
    for name, changes in (("codec.json", {"name": "scaled"}), ("config.json", {"scaling_factor": 3.0})):
        (scaled / name).write_text(json.dumps(json.loads((scaled / name).read_text()) | changes))
    assert main(command(vaes[:1], clothes, out)) == 0
    assert "n/a" in capsys.readouterr().out  # no features here
    log = (out / "first" / "run" / "log.jsonl").read_bytes()
    assert main(command([vaes[0], scaled], clothes, out)) == 0
    assert "nothing says how good the samples are" in capsys.readouterr().out
    assert (out / "first" / "run" / "log.jsonl").read_bytes() == log
    first, other = entrants(out).values()
    assert (first["scores"], other["scores"]) == (None, None)
    assert np.array(other["latents"]["std"]) == pytest.approx(3 * np.array(first["latents"]["std"]), rel=1e-4)
    assert other["loss"]["loss"] == pytest.approx(first["loss"]["loss"], rel=1e-3)
    a, b = (np.asarray(Image.open(out / name / "samples.png")).astype(float) for name in ("first", "scaled"))
    assert np.abs(a - b).mean() < 1  # drawn, scaled back and decoded alike


def test_other_settings_or_another_model_in_the_same_folder_are_refused(
    clothes: Path, vaes: list[Path], raced: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (raced / "race.json").read_bytes()
    assert main(command(vaes, clothes, raced, "--features", str(backbone), "--seed", "7")) == 2
    assert re.search(r"holds another race \(seed: 0 against 7\)", capsys.readouterr().err)
    impostor = make_model(tmp_path / "first", seed=5)
    assert main(command([impostor], clothes, raced, "--features", str(backbone))) == 2
    assert "of another first, see" in capsys.readouterr().err
    assert (raced / "race.json").read_bytes() == before


@pytest.mark.slow  # each part of a race is resumed by the loop, which is tested with it
def test_an_interrupted_race_goes_on_and_ends_where_an_uninterrupted_one_does(
    clothes: Path, vaes: list[Path], raced: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, batch, count = tmp_path / "r", LatentFeed._batch, [0]

    def interrupted(self: LatentFeed, positions: range) -> dict[str, Any]:
        count[0] += 1
        if count[0] == 10:  # in the fourth step of the second entrant
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, positions)

    asked = command([vaes[0], vaes[2]], clothes, out, "--features", str(backbone))
    with monkeypatch.context() as patch:
        patch.setattr(LatentFeed, "_batch", interrupted)
        assert main(asked) == 130
    assert list(entrants(out)) == ["first"]  # a whole result of what was done
    assert not (out / "other" / "result.json").exists()
    assert main(asked) == 0
    weights = "run/model/diffusion_pytorch_model.safetensors"
    a, b = (load_file(folder / "other" / weights) for folder in (out, raced))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for key in ("loss", "scores", "curve"):
        assert entrants(out)["other"][key] == entrants(raced)["other"][key]


def test_bad_images_are_listed_and_the_rest_is_raced(
    clothes: Path, vaes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(clothes, data)
    (data / "hat" / "cut.png").write_bytes((data / "hat" / "01.png").read_bytes()[:200])
    (data / "hat" / "small.png").write_bytes(images.save_png(photo(20, 40)))
    out = tmp_path / "r"
    assert main(command(vaes[:1], data, out)) == 1
    shown = capsys.readouterr().err
    assert re.search(r"error: hat/cut.png: (truncated|damaged)", shown)
    assert "error: hat/small.png: 40 x 20 pixels, smaller than the 32" in shown
    assert len(json.loads((out / "race.json").read_text())["failed"]) == 2


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--stride", "3"], 2, "f 2 does not divide the tokens' stride of 3"),
        (["--size", "36"], 2, "--size 36: expected a multiple of the tokens' stride, 8"),
        (["--minutes", "1"], 2, "--minutes stands for a number of --images"),
        (["--width", "40"], 2, "--width = 40, allowed: multiples of 32"),
        (["--normalize", "both"], 2, "--normalize = 'both', allowed: model or channels"),
        (["--features", "no/such/file.pth"], 2, "not found in no/such/file.pth"),
        (["--held-out", "no/such/folder"], 2, "no/such/folder: no such file or folder"),
        (["--size", "40"], 2, "0 images to learn from"),
        (["--device", "tpu"], 2, "--device tpu: expected auto or cpu"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_work(
    clothes: Path,
    vaes: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    assert main(command(vaes[:1], clothes, tmp_path / "r", *more)) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")][-1:]
    assert message in line
    assert not (tmp_path / "r" / "first").exists()


def test_a_missing_model_is_exit_3(clothes: Path, tmp_path: Path) -> None:
    assert main(command([tmp_path / "none"], clothes, tmp_path / "r")) == 3


def test_shards_and_folders_give_the_same_pictures(clothes: Path, tmp_path: Path) -> None:
    assert main(["shards", str(clothes), "-o", str(tmp_path / "shards"), "--jobs", "1"]) == 0
    a, b = (load_pictures(data, None, size=32, n_held_out=14) for data in (clothes, tmp_path / "shards"))
    assert a.classes == b.classes == ["hat", "shoe"]
    for mine, theirs in ((a.training, b.training), (a.held_out, b.held_out)):
        assert {p.sha256: p.label for p in mine} == {p.sha256: p.label for p in theirs}
        by_hash = {p.sha256: p.pixels for p in theirs}
        assert all(np.array_equal(p.pixels, by_hash[p.sha256]) for p in mine)
    assert len(a.held_out) == 14
    chosen = a.control(20)  # of the classes of the held-out ones, none twice
    assert a.labels([a.training[n] for n in chosen]) == [*a.labels(a.held_out), *a.labels(a.held_out)[:6]]
    assert len(set(chosen)) == 20


def test_copies_of_an_image_stay_on_one_side(clothes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clothes, data / "a")
    shutil.copytree(clothes, data / "b")
    found = load_pictures(data, None, size=32, n_held_out=10)
    held_out = {p.sha256 for p in found.held_out}
    assert not held_out & {p.sha256 for p in found.training}
    shutil.rmtree(data / "b" / "shoe")
    given = load_pictures(data / "a", data / "b", size=32, n_held_out=10)
    assert len(given.held_out) == 10
    assert {p.label for p in given.held_out} == {"hat"}
    assert not {p.sha256 for p in given.held_out} & {p.sha256 for p in given.training}


def test_minutes_become_a_number_of_images_that_a_resumed_race_keeps(
    clothes: Path, vaes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.race.run.LEAST_STEPS", 4)
    asked = ["race", str(vaes[0]), "--data", str(clothes), "-o", str(tmp_path / "r"), *SMALL, "--minutes", "0.01"]
    asked = [part for n, part in enumerate(asked) if part != "--images" and asked[n - 1] != "--images"]
    assert main(asked) == 0
    n_images = json.loads((tmp_path / "r" / "race.json").read_text())["settings"]["n_images"]
    assert n_images >= 32
    assert n_images % 8 == 0
    monkeypatch.setattr("train.race.run.images_in", lambda *_: n_images + 8)  # another load of the machine
    assert main(asked) == 0


def test_help_does_not_import_torch() -> None:
    script = "import sys; from train.cli import main; main(['race', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--minutes" in done.stdout


@pytest.mark.slow
def test_two_processes_match_one(clothes: Path, vaes: list[Path], raced: Path, backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "train"]
    done = subprocess.run(
        [*launcher, *command(vaes[:1], clothes, out, "--features", str(backbone))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    one, two = entrants(raced)["first"], entrants(out)["first"]
    assert two["loss"]["loss"] == pytest.approx(one["loss"]["loss"], rel=1e-3)
    assert two["scores"]["ceiling"]["fid"]["value"] == pytest.approx(one["scores"]["ceiling"]["fid"]["value"], rel=1e-6)
    assert two["scores"]["samples"]["fid"]["value"] == pytest.approx(one["scores"]["samples"]["fid"]["value"], rel=0.05)
    assert json.loads((out / "settings.json").read_text()) == json.loads((raced / "settings.json").read_text())
