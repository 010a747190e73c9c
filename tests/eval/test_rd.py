"""`codec-eval rd` from end to end on small images, with baselines alone and with a stand-in for a model."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codec.errors import ModelError
from codec.files import find
from codec.images import EXTENSIONS
from eval import baselines, pictures, plots, rd_print, report_tables
from eval.cli import main
from eval.features import SqueezeFeatures
from eval.metrics import KNOWN, Metrics, psnr
from eval.protocol import digest, get
from eval.rd import RateDistortion, run_rd


class FakeCodec:
    """The interface of codec.Codec around WebP; without quantisation it is one level off everywhere."""

    name = "fake"
    has_quality = True

    def description(self) -> dict[str, Any]:
        return {"name": self.name}

    def encode(self, image: np.ndarray, quality: int = 50) -> bytes:
        if image[0, 0].tolist() == [1, 2, 3]:
            raise ValueError("cannot encode this")
        file = io.BytesIO()
        Image.fromarray(image).save(file, "WEBP", quality=quality)
        return file.getvalue()

    def encode_many(self, image: np.ndarray, qualities: Sequence[int]) -> list[bytes]:
        return [self.encode(image, quality) for quality in qualities]

    def decode(self, data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def reconstruct(self, image: np.ndarray) -> np.ndarray:
        return image ^ 1


class WrongModel(FakeCodec):
    def encode(self, image: np.ndarray, quality: int = 50) -> bytes:
        raise ModelError("another model")


def how(models: Sequence[Any] = (), names: Sequence[str] = ("jpeg",), **more: Any) -> RateDistortion:
    more.setdefault("metrics", Metrics())
    return RateDistortion(protocol=get("folder"), models=models, baselines=baselines.get(names), **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of 192x176."""
    rng = np.random.default_rng(4)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        coarse = Image.fromarray(rng.integers(0, 256, (11, 12, 3), dtype=np.uint8))
        coarse.resize((192, 176), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def no_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENT_CODEC_FEATURES", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))


def test_baselines_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "rd_lpips_sqz10.png").write_text("of an earlier run")
    assert main(["rd", str(folder), "--baselines", "jpeg,avif", "-o", str(out)]) == 0

    result = json.loads((out / "rd.json").read_text())
    assert result["dataset"]["n_images"] == 2
    assert result["dataset"]["names"] == ["a.png", "b.png"]
    originals = {name: np.asarray(Image.open(folder / name)) for name in ("a.png", "b.png")}
    each = [hashlib.sha256(b"(176, 192, 3)" + image.tobytes()).hexdigest() for image in originals.values()]
    assert result["dataset"]["sha256"] == hashlib.sha256("".join(each).encode()).hexdigest()
    assert result["weights"] == {}
    assert "lpips_sqz10" in result["absent"]
    assert (result["kind"], result["protocol"]["kind"], result["protocol"]["name"]) == ("rd", "rd", "folder")
    assert result["protocol_hash"] == digest(result["protocol"])
    assert list(result["protocol"]["metrics"]) == ["psnr", "ssim", "ms_ssim", "ssimulacra2", "flip"]
    assert result["control"]["passed"]
    assert result["control"]["measured"]["psnr"] == "infinite"
    assert result["failed"] == []
    assert result["versions"]["torch"]
    assert "codec-eval rd" in result["command"]
    assert [codec["name"] for codec in result["codecs"]] == ["jpeg", "avif"]

    jpeg = result["codecs"][0]
    assert jpeg["kind"] == "baseline"
    assert "progressive=True" in jpeg["flags"]
    assert jpeg["ceiling"] is None
    assert [point["quality"] for point in jpeg["points"]] == [5, 10, 20, 30, 50]
    for point in jpeg["points"]:
        bpp, decibels = [], []
        for image in originals.values():
            file = io.BytesIO()
            flags = {"optimize": True, "progressive": True, "subsampling": "4:2:0"}
            Image.fromarray(image).save(file, "JPEG", quality=point["quality"], **flags)
            bpp.append(8 * len(file.getvalue()) / (192 * 176))
            decibels.append(psnr(image, np.asarray(Image.open(file))))
        rows = [row for row in jpeg["rows"] if row["quality"] == point["quality"]]
        assert [row["bpp"] for row in rows] == bpp
        assert point["bpp"] == pytest.approx(sum(bpp) / 2)
        assert point["psnr"] == pytest.approx(sum(decibels) / 2)
        assert 0 < point["ms_ssim"] < 1
        # Two images: some resamples are one of them alone.
        assert point["intervals"]["psnr"] == pytest.approx([min(decibels), max(decibels)])
        assert min(point["encode_s"], point["decode_s"]) > 0

    compared = result["comparisons"]
    assert compared["anchor"] == "jpeg"
    row = next(row for row in compared["metrics"]["psnr"]["bd"] if row["codec"] == "avif")
    assert row["bd_rate_percent"] < -10
    assert 0 < row["overlap"] < 1
    stored = json.loads((out / "compressai" / "jpeg.json").read_text())
    assert stored["results"]["psnr-rgb"] == [point["psnr"] for point in jpeg["points"]]
    assert set(stored["results"]) == {"bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time"}

    for metric in ("psnr", "ssim", "ms_ssim", "ssimulacra2", "flip"):
        with Image.open(out / f"rd_{metric}.png") as plot:
            assert plot.size == (1125, 750)
    assert not (out / "rd_lpips_sqz10.png").exists()
    with Image.open(out / "comparison.png") as picture:
        columns, rows_shown = 3, 2
        assert picture.size == (8 + columns * 264, 44 + rows_shown * 300)
    printed = capsys.readouterr()
    assert f"{row['bd_rate_percent']:+.1f}" in printed.out
    assert f"({100 * row['overlap']:.0f})" in printed.out
    assert "PSNR infinite, SSIM 1" in printed.out
    assert str(out / "comparison.png") in printed.out
    assert "left out, their weights are not here (see codec-eval weights): lpips_sqz10" in printed.err


