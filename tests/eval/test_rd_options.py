"""`codec-eval rd`: the control, protocols, small images, stored curves, the posterior's rate, many ranks."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codec import images
from codec.errors import UsageError
from eval import baselines, control
from eval.cli import main
from eval.metrics import psnr
from eval.protocol import get
from tests.conftest import photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs of 192 x 176."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        (folder / name).write_bytes(images.save_png(photo(176, 192, seed=seed)))
    return folder


def run(source: Path, out: Path, *options: str, code: int = 0) -> dict[str, Any]:
    assert main(["rd", str(source), *options, "-o", str(out)]) == code
    result: dict[str, Any] = json.loads((out / "rd.json").read_text())
    return result


def test_the_identity_control_stops_a_run_that_cannot_be_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = images.save_png
    monkeypatch.setattr(images, "save_png", lambda image, **options: save(image ^ 1, **options))
    options = ["--baselines", "jpeg", "--metrics", "psnr"]
    assert main(["rd", str(folder), *options, "-o", str(tmp_path / "out")]) == 2
    assert "identity control failed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "rd.json").exists()


def test_the_control_knows_what_perfect_is() -> None:
    perfect = {"psnr": [math.inf], "ssim": [1.0], "ms_ssim": [None], "ssimulacra2": [100.0], "flip": [0.0]}
    assert control.check(perfect)["measured"] == {"psnr": "infinite", "ssim": 1, "ssimulacra2": 100, "flip": 0}
    for key, value in (("psnr", 90.0), ("ssim", 0.999), ("ssimulacra2", 99.0), ("dists", 0.01), ("flip", math.nan)):
        with pytest.raises(UsageError, match=key):
            control.check({**perfect, key: [value]})


def test_small_images_lack_a_metric_and_it_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "small.png").write_bytes(images.save_png(photo(40, 150)))  # mixed sizes
    options = ["--baselines", "jpeg", "--baseline-qualities", "jpeg=10,30", "--metrics", "psnr,ms-ssim"]
    jpeg = run(folder, tmp_path / "out", *options)["codecs"][0]
    assert [point["quality"] for point in jpeg["points"]] == [10, 30]
    assert [row["ms_ssim"] is None for row in jpeg["rows"]] == [False] * 4 + [True] * 2
    assert jpeg["points"][0]["ms_ssim"] == pytest.approx((jpeg["rows"][0]["ms_ssim"] + jpeg["rows"][2]["ms_ssim"]) / 2)
    assert "MS-SSIM: not defined for 1 of 3 images, which have a side below 161" in capsys.readouterr().err


def test_the_protocol_crops_what_is_measured_and_shown(folder: Path, tmp_path: Path) -> None:
    options = ["--protocol", "folder-64", "--baselines", "jpeg", "--metrics", "psnr"]
    row = run(folder, tmp_path, *options)["codecs"][0]["rows"][0]
    x = get("folder-64").prepare(np.asarray(Image.open(folder / "a.png")))
    (jpeg,) = baselines.get(["jpeg"])
    data = jpeg.encode(x, 5)
    assert (row["height"], row["width"], row["bpp"]) == (64, 64, 8 * len(data) / 64**2)
    assert row["psnr"] == psnr(x, jpeg.decode(data))
    with Image.open(tmp_path / "comparison.png") as picture:
        shown = np.asarray(picture)[44 : 44 + 64, 8 : 8 + 64]
    assert np.array_equal(shown, x)


def test_a_stored_curve_stands_beside_what_is_measured(folder: Path, tmp_path: Path, capsys: Any) -> None:
    stored = {"name": "jpeg", "results": {"bpp": [0.2, 0.4, 0.8], "psnr-rgb": [20, 30, 40]}}
    (tmp_path / "stored.json").write_text(json.dumps(stored))
    options = ["--baselines", "jpeg", "--metrics", "psnr", "--curves", str(tmp_path / "stored.json")]
    result = run(folder, tmp_path / "out", *options)
    _, read = result["codecs"]
    assert (read["name"], read["kind"], read["rows"]) == ("jpeg (file)", "file", [])
    assert [point["psnr"] for point in read["points"]] == [20, 30, 40]
    assert {row["codec"] for row in result["comparisons"]["metrics"]["psnr"]["bd"]} == {"jpeg", "jpeg (file)"}
    assert [path.name for path in (tmp_path / "out" / "compressai").iterdir()] == ["jpeg.json"]
    assert "jpeg (file)" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width == 8 + 2 * 264  # pictures are of what was measured


def test_the_information_in_the_posterior_stands_beside_the_rate(model_dir: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    (tmp_path / "a").mkdir()
    x = photo(39, 52)  # odd: the network sees 40 x 52
    (tmp_path / "a" / "x.png").write_bytes(images.save_png(x))
    options = ["--baselines", "", "-q", "20,80", "--dtype", "float32", "--metrics", "psnr"]
    codec = run(tmp_path / "a", tmp_path / "out", "-m", str(model_dir), *options)["codecs"][0]
    padded = np.pad(x, ((0, 1), (0, 0), (0, 0)), mode="edge")
    pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        nats = float(AutoencoderKL.from_pretrained(model_dir).encode(pixels).latent_dist.kl())
    assert codec["ceiling"]["kl_nats"] == pytest.approx(nats, rel=1e-4)
    assert codec["ceiling"]["kl_bpp"] == pytest.approx(nats / math.log(2) / (39 * 52), rel=1e-4)
    assert codec["points"][0]["bpp"] < codec["points"][1]["bpp"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(model_dir: Path, tmp_path: Path) -> None:
    for n in range(23):  # an uneven split
        path = tmp_path / "test" / f"{n:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(images.save_png(photo(24 + n, 40 - n, seed=n)))
    (tmp_path / "test" / "broken.png").write_bytes(b"broken")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.png").write_bytes(images.save_png(photo(64, 64, seed=99)))
    foreign = tmp_path / "foreign"
    shutil.copytree(model_dir, foreign, ignore=lambda *_: {"codec.json", "codec.safetensors"})
    arguments = ["rd", str(tmp_path / "test"), "-m", str(model_dir), "-m", str(foreign), "-q", "20,70"]
    arguments += ["--fit-images", str(tmp_path / "train"), "--metrics", "psnr,ssim", "--baselines", "jpeg"]
    alone, together = tmp_path / "1", tmp_path / "2"
    assert main([*arguments, "-o", str(alone)]) == 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eval"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments, "-o", str(together)], capture_output=True, text=True, timeout=500
    )
    assert done.stdout.count("identity control") == 1, done.stderr  # the first rank alone prints
    assert done.returncode == 1
    one, two = (json.loads((folder / "rd.json").read_text()) for folder in (alone, together))
    assert (one["n_ranks"], two["n_ranks"]) == (1, 2)
    assert len(one["dataset"]["names"]) == 23
    for result in (one, two):
        for key in ("command", "hardware", "n_ranks"):
            del result[key]
        for codec in result["codecs"]:
            for row in (*codec["rows"], *codec["points"]):
                del row["encode_s"], row["decode_s"]
    assert two == approximately(one)


def approximately(value: Any) -> Any:
    """The same nested value with every number to within 1e-6."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, abs=1e-6, rel=1e-6) if isinstance(value, float) else value
