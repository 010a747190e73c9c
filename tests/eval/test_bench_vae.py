"""`codec-eval bench`: what is compared with what, and what the command writes. Speeds are not tested."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from codec import fast
from eval.bench import VaeBench, psnr_db, run_vae, smooth_image
from eval.cli import main


def test_the_command_measures_a_model(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "bench.json", torch.get_num_threads()
    options = ["--size", "32", "--batch", "2", "--dtypes", "float32,bfloat16", "--repeats", "3", "--threads", "2"]
    assert main(["bench", "-m", str(model_dir), *options, "-o", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["command"].startswith(f"codec-eval bench --what=vae -m={model_dir} --size=32 --batch=2")
    assert result["hardware"]["threads"] == 2
    assert torch.get_num_threads() == threads
    assert {"versions", "commit", "settings"} < set(result)
    rows = result["rows"]
    sides = [("diffusers", "float32"), ("diffusers", "bfloat16"), ("diffusers, channels last", "bfloat16")]
    sides += [("ours", "float32"), ("ours", "bfloat16")]
    assert [(row["operation"], row["side"], row["dtype"]) for row in rows] == [
        (operation, *side) for operation in ("encode", "decode") for side in sides
    ]
    for row in rows:
        assert row["network"] == model_dir.name
        assert len(row["times_s"]) == 3
        assert row["median_s"] == sorted(row["times_s"])[1]
    for plain, _, _, exact, reduced in (rows[:5], rows[5:]):
        assert (plain["speedup"], plain["psnr_db"], plain["max_difference"]) == (1, None, None)
        assert exact["speedup"] == plain["median_s"] / exact["median_s"]
        assert 0 <= exact["max_difference"] < 1e-4 < reduced["max_difference"]
        assert 30 < reduced["psnr_db"] < 90
    text = capsys.readouterr().out
    assert f"{model_dir.name}: encode" in text
    assert f"{rows[4]['psnr_db']:.1f}" in text
    assert str(out) in text


def test_both_families_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    made = []

    def kl(**config: Any) -> AutoencoderTiny:
        made.append(config)
        return AutoencoderTiny(**small)

    monkeypatch.setattr("eval.bench.AutoencoderKL", kl)
    monkeypatch.setattr("eval.bench.AutoencoderTiny", lambda: AutoencoderTiny(**small))
    result = run_vae(VaeBench(size=16, repeats=1))
    assert made[0]["block_out_channels"] == (128, 256, 512, 512)  # Stable Diffusion's
    assert {row["network"] for row in result["rows"]} == {"AutoencoderKL (SD)", "AutoencoderTiny"}
    best = str(fast.best_dtype("cpu")).removeprefix("torch.")
    ours = [row["dtype"] for row in result["rows"] if row["side"] == "ours"]
    assert set(ours) == {"float32", best}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--what", "gpu"], "--what: 'gpu', expected vae or coder"),
        (["--what", "coder"], "--what coder: needs a model (-m) and images"),
        (["photo.png"], "--what vae: takes no images"),
        (["--dtypes", "float64"], "--dtypes: 'float64', expected float32, bfloat16, float16"),
        (["--dtypes", "float16", "--size", "16"], "dtype torch.float16 on cpu"),
        (["--size", "17"], "--size: 17, expected a multiple of 2"),
        (["--device", "nowhere"], "device nowhere"),
        (["--what", "coder", "x.png", "-q", "1,x"], "--qualities: expected integers"),
    ],
)
def test_usage_errors(options: list[str], message: str, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if options == ["--what", "coder"] else ["-m", str(model_dir)]
    assert main(["bench", *options, *given]) == 2
    assert message in capsys.readouterr().err


def test_the_coder_through_the_command(
    model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "coder.json"
    options = ["--what", "coder", "-m", str(model_dir), "-q", "20,80", "-o", str(out)]
    assert main(["bench", str(photo_folder), *options]) == 0
    result = json.loads(out.read_text())
    assert (result["benchmark"], result["n_images"]) == ("coder", 3)
    assert [row["quality"] for row in result["rows"]] == [20, 80]
    assert {"versions", "hardware", "commit"} < set(result)
    model = f"--what=coder -m={model_dir}"
    assert result["command"] == f"codec-eval bench {photo_folder} {model} --qualities=20,80 --out={out}"
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line.split() for line in lines if line.split()[:2] == ["context", "80"]]
    assert line[2] == str(result["rows"][1]["context_bytes"])


def test_psnr_and_image() -> None:
    x = smooth_image(32)
    assert x.shape == (1, 3, 32, 32)
    assert x.abs().max() <= 1
    assert psnr_db(x, x) is None
    assert psnr_db(x, x + 0.02) == pytest.approx(40, abs=0.01)  # 2 / 0.02 = 40 dB