def test_model_and_ceiling(folder: Path, tmp_path: Path) -> None:
    sources = find([folder], EXTENSIONS)
    models = [FakeCodec(), FakeCodec()]
    result = run_rd(sources, how(models, qualities=[10, 90], metrics=Metrics(SqueezeFeatures())), dataset="two")
    first, second, jpeg = result["codecs"]
    assert (first["kind"], second["name"], jpeg["kind"]) == ("model", "fake (2)", "baseline")
    assert first["description"] == {"name": "fake"}
    image = np.asarray(Image.open(folder / "a.png"))
    assert first["rows"][1]["size_bytes"] == len(FakeCodec().encode(image, 90))
    assert first["ceiling"]["psnr"] == pytest.approx(48.1308, abs=1e-4)
    assert first["ceiling"]["intervals"]["psnr"] == pytest.approx([48.1308, 48.1308], abs=1e-4)
    assert first["ceiling"]["kl_bpp"] is None
    assert [row["image"] for row in first["ceiling_rows"]] == ["a.png", "b.png"]
    assert first["points"][0]["bpp"] < first["points"][1]["bpp"]
    assert first["points"][0]["lpips_sqz10"] > first["points"][1]["lpips_sqz10"] > 0
    assert result["weights"]["lpips_sqz10"]["sha256"] == "random"
    assert len(plots.plot(result, tmp_path)) == 6
    pictures.compare(sources, models[:1], baselines.get(["jpeg"]), 0.3, tmp_path / "c.png", n=1)
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size == (8 + 3 * 264, 44 + 300)
        shown = np.asarray(picture)[44 : 44 + 176, 8 : 8 + 192]  # pixels of the original, 1:1
    assert any(np.array_equal(shown, np.asarray(Image.open(source.path))) for source in sources)


def test_single_points_have_no_tables_of_equal_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = find([folder], EXTENSIONS)
    for qualities, shown in ([90], False), ([10, 90], True):
        result = run_rd(sources, how([FakeCodec(), FakeCodec()], [], qualities=qualities), dataset="two")
        rd_print.show(result)
        assert ("at equal" in capsys.readouterr().out) == shown
        titles = [table.title for table in report_tables.tables(result, None, {})]
        assert any("at equal" in title for title in titles) == shown


def test_infinite_psnr_is_null(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (128, 128, 128)).save(tmp_path / "flat.png")
    result = run_rd(find([tmp_path], EXTENSIONS), how())
    assert result["undefined"] == {"ms_ssim": {"n_images": 1, "least_side": 161}}
    assert result["codecs"][0]["rows"][-1]["psnr"] is None
    assert result["codecs"][0]["rows"][-1]["ms_ssim"] is None
    json.dumps(result, allow_nan=False)


