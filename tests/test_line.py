"""The main job, end to end, through the commands: photographs to shards, model, files, images and a report."""

import json
from pathlib import Path

import numpy as np
import pytest

from codec import Codec, images
from codec.cli import main as codec
from eval.cli import main as codec_eval
from tests.conftest import photo
from train.cli import main as codec_train


def test_the_whole_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, held_out = tmp_path / "photos", tmp_path / "held_out"
    for n in range(8):
        path = (photos if n < 6 else held_out) / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(images.save_png(photo(80 + n, 100, seed=n)))
    shards, run, model = tmp_path / "shards", tmp_path / "run", tmp_path / "run" / "model"
    assert codec_train(["shards", str(photos), "-o", str(shards), "--jobs", "1"]) == 0
    assert codec_train(["run", "tiny", f"data.shards={shards}", f"run.out={run}", "run.n_images=16"]) == 0
    assert codec(["encode", str(held_out), "-o", str(tmp_path / "coded"), "-m", str(model), "-q", "80"]) == 0
    assert codec(["decode", str(tmp_path / "coded"), "-o", str(tmp_path / "decoded"), "-m", str(model)]) == 0
    for path in sorted(held_out.iterdir()):
        decoded = images.load(tmp_path / "decoded" / f"{path.name}.png")
        assert decoded.shape == images.load(path).shape
    capsys.readouterr()
    arguments = [
        "rd",
        str(held_out),
        "-m",
        str(model),
        "--baselines",
        "jpeg",
        "-q",
        "20,80",
        "-o",
        str(tmp_path / "rd"),
    ]
    assert codec_eval(arguments) == 0
    assert "jpeg" in capsys.readouterr().out.lower()

    result = json.loads((tmp_path / "rd" / "rd.json").read_text())
    ours = next(entry for entry in result["codecs"] if entry["kind"] == "model")
    assert ours["description"]["stream_id"] == Codec.load(model).stream_id
    # The report's rate is that of the very files that `codec encode` wrote, and its PSNR that of the decoded images.
    point = next(point for point in ours["points"] if point["quality"] == 80)
    bpps, psnrs = [], []
    for path in sorted(held_out.iterdir()):
        original = images.load(path)
        decoded = images.load(tmp_path / "decoded" / f"{path.name}.png")
        size_bytes = (tmp_path / "coded" / f"{path.name}.lcx").stat().st_size
        bpps.append(8 * size_bytes / (original.shape[0] * original.shape[1]))
        psnrs.append(10 * np.log10(255**2 / ((original.astype(float) - decoded) ** 2).mean()))
    assert point["bpp"] == pytest.approx(np.mean(bpps))
    assert point["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-4)
    assert ours["ceiling"]["psnr"] > 0
    assert (tmp_path / "rd" / "comparison.png").stat().st_size > 0