def test_means_of_some_images_only_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 40), (128, 128, 128)).save(folder / "flat.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    assert main(["rd", str(folder), "--baselines", "jpeg", "--metrics", "psnr", "-o", str(tmp_path / "out")]) == 0
    point = json.loads((tmp_path / "out" / "rd.json").read_text())["codecs"][0]["points"][-1]
    assert point["n_values"] == {"bpp": 2, "psnr": 1}
    error = capsys.readouterr().err
    assert "PSNR: infinite for up to 1 of 2 images at some quality" in error
    assert "of 2 images the 95 % intervals are narrower than they say" in error


def test_failing_image_counts_for_no_codec(folder: Path) -> None:
    Image.new("RGB", (20, 20), (1, 2, 3)).save(folder / "aa.png")
    result = run_rd(find([folder], EXTENSIONS), how([FakeCodec()], qualities=[50]))
    assert result["dataset"]["names"] == ["a.png", "b.png"]
    for codec in result["codecs"]:
        assert {row["image"] for row in codec["rows"]} == {"a.png", "b.png"}
    (failure,) = result["failed"]
    assert failure["image"] == "aa.png"
    assert failure["reason"] == f"{folder / 'aa.png'}: fake: cannot encode this"


def test_wrong_model_stops_the_run(folder: Path) -> None:
    with pytest.raises(ModelError):
        run_rd(find([folder], EXTENSIONS), how([WrongModel()], (), qualities=[50]))


def test_unreadable_image_is_listed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert main(["rd", str(folder), "--baselines", "jpeg", "--metrics", "psnr", "-o", str(out)]) == 1
    result = json.loads((out / "rd.json").read_text())
    assert [failure["image"] for failure in result["failed"]] == ["broken.png"]
    assert result["dataset"]["n_images"] == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(folder / "broken.png") in errors[0]
    assert "1 of 3 images" in errors[1]


def test_all_unreadable(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main(["rd", str(tmp_path / "broken.png"), "--baselines", "jpeg", "-o", str(tmp_path / "out")]) == 1
    result = json.loads((tmp_path / "out" / "rd.json").read_text())
    assert (result["codecs"][0]["points"], result["control"]) == ([], None)
    assert not (tmp_path / "out" / "comparison.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baselines", "jpgxl"], "unknown baseline 'jpgxl'"),
        (["--baselines", ""], "nothing to measure"),
        (["-q", "10,101"], "'10,101'"),
        (["-q", "high"], "'high'"),
        (["--features", "nowhere"], "squeezenet1_0"),
        (["--metrics", "psnr,lpips-alex"], "alexnet"),
        (["--metrics", "pnsr"], "did you mean psnr"),
        (["--protocol", "kodka"], "did you mean kodak"),
        (["--protocol", "kodak"], "protocol kodak is 24 images"),
        (["--anchor", "avfi"], "did you mean 'avif'"),
        (["--baseline-qualities", "jpeg"], "like jpeg=5,10"),
        (["--baseline-qualities", "jpeg=0,10"], "expected 1 to 100"),
        (["--curves", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_usage_errors(folder: Path, tmp_path: Path, options: list[str], message: str, capfd: Any) -> None:
    assert main(["rd", str(folder), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out" / "rd.json").exists()


def test_missing_model_and_images(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main(["rd", str(folder), "-m", str(tmp_path / "no-model"), "-o", out]) == 3
    assert main(["rd", str(tmp_path / "nothing"), "-o", out]) == 2
    (tmp_path / "file").touch()
    assert main(["rd", str(folder), "-o", str(tmp_path / "file" / "out")]) == 2


def test_limit(folder: Path, tmp_path: Path) -> None:
    options = ["--limit", "1", "--baselines", "jpeg", "--metrics", "psnr"]
    assert main(["rd", str(folder), *options, "-o", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "rd.json").read_text())["dataset"]["names"] == ["a.png"]


def test_same_names_in_two_folders(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes((folder / "b.png").read_bytes())
    result = run_rd(find([folder / "a.png", other], EXTENSIONS), how(metrics=Metrics(metrics=[KNOWN["psnr"]])))
    assert result["dataset"]["names"] == [str(folder / "a.png"), str(other / "a.png")]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from eval.cli import main; code = main(['--help']);"
        "print([m for m in ('torch', 'torchvision', 'matplotlib', 'diffusers', 'lpips', 'numpy') if m in sys.modules]);"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "rd" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import codec

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"codec-eval {codec.__version__}"
